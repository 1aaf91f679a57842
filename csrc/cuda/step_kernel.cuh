// The fused step on a CUDA device: one launch for all tensors of a dtype.
//
// Each warp reads what it does from one table, alone or with the warps that share its filter. Nothing but
// that table is waited for before the weights are asked for: hyperparameters follow, and what GradScaler
// has found decides no more than whether anything is written.
#pragma once

#include <cstring>

#include "tiled_filter.cuh"
#include "work_item.h"

// The tests run the kernel with smaller blocks.
#ifndef CZM_BLOCK_THREADS
#define CZM_BLOCK_THREADS 256
#endif
#ifndef CZM_DYNAMIC_SHARED
#define CZM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace czm {

constexpr int kThreads = CZM_BLOCK_THREADS;

// What the registers of a thread hold of W and dW, in packs. Most filters fit small blocks, of which two share
// a multiprocessor. A large block has all registers of one, in as many threads: what a thread needs beside
// the weights would take too many of 512.
enum class BlockSize { small, large };

template <class Stored, BlockSize block> struct BlockTraits {
  static constexpr bool kIsSmall = block == BlockSize::small;
  static constexpr int kBlocksAMultiprocessor = kIsSmall ? 2 : 1;
  // Half types are computed in float.
  static constexpr bool kIsHalf = sizeof(Stored) == 2;
  static constexpr int kSmallPacks = kIsHalf ? 3 : sizeof(Stored) == 8 ? 4 : 5;
  static constexpr int kPacks = kIsSmall ? kSmallPacks : kIsHalf ? 10 : 20;
  using InRegisters = RegisterFilter<Stored, kPacks, kIsSmall && sizeof(Stored) == 4, Contiguous, !kIsSmall>;
  using InTiles = RegisterFilter<Stored, kIsHalf ? 2 : 4, false, TilePlace, true>;
  using T = opmath_type<Stored>;
  // A number for each weight that a block holds, and the sums of each warp.
  static constexpr int kSharedBytes =
      (kThreads * InRegisters::kWeights + kSums * kThreads / kWarp) * int(sizeof(T));
};

// The numbers of a warp's group and its tensor, wherever they live: one in each lane until they are needed,
// so that they are one load, and one register beside the weights.
class Numbers {
 public:
  template <int words>
  __device__ __forceinline__ Numbers(const StepArguments<words>& arguments, const WorkItem& item) {
    const int lane = int(threadIdx.x) & (kWarp - 1);
    int64_t address = 0;
    if (lane < kGroupWords) {
      const int64_t word = item.group * kGroupWords + lane;
      std::memcpy(&number_, &arguments.words[word], sizeof number_);
      address = arguments.words[arguments.groups * kGroupWords + word];
    } else if (lane == kStep) {
      number_ = 1;
      address = item.step;
    } else if (lane == kGradScale) {
      number_ = 1;
      address = reinterpret_cast<int64_t>(arguments.grad_scale);
    } else if (lane == kFoundInf) {
      address = reinterpret_cast<int64_t>(arguments.found_inf);
    }
    if (address) number_ = *global_address<const float>(address);
  }

  __device__ __forceinline__ bool nothing_infinite() const { return of_lane(kFoundInf) == 0; }

  template <class T> __device__ __forceinline__ T inverse_scale() const {
    return T(1) / T(of_lane(kGradScale));
  }

  template <class T>
  __device__ __forceinline__ HyperParameters<T> hyperparameters(const WorkItem& item) const {
    GroupDescriptor group;
    int lane = 0;
#define CZM_FIELD(name) group.name = of_lane(lane++);
    CZM_HYPERPARAMETERS(CZM_FIELD)
#undef CZM_FIELD
    return hyperparameters_of<T>(group, item.momentum_buffer != 0, of_lane(kStep) == 0,
                                 inverse_scale<T>());
  }

 private:
  static constexpr int kStep = kGroupWords, kGradScale = kStep + 1, kFoundInf = kStep + 2;

  __device__ __forceinline__ double of_lane(int lane) const {
    return __shfl_sync(kAllLanes, number_, lane);
  }

  double number_ = 0;
};

