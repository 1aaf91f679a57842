// The stored types of a CUDA device: their arithmetic, and moves of up to 128 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../arithmetic.h"

namespace czm {

__device__ __forceinline__ float to_opmath(float x) { return x; }
__device__ __forceinline__ double to_opmath(double x) { return x; }
__device__ __forceinline__ float to_opmath(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_opmath(__half x) { return __half2float(x); }

template <class Stored> __device__ __forceinline__ Stored from_opmath(opmath_type<Stored> x) {
  if constexpr (std::is_same_v<Stored, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<Stored, __half>) {
    return __float2half(x);
  } else {
    return x;
  }
}

// What one instruction loads or stores.
template <class T, int size> struct alignas(size * sizeof(T)) Pack {
  T values[size];
};

template <class Stored, int size>
__device__ __forceinline__ Pack<Stored, size> scaled(opmath_type<Stored> scale,
                                                     const Pack<Stored, size>& pack) {
  Pack<Stored, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    result.values[j] = from_opmath<Stored>(scale * to_opmath(pack.values[j]));
  }
  return result;
}

constexpr int kWidestPackBytes = 16;
template <class T> constexpr int kWidest = kWidestPackBytes / int(sizeof(T));

template <class... T> __host__ __device__ __forceinline__ bool are_aligned(const T*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) | ...) % kWidestPackBytes) == 0;
}

template <int size, class T> __device__ __forceinline__ Pack<T, size> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, size>*>(from);
}

template <int size, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, size>& pack) {
  *reinterpret_cast<Pack<T, size>*>(to) = pack;
}

// A pointer into global memory, which the compiler cannot tell from one into shared memory.
template <class T> __device__ __forceinline__ T* in_global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

template <class T> __device__ __forceinline__ T* global_address(int64_t address) {
  return in_global(reinterpret_cast<T*>(address));
}

template <int size, class T> __device__ __forceinline__ Pack<T, size> load_global(const T* from) {
  return load_pack<size>(in_global(from));
}

template <int size, class T>
__device__ __forceinline__ void store_global(T* to, const Pack<T, size>& pack) {
  store_pack(in_global(to), pack);
}

}  // namespace czm
