// As much of CUDA C++ as the kernels use, for a host compiler. Blocks run one after the other.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "blocks.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
// As much as any kernel asks for.
#define CZM_DYNAMIC_SHARED(name) alignas(16) static unsigned char name[1 << 17]
#define __builtin_assume(condition) static_cast<void>(0)

#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index())
#define gridDim (::cuda_host::grid_size())

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;

inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return static_cast<__nv_bfloat16>(x); }
inline __half __float2half(float x) { return static_cast<__half>(x); }

using std::max;
using std::min;

inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }

inline void __syncthreads() { cuda_host::wait_for_block(); }
inline void __barrier_sync_count(unsigned barrier, unsigned threads) {
  cuda_host::wait_for_threads(barrier, threads);
}
inline void __syncwarp() { cuda_host::wait_for_warp(); }

template <class T> T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_host::exchange(lanes, bits, distance);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T> T __shfl_sync(unsigned lanes, T value, int lane) {
  return __shfl_xor_sync(lanes, value, (int(threadIdx.x) ^ lane) & 31);
}
