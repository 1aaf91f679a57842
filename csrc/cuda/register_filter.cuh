// The update of a filter that the registers of its thread group hold, so that it is read once.
//
// W and dW, and the momentum where there is room, are all under way before the first is waited for.
// A tensor whose filters are whole aligned packs is moved straight between memory and the registers that
// its elements belong in. Of any other, neighbouring threads move neighbouring elements, and each warp
// gives them their places in its shared memory; this is decided for each tensor.
#pragma once

#include <cstring>

#include "../param_remainder.h"
#include "../update_rule.h"
#include "channel_sums.cuh"
#include "filter_packs.cuh"
#include "work_item.h"

namespace czm {

// Consecutive filters of one tensor, one for each thread group of a warp, or one for several warps.
template <class Stored> struct Filters {
  Stored* weight;
  Stored* grad;
  Stored* momentum;    // null without momentum
  int16_t* remainder;  // null if `weight` is all there is of the weights
  int numel;           // of all filters
  int filter_numel;
  int taps;   // 1 if CZMG has nothing to do
  int flags;  // of ItemFlag
};

// Element i of a filter is at address i.
struct Contiguous {
  __device__ __forceinline__ int64_t operator()(int i) const { return i; }
};

// `packs` is how many packs of each a thread holds. The momentum is asked for with W and dW if `asks_early`,
// else when the gradients of V have left their registers. `is_whole_warps` is true if no thread group is
// smaller than a warp.
template <class Stored, int packs, bool asks_early, class Place, bool is_whole_warps>
class RegisterFilter {
 public:
  using T = opmath_type<Stored>;

  // The weights that a thread holds.
  static constexpr int kWeights = packs * kWidest<Stored>;

  // `shared` has a number for each weight that the thread group, or its warp if that is larger, holds. Each
  // warp uses its own part, but for the sums over taps.
  __device__ __forceinline__ RegisterFilter(const Filters<Stored>& filters, T* shared,
                                            const ThreadGroup& threads, const Place& place)
      : filters_(filters),
        shared_(shared),
        threads_(threads),
        place_(place),
        lane_(int(threadIdx.x) & (kWarp - 1)),
        begin_(is_whole_warps ? 0 : threads.number_in_warp() * filters.filter_numel),
        numel_(min(filters.numel - begin_, filters.filter_numel)) {
    load(param_, filters_.weight);
    load(grad_, filters_.grad);
    if constexpr (sizeof(Stored) == 2) load(remainder_, filters_.remainder);
    if constexpr (asks_early) load(momentum_, filters_.momentum);
  }

  __device__ __forceinline__ bool has_filter() const { return numel_ > 0; }

  // Loads what could not be asked for before.
  __device__ __forceinline__ void arrange() {
    arrange_all(param_, filters_.weight, false);
    arrange_all(grad_, filters_.grad, true);
    if constexpr (asks_early) arrange_all(momentum_, filters_.momentum, true);
#pragma unroll
    for (int k = 0; k < packs; ++k) weight_[k] = to_opmath(pack_of<Stored>(param_[k]));
    if constexpr (sizeof(Stored) == 2) {
      if (filters_.remainder) {
        arrange_all(remainder_, filters_.remainder, true);
#pragma unroll
        for (int k = 0; k < packs; ++k) add_remainders(weight_[k], pack_of<int16_t>(remainder_[k]));
      }
    }
  }

  __device__ __forceinline__ void add_products_to(T (&sums)[kSums]) const {
#pragma unroll
    for (int k = 0; k < packs; ++k) add_products(sums, weight_[k], pack_of<Stored>(grad_[k]));
  }

  // Writes the gradients times `inverse_scale`, as torch's fused optimizers leave them for GradScaler.
  __device__ __forceinline__ void unscale_grad(T inverse_scale, bool writes) {
#pragma unroll
    for (int k = 0; k < packs; k += kRound) {
      store(filters_.grad, k, writes, false,
            [&](int k) { return scaled(inverse_scale, pack_of<Stored>(grad_[k])); });
    }
    if (!is_direct(filters_.grad)) __syncwarp();
  }

