// The update of a filter that a block cannot hold: W and dW are read for the sums over the filter, and
// again, with the momentum, tile by tile for the update.
#pragma once

#include "register_filter.cuh"

namespace czm {

// Element i of a tile of some channels, for all taps or some: contiguous, or `channels` apart for each tap.
struct TilePlace {
  bool is_contiguous;
  int count;  // channels of the tile
  int channels;
  SmallDivider divider;

  __device__ TilePlace() : is_contiguous(true), count(1), channels(1), divider(1) {}
  __device__ TilePlace(int count, int channels)
      : is_contiguous(false), count(count), channels(channels), divider(unsigned(count)) {}

  __device__ __forceinline__ int64_t operator()(int i) const {
    if (is_contiguous) return i;
    const int tap = divider.quotient(i);
    return int64_t(tap) * channels + (i - tap * count);
  }
};

template <class Stored, class InRegisters> class TiledFilter {
 public:
  using T = opmath_type<Stored>;

  __device__ __forceinline__ TiledFilter(const Filters<Stored>& filter, T* shared,
                                         const ThreadGroup& threads)
      : filter_(filter),
        shared_(shared),
        threads_(threads),
        capacity_(threads.size * InRegisters::kWeights),
        channels_(filter.numel / filter.taps) {}

  __device__ __forceinline__ void add_products_to(T (&sums)[kSums]) const {
    double totals[kSums] = {};
    if (in_packs() && are_aligned(filter_.weight, filter_.grad, filter_.remainder)) {
      add_products_of_packs<kWidest<Stored>>(totals);
    } else {
      add_products_of_packs<1>(totals);
    }
    for (int k = 0; k < kSums; ++k) sums[k] += T(totals[k]);
  }

  // Gradients are left as they are where `inverse_scale` is 0. `partial` is shared memory as
  // ThreadGroup::sum() takes it.
  __device__ __forceinline__ void update(const FilterRule<T>& rule, T inverse_scale, bool writes,
                                         T* partial) const {
    constexpr int size = kWidest<Stored>;
    const bool is_strided = channels_last() && filter_.taps > 1;
    // A channel that is longer than a tile comes in several, and its mean before them.
    const bool by_channel = filter_.taps > capacity_;
    const int taps = by_channel ? capacity_ : filter_.taps;
    int count = capacity_ / taps;
    if (count > size) count = count / size * size;
    const bool tiles_in_packs = count % size == 0 && !by_channel &&
                          (is_strided ? channels_ % size == 0 : in_packs());
    for (int channel = 0; channel < channels_; channel += count) {
      const int channels = min(channels_ - channel, count);
      const T removed = by_channel ? rule.mean * sum_over_taps(rule, channel, partial) : T(0);
      for (int tap = 0; tap < filter_.taps; tap += taps) {
        const int first = begin_of(channel, tap);
        const int numel = channels * min(filter_.taps - tap, taps);
        const Filters<Stored> tile{filter_.weight + first,
                                   filter_.grad + first,
                                   filter_.momentum ? filter_.momentum + first : nullptr,
                                   filter_.remainder ? filter_.remainder + first : nullptr,
                                   numel,
                                   numel,
                                   by_channel ? 1 : filter_.taps,
                                   (filter_.flags & ~kInPacks) | (tiles_in_packs ? kInPacks : 0)};
        const TilePlace place = is_strided ? TilePlace(channels, channels_) : TilePlace();
        InRegisters in_registers(tile, shared_, threads_, place);
        in_registers.arrange();
        if (inverse_scale != 0) in_registers.unscale_grad(inverse_scale, writes);
        in_registers.update(rule, removed, writes);
        // The next tile uses the same shared memory.
        __syncwarp();
      }
    }
  }

 private:
  __device__ __forceinline__ bool in_packs() const { return filter_.flags & kInPacks; }
  __device__ __forceinline__ bool channels_last() const { return filter_.flags & kChannelsLast; }

  template <int size>
  __device__ __forceinline__ Pack<T, size> load_weight(int i) const {
    Pack<T, size> weight = to_opmath(load_global<size>(filter_.weight + i));
    if constexpr (sizeof(Stored) == 2) {
      if (filter_.remainder) add_remainders(weight, load_global<size>(filter_.remainder + i));
    }
    return weight;
  }

  template <int size> __device__ __forceinline__ void add_products_of_packs(double (&totals)[kSums]) const {
#pragma unroll 4
    for (int64_t i = threads_.rank * size; i < filter_.numel; i += threads_.size * size) {
      T products[kSums] = {};
      add_products(products, load_weight<size>(i), load_global<size>(filter_.grad + i));
      for (int k = 0; k < kSums; ++k) totals[k] += products[k];
    }
  }

  __device__ __forceinline__ int begin_of(int channel, int tap) const {
    return channels_last() ? tap * channels_ + channel : channel * filter_.taps + tap;
  }

  // Of the gradients of V of one channel.
  __device__ __forceinline__ T sum_over_taps(const FilterRule<T>& rule, int channel,
                                             T* partial) const {
    double total = 0;
#pragma unroll 4
    for (int tap = threads_.rank; tap < filter_.taps; tap += threads_.size) {
      const int i = begin_of(channel, tap);
      total += direction_grads(rule, load_global<1>(filter_.grad + i), load_weight<1>(i)).values[0];
    }
    T sum[1] = {T(total)};
    // Until here, threads may be reading the sums before this one.
    threads_.sync();
    threads_.sum(sum, partial);
    return sum[0];
  }

  const Filters<Stored>& filter_;
  T* const shared_;
  const ThreadGroup& threads_;
  const int capacity_;
  const int channels_;
};

}  // namespace czm