// Puts the filter's own log-scale and the sums over all threads into its rule, and advances g.
template <class T> class RuleMaker {
 public:
  // Reads g early.
  __device__ __forceinline__ RuleMaker(const WorkItem& item, int number, bool has_filter)
      : taps_(item.taps),
        has_log_scale_(item.log_scale != 0),
        log_scale_(has_filter && item.log_scale ? global_address<T>(item.log_scale) + number
                                                : nullptr),
        log_scale_momentum_(has_filter && item.log_scale_momentum_buffer
                                ? global_address<T>(item.log_scale_momentum_buffer) + number
                                : nullptr) {
    if (log_scale_) g_ = *log_scale_;
    if (log_scale_momentum_) g_momentum_ = *log_scale_momentum_;
  }

  // `products` are summed over the thread group.
  __device__ __forceinline__ FilterRule<T> operator()(const HyperParameters<T>& hyper,
                                                      const T (&products)[kSums], bool writes) {
    const FilterSums<T> sums{products[0], products[1], products[2]};
    if (!has_log_scale_) {
      return filter_rule<T>(hyper, sums, taps_, nullptr, nullptr);
    }
    const FilterRule<T> rule = filter_rule(hyper, sums, taps_, &g_, &g_momentum_);
    if (writes && log_scale_) *log_scale_ = g_;
    if (writes && log_scale_momentum_) *log_scale_momentum_ = g_momentum_;
    return rule;
  }

 private:
  const int taps_;
  const bool has_log_scale_;
  T* const log_scale_;
  T* const log_scale_momentum_;
  T g_ = 0;
  T g_momentum_ = 0;
};

// A tensor without gradient has no filters here: all that follows is the same for a warp without work.
template <class Stored>
__device__ __forceinline__ Filters<Stored> filters_of(const WorkItem& item, int64_t grad) {
  return {global_address<Stored>(item.param),
          global_address<Stored>(grad) + item.first,
          item.momentum_buffer ? global_address<Stored>(item.momentum_buffer) : nullptr,
          item.param_remainder ? global_address<int16_t>(item.param_remainder) : nullptr,
          grad ? item.numel : 0,
          item.filter_numel,
          item.taps,
          item.flags};
}

template <class Stored, BlockSize block, int words>
__device__ __forceinline__ void run(const WorkItem& item, int64_t grad,
                                    const StepArguments<words>& arguments,
                                    opmath_type<Stored>* shared) {
  using Traits = BlockTraits<Stored, block>;
  using InRegisters = typename Traits::InRegisters;
  using T = opmath_type<Stored>;
  const ThreadGroup threads(item.log_threads());
  const Filters<Stored> filters = filters_of<Stored>(item, grad);
  const int first_thread = int(threadIdx.x) & ~(threads.size < kWarp ? kWarp - 1 : threads.size - 1);
  T* const its_shared = shared + first_thread * InRegisters::kWeights;
  T* const partial = shared + kThreads * InRegisters::kWeights;
  T sums[kSums] = {};
  if constexpr (block == BlockSize::large) {
    if (filters.filter_numel > threads.size * InRegisters::kWeights) {
      const TiledFilter<Stored, typename Traits::InTiles> tiled(filters, its_shared, threads);
      const Numbers numbers(arguments, item);
      RuleMaker<T> make_rule(item, 0, filters.numel > 0);
      if (item.flags & kNeedsSums) {
        tiled.add_products_to(sums);
        threads.sum(sums, partial);
      }
      const bool writes = numbers.nothing_infinite();
      const FilterRule<T> rule =
          make_rule(numbers.hyperparameters<T>(item), sums, writes && threads.rank == 0);
      tiled.update(rule, arguments.grad_scale ? numbers.inverse_scale<T>() : T(0), writes, partial);
      return;
    }
  }
  const Contiguous place;
  InRegisters in_registers(filters, its_shared, threads, place);
  const Numbers numbers(arguments, item);
  RuleMaker<T> make_rule(item, threads.number_in_warp(), in_registers.has_filter());
  in_registers.arrange();
  if (item.flags & kNeedsSums) {
    in_registers.add_products_to(sums);
    threads.sum(sums, partial);
  }
  const bool writes = numbers.nothing_infinite();
  if (arguments.grad_scale) in_registers.unscale_grad(numbers.inverse_scale<T>(), writes);
  const FilterRule<T> rule =
      make_rule(numbers.hyperparameters<T>(item), sums, writes && threads.rank == 0);
  in_registers.update(rule, T(0), writes);
}

template <int words, class Stored, BlockSize block>
__global__ void __launch_bounds__(kThreads, BlockTraits<Stored, block>::kBlocksAMultiprocessor)
step_kernel(const __grid_constant__ StepArguments<words> arguments) {
  CZM_DYNAMIC_SHARED(shared);
  const WorkItem item = arguments.items[(blockIdx.x * kThreads + threadIdx.x) / kWarp];
  const int64_t grad = arguments.words[2 * kGroupWords * arguments.groups + item.tensor];
  run<Stored, block>(item, grad, arguments, reinterpret_cast<opmath_type<Stored>*>(shared));
}

}  // namespace czm
