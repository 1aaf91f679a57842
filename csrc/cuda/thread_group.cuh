// The threads of a block that work on one filter, and the sums they form.
#pragma once

namespace czm {

constexpr int kLogWarp = 5;
constexpr int kWarp = 1 << kLogWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int log2_of(int power_of_two) {
  return power_of_two == 1 ? 0 : 1 + log2_of(power_of_two / 2);
}

// A power of two of threads, from 1 to the whole block. The thread groups of one warp have one size and
// pass the same barriers; one of several warps has a barrier of its own.
struct ThreadGroup {
  int log_size;
  int size;
  int rank;  // of this thread in its thread group

  __device__ explicit ThreadGroup(int log_size)
      : log_size(log_size), size(1 << log_size), rank(int(threadIdx.x) & (size - 1)) {}

  // The number of this thread group among those of its warp.
  __device__ __forceinline__ int number_in_warp() const {
    return size < kWarp ? (int(threadIdx.x) & (kWarp - 1)) >> log_size : 0;
  }

  __device__ __forceinline__ void sync() const {
    if (size <= kWarp) {
      __syncwarp();
    } else {
      // By the number of its first pair of warps, which no other has.
      __barrier_sync_count(unsigned(int(threadIdx.x) - rank) / (2 * kWarp), unsigned(size));
    }
  }

  // Replaces each number by its sum over the thread group, formed in an order that never changes, and syncs:
  // what a thread read before, another may write after. `partial` is shared memory: `count` numbers for each
  // warp of the block, not to be used again before the next sync.
  template <int count, class T>
  __device__ __forceinline__ void sum(T (&numbers)[count], T* partial) const {
#pragma unroll
    for (int k = 0; k < count; ++k) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, numbers[k], distance);
        if (distance < size) numbers[k] += other;
      }
    }
    if (size <= kWarp) return sync();
    const int first_warp = (int(threadIdx.x) - rank) / kWarp;
    if (rank % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < count; ++k) partial[(first_warp + rank / kWarp) * count + k] = numbers[k];
    }
    sync();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      numbers[k] = partial[first_warp * count + k];
      for (int warp = 1; warp < size / kWarp; ++warp) {
        numbers[k] += partial[(first_warp + warp) * count + k];
      }
    }
  }
};

}  // namespace czm
