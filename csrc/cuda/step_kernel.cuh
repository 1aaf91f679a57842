// The fused step on a CUDA device: one launch for all tensors of a plan.
//
// A block does one work item: some filters of one tensor, each by a thread group. A filter
// that fits the registers of its thread group is read once: W, dW and the momentum are all under way before
// the first sum. A larger one is read again, tile by tile. Sums over taps go through shared memory.
#pragma once

#include <algorithm>
#include <cstring>

#include "../descriptors.h"
#include "step_filter.cuh"

// The tests run the kernel with smaller blocks.
#ifndef CZM_BLOCK_THREADS
#define CZM_BLOCK_THREADS 256
#endif

namespace czm {

constexpr int kBlockThreads = CZM_BLOCK_THREADS;

// Written by czm_fused/ops/cuda.py.
struct WorkItem {
  int64_t row;
  int64_t first_filter;
  int64_t filters;  // one for each thread group, and no more than there are thread groups
  int64_t thread_group_size;
};

// What travels with a launch. `words` holds, one after the other: for every group the bits of its
// GroupRow, for every group the addresses that stand for its numbers, and for every tensor the
// address of its gradient.
template <int words_> struct StepArguments {
  const TensorDescriptor* rows;
  const WorkItem* items;
  const float* grad_scale;  // null for 1
  const float* found_inf;   // null for 0
  int64_t groups;
  int64_t words[words_];
};

constexpr int kGroupWords = sizeof(GroupRow) / sizeof(int64_t);
constexpr int kHeaderBytes = sizeof(StepArguments<1>) - sizeof(int64_t);
// A launch takes 4 KB of arguments on every device, and 32,764 bytes from sm_70 on.
constexpr int kFewWords = (4096 - kHeaderBytes) / sizeof(int64_t);
constexpr int kManyWords = (32764 - kHeaderBytes) / sizeof(int64_t);

template <class Stored> struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DType value = kFloat32; };
template <> struct DTypeOf<double> { static constexpr DType value = kFloat64; };
template <> struct DTypeOf<__nv_bfloat16> { static constexpr DType value = kBFloat16; };
template <> struct DTypeOf<__half> { static constexpr DType value = kFloat16; };

// What a launch hands to one group, numbers that live on the device included.
template <int words>
__device__ __forceinline__ GroupRow group_row(const StepArguments<words>& arguments,
                                              int64_t group) {
  const int64_t first_address = arguments.groups * kGroupWords;
  int64_t bits[kGroupWords];
#pragma unroll
  for (int column = 0; column < kGroupWords; ++column) {
    const int64_t word = group * kGroupWords + column;
    const int64_t address = arguments.words[first_address + word];
    bits[column] = arguments.words[word];
    if (address) {
      const double value = *global_address<const float>(address);
      std::memcpy(&bits[column], &value, sizeof value);
    }
  }
  GroupRow row;
  std::memcpy(&row, bits, sizeof row);
  return row;
}

template <class T>
__device__ __forceinline__ HyperParameters<T> read_hyperparameters(const TensorDescriptor& row,
                                                                   const GroupRow& group,
                                                                   const float* grad_scale) {
  const bool is_first = row.step && *global_address<const float>(row.step) == 0;
  return hyperparameters_of<T>(group, row.momentum_buffer != 0, is_first,
                               grad_scale ? T(1) / T(*grad_scale) : T(1));
}

// Puts the filter's own log-scale and the sums over all threads into its rule, and advances g.
template <class Stored> class RuleMaker {
 public:
  using T = opmath_type<Stored>;

  // Reads g early; the barrier of the sums lies between this and its change.
  __device__ __forceinline__ RuleMaker(const TensorDescriptor& row, int64_t number, bool has_filter)
      : row_(row),
        log_scale_(global_address<T>(row.log_scale) + number),
        log_scale_momentum_(global_address<T>(row.log_scale_momentum_buffer) + number),
        is_scaled_(row.log_scale && has_filter) {
    if (is_scaled_) g_ = *log_scale_;
    if (is_scaled_ && row.log_scale_momentum_buffer) g_momentum_ = *log_scale_momentum_;
  }

  // `sums` are the thread group's <W, W> and <dW, W>.
  __device__ __forceinline__ FilterRule<T> operator()(const HyperParameters<T>& hyper,
                                                      const T (&sums)[2], const ThreadGroup& threads) {
    if (!row_.log_scale) {
      return filter_rule<T>(hyper, sums[0], sums[1], row_.taps, nullptr, nullptr);
    }
    const FilterRule<T> rule =
        filter_rule(hyper, sums[0], sums[1], row_.taps, &g_, &g_momentum_);
    if (is_scaled_ && threads.rank == 0) {
      *log_scale_ = g_;
      if (row_.log_scale_momentum_buffer) *log_scale_momentum_ = g_momentum_;
    }
    return rule;
  }

 private:
  const TensorDescriptor& row_;
  T* const log_scale_;
  T* const log_scale_momentum_;
  const bool is_scaled_;
  T g_ = 0;
  T g_momentum_ = 0;
};

template <class Stored>
__device__ __forceinline__ void update_in_registers(const Filter<Stored>& filter, const TensorDescriptor& row,
                                            const HyperParameters<opmath_type<Stored>>& hyper,
                                            RuleMaker<Stored>& make_rule, const ThreadGroup& threads,
                                            opmath_type<Stored>* shared, opmath_type<Stored>* partial) {
  RegisterFilter<Stored> in_registers(filter, shared, threads);
  opmath_type<Stored> sums[2] = {};
  if (row.needs_norms) {
    in_registers.add_products_to(sums);
    threads.sum(sums, partial);
  }
  in_registers.update(make_rule(hyper, sums, threads));
}