  // Takes `removed` from every gradient, beside what CZMG removes. Nothing changes unless `writes`.
  __device__ __forceinline__ void update(const FilterRule<T>& rule, T removed, bool writes) {
    const T* const directions = to_directions(rule);
#pragma unroll
    for (int begin = 0; begin < packs; begin += kRound) {
      Pack<T, kSize> direction[kRound];
#pragma unroll
      for (int k = 0; k < kRound; ++k) {
        direction[k] = {};
        if (first(begin + k) < numel_) direction[k] = load_shared<kSize>(directions + in_run(begin + k));
      }
      if constexpr (!asks_early) {
        // Smaller elements take the places of earlier rounds.
        const bool waits = begin == 0 || sizeof(Stored) == sizeof(T);
        arrange<kRound>(momentum_, filters_.momentum, begin, waits);
      }
#pragma unroll
      for (int k = 0; k < kRound; ++k) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) direction[k].values[j] -= removed;
        auto momentum = pack_of<Stored>(momentum_[begin + k]);
        update_pack(rule, weight_[begin + k], direction[k], momentum);
        momentum_[begin + k] = words_of(momentum);
      }
      if (filters_.momentum) {
        store(filters_.momentum, begin, writes, false,
              [&](int k) { return pack_of<Stored>(momentum_[k]); });
      }
      store_weight(begin, writes);
    }
  }

 private:
  static constexpr int kSize = kWidest<Stored>;
  // The packs that are updated, or moved through shared memory, at a time. Only whole warps have the same
  // elements of a pack in its place and in registers.
  static constexpr int kRound = !is_whole_warps ? packs : kSize == 8 ? 1 : 2;
  // The same before there are gradients of V, which leaves more registers to loads of single elements.
  static constexpr int kLoadRound = is_whole_warps && packs > 4 * kRound ? 5 * kRound / 2 : kRound;
  static_assert(packs % kRound == 0 && packs % kLoadRound == 0);

  // A pack in four registers, whatever its elements.
  struct alignas(kWidestPackBytes) Words {
    uint32_t words[kWidestPackBytes / 4];
  };

  template <class Element> __device__ __forceinline__ static Pack<Element, kSize> pack_of(const Words& words) {
    Pack<Element, kSize> pack;
    static_assert(sizeof pack == sizeof words);
    std::memcpy(&pack, &words, sizeof pack);
    return pack;
  }

  template <class Element> __device__ __forceinline__ static Words words_of(const Pack<Element, kSize>& pack) {
    Words words;
    std::memcpy(&words, &pack, sizeof words);
    return words;
  }

  // Zeros for all but the first `count` elements, which may be negative.
  template <class Element> __device__ __forceinline__ static void keep_first(Words& words, int count) {
    constexpr int bits = 8 * int(sizeof(Element));
#pragma unroll
    for (int w = 0; w < kWidestPackBytes / 4; ++w) {
      const int left = count * bits - 32 * w;
      words.words[w] &= left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
    }
  }

  // Each warp has a run of elements of its own, `kWeights` for each lane.
  __device__ __forceinline__ int begin_of_warp() const {
    return is_whole_warps || threads_.size > kWarp ? (threads_.rank - lane_) * kWeights : 0;
  }

  // The warp's part of shared memory.
  template <class Element = T> __device__ __forceinline__ Element* run() const {
    return reinterpret_cast<Element*>(shared_ + begin_of_warp());
  }

  // The first element of pack k, in its filter.
  __device__ __forceinline__ int first(int k) const {
    if constexpr (is_whole_warps) return begin_of_warp() + (k * kWarp + lane_) * kSize;
    const int lanes = threads_.size < kWarp ? threads_.size : kWarp;
    return begin_of_warp() + (k * lanes + (lane_ & (lanes - 1))) * kSize;
  }

  // Where the thread group's filter has its elements in the warp's run.
  __device__ __forceinline__ int filter_in_run() const {
    return is_whole_warps ? 0 : threads_.number_in_warp() * threads_.size * kWeights;
  }

  // Where pack k has its place in the warp's run.
  __device__ __forceinline__ int in_run(int k) const {
    if constexpr (is_whole_warps) return (k * kWarp + lane_) * kSize;
    return filter_in_run() + first(k) - begin_of_warp();
  }

  // The element of the warp's run that a lane moves as the j-th of pack k where it moves single ones.
  __device__ __forceinline__ static int single(int k, int j, int lane) {
    return (k * kSize + j) * kWarp + lane;
  }

  // Where an element of the warp's filters has its place in its run: each filter begins a pack.
  class Spread {
   public:
    __device__ __forceinline__ explicit Spread(const RegisterFilter& filter)
        : divider_(unsigned(filter.filters_.filter_numel)),
          gap_(filter.threads_.size < kWarp
                   ? filter.threads_.size * kWeights - filter.filters_.filter_numel
                   : 0) {}
    __device__ __forceinline__ int operator()(int i) const {
      if constexpr (is_whole_warps) return i;
      return gap_ == 0 ? i : i + divider_.quotient(i) * gap_;
    }

   private:
    SmallDivider divider_;
    int gap_;
  };

  template <class Element> __device__ __forceinline__ bool is_direct(const Element* address) const {
    return filters_.flags & kInPacks && are_aligned(address);
  }

  // The same number, which the compiler does not know: what follows from it is computed where it is needed,
  // not once for all tensors, which would take a register for each element.
  __device__ __forceinline__ static int opaque(int i) {
    asm volatile("" : "+r"(i));
    return i;
  }

  // Asks for a tensor's packs, if each can be moved straight into its place.
  template <class Element>
  __device__ __forceinline__ void load(Words (&to)[packs], const Element* from) const {
#pragma unroll
    for (int k = 0; k < packs; ++k) to[k] = {};
    if (!from || !is_direct(from)) return;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (first(k) < numel_) {
        to[k] = words_of(load_global<kSize>(from + place_(begin_ + first(k))));
      }
    }
  }

  template <class Element>
  __device__ __forceinline__ void arrange_all(Words (&to)[packs], const Element* from, bool waits) {
#pragma unroll
    for (int begin = 0; begin < packs; begin += kLoadRound) {
      // Each of several rounds has a barrier, which comes before the next tensor's round.
      arrange<kLoadRound>(to, from, begin, waits && kLoadRound == packs);
    }
  }

  // Loads packs that load() did not, all elements at once, with zeros beyond the filter. `waits` is true if
  // other lanes may be reading their packs.
  template <int round, class Element>
  __device__ __forceinline__ void arrange(Words (&to)[packs], const Element* from, int begin,
                                          bool waits) const {
    if (!from || is_direct(from)) return;
    const int lane = opaque(lane_);
    const int run_begin = begin_of_warp();
    const Spread spread(*this);
    Element loaded[round][kSize] = {};
#pragma unroll
    for (int k = 0; k < round; ++k) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int i = single(begin + k, j, lane);
        if (run_begin + i < filters_.numel) loaded[k][j] = *in_global(from + place_(run_begin + i));
      }
    }
    Element* const run = this->run<Element>();
    if (waits) __syncwarp();
