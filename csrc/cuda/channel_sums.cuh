// What CZMG removes, the means over taps, in shared memory.
#pragma once

#include "packed_types.cuh"
#include "thread_group.cuh"

namespace czm {

// Exact for numerators and divisors below 2^16.
struct SmallDivider {
  unsigned divisor;
  unsigned inverse;

  __device__ explicit SmallDivider(unsigned divisor)
      : divisor(divisor), inverse(0xffffffffu / divisor + 1) {}

  __device__ __forceinline__ int quotient(int i) const {
    return divisor == 1 ? i : int(__umulhi(unsigned(i), inverse));
  }
};

// Some channels of a filter, with all their taps, as they lie in shared memory: in the order of the
// filter, in one piece.
struct ChannelTile {
  int channels;
  int taps;
  bool channels_last;

  __device__ ChannelTile(int channels, int taps, bool channels_last)
      : channels(channels), taps(taps), channels_last(channels_last) {}

  // Takes `factor` times the sum over its channel's taps, formed in an order that never changes, from each
  // weight. The weights were written before this, and may be read after it, by any thread of the thread group.
  template <class T>
  __device__ __forceinline__ void remove_means(T* shared, T factor, const ThreadGroup& threads) const {
    threads.sync();
    const int channel_stride = channels_last ? 1 : taps;
    const int tap_stride = channels_last ? channels : 1;
    // As many neighbouring threads share a channel as there are threads to spare.
    int log_parts = 0;
    while (log_parts < kLogWarp && channels << (log_parts + 1) <= threads.size) ++log_parts;
    const int parts = 1 << log_parts;
    const int part = threads.rank & (parts - 1);
    // Every lane takes every turn, for the shuffles.
    for (int first = 0; first < channels << log_parts; first += threads.size) {
      const int number = (first + threads.rank) >> log_parts;
      const int begin = number < channels ? part : taps;
      T* const channel = shared + number * channel_stride;
      T sum = 0;
      for (int tap = begin; tap < taps; tap += parts) sum += channel[tap * tap_stride];
      for (int distance = parts / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      const T removed = factor * sum;
      for (int tap = begin; tap < taps; tap += parts) channel[tap * tap_stride] -= removed;
    }
    threads.sync();
  }
};

}  // namespace czm