// Whether a tiled filter, and all its tiles, can be moved in the widest packs.
template <class Stored>
__device__ __forceinline__ bool is_in_packs(const Filter<Stored>& filter, const ThreadGroup& threads) {
  constexpr int size = kWidest<Stored>;
  return is_aligned(filter) && filter.numel % size == 0 &&
         (filter.taps == 1 || (filter.taps <= threads.size * kRegisterWeights<Stored> / size &&
                               filter.numel / filter.taps % size == 0));
}

template <int size, class Stored>
__device__ __forceinline__ void update_in_tiles(const Filter<Stored>& filter, const TensorDescriptor& row,
                                                const HyperParameters<opmath_type<Stored>>& hyper,
                                                RuleMaker<Stored>& make_rule, const ThreadGroup& threads,
                                                opmath_type<Stored>* shared, opmath_type<Stored>* partial) {
  const TiledFilter<Stored, size> tiled(filter, shared, threads);
  opmath_type<Stored> sums[2] = {};
  if (row.needs_norms) {
    tiled.add_products_to(sums);
    threads.sum(sums, partial);
  }
  const FilterRule<opmath_type<Stored>> rule = make_rule(hyper, sums, threads);
  if (filter.taps == 1) {
    tiled.update_range(rule, 0, filter.numel, 1, 0);
    return;
  }
  const int64_t channels = filter.numel / filter.taps;
  if constexpr (size == 1) {
    if (filter.taps > threads.size * kRegisterWeights<Stored>) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        tiled.update_channel(rule, channel, channels, partial);
      }
      return;
    }
  }
  // Tiles of whole packs.
  const int channels_a_tile = threads.size * kRegisterWeights<Stored> / int(filter.taps) / size * size;
  for (int64_t channel = 0; channel < channels; channel += channels_a_tile) {
    if (channel > 0) threads.sync();
    const int64_t left = channels - channel;
    tiled.update_channels(rule, channel, channels,
                             left < channels_a_tile ? int(left) : channels_a_tile);
  }
}

template <class Stored>
__device__ __forceinline__ void run(const WorkItem& item, const TensorDescriptor& row, int64_t grad,
                                    const GroupRow& group, const float* grad_scale,
                                    opmath_type<Stored>* shared) {
  using T = opmath_type<Stored>;
  const ThreadGroup threads{int(item.thread_group_size)};
  const bool has_filter = threads.number() < item.filters;
  const int64_t number = item.first_filter + (has_filter ? threads.number() : 0);
  const int64_t first = number * row.filter_numel;
  const int64_t left = row.numel - first;
  const Filter<Stored> filter{
      global_address<Stored>(row.param) + first,
      global_address<const Stored>(grad) + first,
      row.momentum_buffer ? global_address<Stored>(row.momentum_buffer) + first : nullptr,
      row.param_remainder ? global_address<int16_t>(row.param_remainder) + first : nullptr,
      has_filter ? (left < row.filter_numel ? left : row.filter_numel) : 0,
      row.filter_numel,
      row.taps,
      row.channels_last != 0};
  const HyperParameters<T> hyper = read_hyperparameters<T>(row, group, grad_scale);
  RuleMaker<Stored> make_rule(row, number, has_filter);
  T* const threads_shared = shared + threads.number() * threads.size * kRegisterWeights<Stored>;
  T* const partial = shared + kBlockThreads * kRegisterWeights<Stored>;
  if (row.filter_numel <= threads.size * kRegisterWeights<Stored>) {
    update_in_registers(filter, row, hyper, make_rule, threads, threads_shared, partial);
  } else if (is_in_packs(filter, threads)) {
    update_in_tiles<kWidest<Stored>>(filter, row, hyper, make_rule, threads, threads_shared, partial);
  } else {
    update_in_tiles<1>(filter, row, hyper, make_rule, threads, threads_shared, partial);
  }
}

// A number for each weight that a block holds, and two for each warp.
template <class... Stored>
constexpr int kSharedBytes =
    std::max({(kBlockThreads * kRegisterWeights<Stored> + 2 * kBlockThreads / kWarp) *
              int(sizeof(opmath_type<Stored>))...});

// One block a work item. Stored is the dtype of every tensor, or each dtype that occurs.
template <int words, class... Stored>
__global__ void __launch_bounds__(kBlockThreads, sizeof...(Stored) == 1 ? 2 : 1)
step_kernel(const __grid_constant__ StepArguments<words> arguments) {
  alignas(kWidestPackBytes) __shared__ unsigned char shared[kSharedBytes<Stored...>];
  if (arguments.found_inf && *arguments.found_inf != 0) return;
  const WorkItem item = arguments.items[blockIdx.x];
  const TensorDescriptor& row = arguments.rows[item.row];
  const GroupRow group = group_row(arguments, row.group);
  const int64_t grad = arguments.words[2 * kGroupWords * arguments.groups + item.row];
  if (!grad) return;
  ((sizeof...(Stored) == 1 || row.dtype == DTypeOf<Stored>::value
        ? run<Stored>(item, row, grad, group, arguments.grad_scale,
                      reinterpret_cast<opmath_type<Stored>*>(shared))
        : void()),
   ...);
}

}  // namespace czm
