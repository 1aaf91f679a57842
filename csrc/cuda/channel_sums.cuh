// The sums over taps that CZMG needs, formed in shared memory.
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
  SmallDivider divider;  // by the taps of a channel or, where channels_last, the channels of a tap

  __device__ ChannelTile(int channels, int taps, bool channels_last)
      : channels(channels),
        taps(taps),
        channels_last(channels_last),
        divider(channels_last && channels ? channels : taps) {}

  __device__ __forceinline__ int weights() const { return channels * taps; }

  // Where the sum over the taps of weight i's channel is: in the place of its first tap.
  __device__ __forceinline__ int place_of_sum(int i) const {
    const int run = divider.quotient(i);
    return channels_last ? i - run * channels : run * taps;
  }

  // Replaces the first tap of each channel by the sum over all, in an order that never changes.
  // The weights were written before this, and may be read after it, by any thread of the thread group.
  template <class T> __device__ __forceinline__ void sum_over_taps(T* shared, const ThreadGroup& threads) const {
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
      T* const channel = shared + number * channel_stride;
      T sum = 0;
      if (number < channels) {
        for (int tap = part; tap < taps; tap += parts) sum += channel[tap * tap_stride];
      }
      for (int distance = parts / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      if (number < channels && part == 0) *channel = sum;
    }
    threads.sync();
  }
};

}  // namespace czm