#pragma unroll
    for (int k = 0; k < round; ++k) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int i = single(begin + k, j, lane);
        if (run_begin + i < filters_.numel) run[spread(i)] = loaded[k][j];
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = begin; k < begin + round; ++k) {
      to[k] = {};
      if (first(k) < numel_) {
        to[k] = words_of(load_pack<kSize>(run + in_run(k)));
        keep_first<Element>(to[k], numel_ - first(k));
      }
    }
  }

  // Stores the packs of a round. `waits` is true if other lanes may be reading what a lane's packs replace.
  template <class Element, class PackAt>
  __device__ __forceinline__ void store(Element* to, int begin, bool writes, bool waits,
                                        const PackAt& pack_at) const {
    if (is_direct(to)) {
#pragma unroll
      for (int k = begin; k < begin + kRound; ++k) {
        if (first(k) < numel_ && writes) {
          store_global(to + place_(begin_ + first(k)), pack_at(k));
        }
      }
      return;
    }
    Element* const run = this->run<Element>();
    const Spread spread(*this);
    const int lane = opaque(lane_);
    if (waits) __syncwarp();
#pragma unroll
    for (int k = begin; k < begin + kRound; ++k) {
      if (first(k) < numel_) store_pack(run + in_run(k), pack_at(k));
    }
    __syncwarp();
    const int run_begin = begin_of_warp();
#pragma unroll
    for (int k = begin; k < begin + kRound; ++k) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int i = single(k, j, lane);
        if (run_begin + i < filters_.numel && writes) {
          *in_global(to + place_(run_begin + i)) = run[spread(i)];
        }
      }
    }
  }

  __device__ __forceinline__ void store_weight(int begin, bool writes) {
    const auto param = [&](int k) { return from_opmath<Stored>(weight_[k]); };
    store(filters_.weight, begin, writes, true, param);
    if constexpr (sizeof(Stored) == 2) {
      if (!filters_.remainder) return;
      store(filters_.remainder, begin, writes, true,
            [&](int k) { return remainders_of(weight_[k], param(k)); });
    }
  }

  // Returns the gradients of V after CZMG, in the warp's run. Those of half types take twice the registers of
  // dW, so that they wait there, and the momentum comes meanwhile.
  __device__ __forceinline__ const T* to_directions(const FilterRule<T>& rule) {
    T* const run = this->run<T>();
    // Elsewhere a lane's gradients of V replace its own packs.
    if constexpr (sizeof(Stored) != sizeof(T)) __syncwarp();
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (first(k) < numel_) {
        store_shared(run + in_run(k), direction_grads(rule, pack_of<Stored>(grad_[k]), weight_[k]));
      }
    }
    if constexpr (!asks_early) load(momentum_, filters_.momentum);
    if (filters_.taps > 1) {
      // Of thread groups without a filter, too: their lanes exchange sums with others of the warp.
      const ChannelTile tile(filters_.filter_numel / filters_.taps, filters_.taps,
                             filters_.flags & kChannelsLast);
      tile.remove_means(shared_ + filter_in_run(), rule.mean, threads_);
    }
    return run;
  }

  const Filters<Stored>& filters_;
  T* const shared_;
  const ThreadGroup& threads_;
  const Place& place_;
  const int lane_;
  const int begin_;
  const int numel_;  // of this thread group's filter; 0 or less without one
  Pack<T, kSize> weight_[packs];
  Words param_[packs], grad_[packs];
  Words momentum_[packs];
  Words remainder_[sizeof(Stored) == 2 ? packs : 1];
};

}  // namespace czm
