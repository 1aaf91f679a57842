// What host and device, every instruction set and every backend agree on about rounding.
#pragma once

#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define CZM_INLINE __host__ __device__ __forceinline__
#else
#define CZM_INLINE inline
#endif

// Each instruction set compiles its own copy, so that the linker never mixes them.
#ifndef CZM_ARCH
#define CZM_ARCH generic
#endif

namespace czm {
inline namespace CZM_ARCH {

// The type of the arithmetic on a stored type: half types are computed in float and rounded once.
template <class Stored>
using opmath_type = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

template <class opmath_t> constexpr opmath_t kLargest = std::numeric_limits<opmath_t>::max();
template <class opmath_t> constexpr opmath_t kSmallestNormal = std::numeric_limits<opmath_t>::min();

// Fused explicitly, and only here, so that every backend rounds where torch.optim.SGD rounds.
CZM_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(CZM_HAS_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

CZM_INLINE double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#elif defined(CZM_HAS_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace CZM_ARCH
}  // namespace czm
