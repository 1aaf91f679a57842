// The threads of a block that work on one filter, and the sums they form.
#pragma once

namespace czm {

constexpr int kLogWarp = 5;
constexpr int kWarp = 1 << kLogWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// `size` threads, a power of two and at least a warp. All thread groups of a block have one size and pass
// the same barriers.
struct ThreadGroup {
  int size;
  int rank;  // of this thread in its thread group

  __device__ explicit ThreadGroup(int size) : size(size), rank(int(threadIdx.x) & (size - 1)) {}

  // The number of this thread group in its block.
  __device__ __forceinline__ int number() const { return int(threadIdx.x) / size; }

  __device__ __forceinline__ void sync() const {
    if (size == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Replaces each number by its sum over the thread group, formed in an order that never changes. `partial`
  // is shared memory: `count` numbers for each warp of the block, not to be used again before sync().
  template <int count, class T>
  __device__ __forceinline__ void sum(T (&numbers)[count], T* partial) const {
    const int first_warp = (int(threadIdx.x) - rank) / kWarp;
#pragma unroll
    for (int k = 0; k < count; ++k) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        numbers[k] += __shfl_xor_sync(kAllLanes, numbers[k], distance);
      }
      if (rank % kWarp == 0) partial[(first_warp + rank / kWarp) * count + k] = numbers[k];
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
