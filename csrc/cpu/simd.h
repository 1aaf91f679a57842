// Vectors of the instruction set that the including file selects, and the few moves the step needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../arithmetic.h"

#ifndef CZM_VECTOR_BYTES
#define CZM_VECTOR_BYTES 16
#endif

namespace czm {
inline namespace CZM_ARCH {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class opmath_t> struct VectorOf {
  typedef opmath_t type __attribute__((vector_size(CZM_VECTOR_BYTES)));
  static constexpr int lanes = CZM_VECTOR_BYTES / sizeof(opmath_t);
};
template <class opmath_t> using Vector = typename VectorOf<opmath_t>::type;
template <class opmath_t> constexpr int kLanes = VectorOf<opmath_t>::lanes;

using VectorF = Vector<float>;
using VectorD = Vector<double>;

inline VectorF multiply_add(VectorF a, VectorF b, VectorF c) {
#if CZM_VECTOR_BYTES == 64
  return (VectorF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif CZM_VECTOR_BYTES == 32
  return (VectorF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (VectorF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline VectorD multiply_add(VectorD a, VectorD b, VectorD c) {
#if CZM_VECTOR_BYTES == 64
  return (VectorD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif CZM_VECTOR_BYTES == 32
  return (VectorD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (VectorD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

inline VectorF broadcast(float x) { return VectorF{} + x; }
inline VectorD broadcast(double x) { return VectorD{} + x; }

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_opmath(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into place and rebiased by a product, which also makes subnormal halves right.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void from_opmath(float x, Float16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds beyond 65504
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds to the last half bit
    const float rounded = bits_to_float(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (float_to_bits(rounded) - 0x3f000000u));
  } else {
    const uint32_t rebiased = magnitude - 0x38000000u;
    out.bits = uint16_t(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13));
  }
}

template <class V> inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V> inline void store_as(void* p, V v) { std::memcpy(p, &v, sizeof v); }

inline VectorF load(const float* p) { return load_as<VectorF>(p); }
inline VectorD load(const double* p) { return load_as<VectorD>(p); }
inline void store(float* p, VectorF v) { store_as(p, v); }
inline void store(double* p, VectorD v) { store_as(p, v); }

typedef uint16_t Half16s __attribute__((vector_size(CZM_VECTOR_BYTES / 2)));
typedef uint32_t Bits32s __attribute__((vector_size(CZM_VECTOR_BYTES)));

inline VectorF widen(Half16s bits, BFloat16) {
  return (VectorF)(__builtin_convertvector(bits, Bits32s) << 16);
}

inline Half16s narrow(VectorF v, BFloat16) {
  const Bits32s bits = (Bits32s)v;
  const Bits32s rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32s is_nan = (Bits32s)((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits32s chosen = (is_nan & 0x7fc0u) | (~is_nan & rounded);
  return __builtin_convertvector(chosen, Half16s);
}

inline VectorF widen(Half16s bits, Float16) {
#if CZM_VECTOR_BYTES == 64
  return (VectorF)_mm512_cvtph_ps((__m256i)bits);
#elif CZM_VECTOR_BYTES == 32
  return (VectorF)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  return (VectorF)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)bits));
#else
  VectorF v;
  for (int i = 0; i < 4; ++i) v[i] = to_opmath(Float16{bits[i]});
  return v;
#endif
}

inline Half16s narrow(VectorF v, Float16) {
#if CZM_VECTOR_BYTES == 64
  return (Half16s)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif CZM_VECTOR_BYTES == 32
  return (Half16s)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Half16s)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
#else
  Half16s bits;
  for (int i = 0; i < 4; ++i) {
    Float16 half;
    from_opmath(v[i], half);
    bits[i] = half.bits;
  }
  return bits;
#endif
}

template <class Half> inline VectorF load(const Half* p) { return widen(load_as<Half16s>(p), Half{}); }
template <class Half> inline void store(Half* p, VectorF v) { store_as(p, narrow(v, Half{})); }

// The first `count` lanes; the others are zero, and their memory is neither read nor written.
#if CZM_VECTOR_BYTES == 64
inline uint32_t first_lanes(int64_t count) { return (1u << count) - 1; }

inline VectorF load_first(const float* p, int64_t count) {
  return (VectorF)_mm512_maskz_loadu_ps(__mmask16(first_lanes(count)), p);
}
inline VectorD load_first(const double* p, int64_t count) {
  return (VectorD)_mm512_maskz_loadu_pd(__mmask8(first_lanes(count)), p);
}
inline Half16s load_first_halves(const void* p, int64_t count) {
  return (Half16s)_mm256_maskz_loadu_epi16(__mmask16(first_lanes(count)), p);
}
inline void store_first(float* p, VectorF v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16(first_lanes(count)), (__m512)v);
}
inline void store_first(double* p, VectorD v, int64_t count) {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(count)), (__m512d)v);
}
inline void store_first_halves(void* p, Half16s v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16(first_lanes(count)), (__m256i)v);
}
#else
template <class V, class Element> inline V load_each(const Element* p, int64_t count) {
  V v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
template <class V, class Element> inline void store_each(Element* p, V v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
#if CZM_VECTOR_BYTES == 32
inline __m256i first_lanes(float, int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes(double, int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline VectorF load_first(const float* p, int64_t count) {
  return (VectorF)_mm256_maskload_ps(p, first_lanes(float(), count));
}
inline VectorD load_first(const double* p, int64_t count) {
  return (VectorD)_mm256_maskload_pd(p, first_lanes(double(), count));
}
inline void store_first(float* p, VectorF v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(float(), count), (__m256)v);
}
inline void store_first(double* p, VectorD v, int64_t count) {
  _mm256_maskstore_pd(p, first_lanes(double(), count), (__m256d)v);
}
#else
inline VectorF load_first(const float* p, int64_t count) { return load_each<VectorF>(p, count); }
inline VectorD load_first(const double* p, int64_t count) { return load_each<VectorD>(p, count); }
inline void store_first(float* p, VectorF v, int64_t count) { store_each(p, v, count); }
inline void store_first(double* p, VectorD v, int64_t count) { store_each(p, v, count); }
#endif
inline Half16s load_first_halves(const void* p, int64_t count) {
  return load_each<Half16s>(static_cast<const uint16_t*>(p), count);
}
inline void store_first_halves(void* p, Half16s v, int64_t count) {
  store_each(static_cast<uint16_t*>(p), v, count);
}
#endif

template <class Half> inline VectorF load_first(const Half* p, int64_t count) {
  return widen(load_first_halves(p, count), Half{});
}
template <class Half> inline void store_first(Half* p, VectorF v, int64_t count) {
  store_first_halves(p, narrow(v, Half{}), count);
}

typedef int16_t Int16s __attribute__((vector_size(CZM_VECTOR_BYTES / 2)));
typedef int32_t Int32s __attribute__((vector_size(CZM_VECTOR_BYTES)));

// As in param_remainder.h.
inline VectorF add_remainders(VectorF param, Half16s remainders) {
  const Int32s apart = __builtin_convertvector((Int16s)remainders, Int32s);
  return (VectorF)((Int32s)param + (apart & ~((param == VectorF{}) & (apart < 0))));
}

inline Half16s remainders_of(VectorF weight, VectorF param) {
  Int32s apart = (Int32s)((Bits32s)weight - (Bits32s)param);
  const Int32s above = apart > INT16_MAX, below = apart < INT16_MIN;
  apart = (above & INT16_MAX) | (below & INT16_MIN) | (~(above | below) & apart);
  return (Half16s)__builtin_convertvector(apart, Int16s);
}

// Halves are added until one lane is left: the same order of additions for every instruction set.
template <class opmath_t, int lanes = kLanes<opmath_t>, class V> inline opmath_t sum_lanes(V v) {
  if constexpr (lanes == 2) {
    return v[0] + v[1];
  } else {
    typedef opmath_t Half __attribute__((vector_size(sizeof(opmath_t) * lanes / 2)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_lanes<opmath_t, lanes / 2>(Half(low + high));
  }
}

// Lane i of the result is lane Index::at(i) of a followed by b.
template <class opmath_t> struct IntOf { using type = int32_t; };
template <> struct IntOf<double> { using type = int64_t; };

template <class opmath_t, class Index, size_t... lane>
inline Vector<opmath_t> permute(Vector<opmath_t> a, Vector<opmath_t> b, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::at(lane)...);
#else
  typedef Vector<typename IntOf<opmath_t>::type> Mask;
  return __builtin_shuffle(a, b, Mask{Index::at(lane)...});
#endif
}

template <class opmath_t, class Index> inline Vector<opmath_t> permute(Vector<opmath_t> a, Vector<opmath_t> b) {
  return permute<opmath_t, Index>(a, b, std::make_index_sequence<kLanes<opmath_t>>{});
}

// Picks every third number, from the offset-th on, of three vectors: two vectors first, then the third.
template <int lanes, int offset> struct EveryThirdOfTwo {
  static constexpr int at(int i) { return 3 * i + offset < 2 * lanes ? 3 * i + offset : 0; }
};
template <int lanes, int offset> struct EveryThirdOfThird {
  static constexpr int at(int i) {
    return 3 * i + offset < 2 * lanes ? i : 3 * i + offset - lanes;
  }
};

template <class opmath_t, int offset>
inline Vector<opmath_t> every_third(Vector<opmath_t> a, Vector<opmath_t> b, Vector<opmath_t> c) {
  constexpr int lanes = kLanes<opmath_t>;
  return permute<opmath_t, EveryThirdOfThird<lanes, offset>>(
      permute<opmath_t, EveryThirdOfTwo<lanes, offset>>(a, b), c);
}

// Sums of 3, of three vectors' consecutive numbers: one vector.
template <class opmath_t>
inline Vector<opmath_t> sum_threes(Vector<opmath_t> a, Vector<opmath_t> b, Vector<opmath_t> c) {
  return every_third<opmath_t, 0>(a, b, c) + every_third<opmath_t, 1>(a, b, c) +
         every_third<opmath_t, 2>(a, b, c);
}

// Sums of `taps` (a power of three) consecutive numbers of `taps` vectors: one vector.
template <class opmath_t, int taps> struct TapSums {
  static Vector<opmath_t> of(const Vector<opmath_t>* v) {
    constexpr int third = taps / 3;
    return sum_threes<opmath_t>(TapSums<opmath_t, third>::of(v), TapSums<opmath_t, third>::of(v + third),
                            TapSums<opmath_t, third>::of(v + 2 * third));
  }
};
template <class opmath_t> struct TapSums<opmath_t, 1> {
  static Vector<opmath_t> of(const Vector<opmath_t>* v) { return *v; }
};

// The inverse move: block `number` of `taps` vectors in which each lane of v stands `taps` times.
template <int lanes, int taps, int number> struct RepeatedLane {
  static constexpr int at(int i) { return (number * lanes + i) / taps; }
};

}  // namespace CZM_ARCH
}  // namespace czm
