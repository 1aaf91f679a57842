// What the step does to the packs of a filter.
#pragma once

#include "../param_remainder.h"
#include "../update_rule.h"
#include "packed_types.cuh"

namespace czm {

template <class Stored, int size>
__device__ __forceinline__ Pack<opmath_type<Stored>, size> to_opmath(const Pack<Stored, size>& pack) {
  Pack<opmath_type<Stored>, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) result.values[j] = to_opmath(pack.values[j]);
  return result;
}

template <class Stored, int size>
__device__ __forceinline__ Pack<Stored, size> from_opmath(const Pack<opmath_type<Stored>, size>& pack) {
  Pack<Stored, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) result.values[j] = from_opmath<Stored>(pack.values[j]);
  return result;
}

template <int size>
__device__ __forceinline__ void add_remainders(Pack<float, size>& weight,
                                               const Pack<int16_t, size>& remainder) {
#pragma unroll
  for (int j = 0; j < size; ++j) {
    weight.values[j] = add_remainder(weight.values[j], remainder.values[j]);
  }
}

template <class Stored, int size>
__device__ __forceinline__ Pack<int16_t, size> remainders_of(const Pack<float, size>& weight,
                                                             const Pack<Stored, size>& param) {
  Pack<int16_t, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    result.values[j] = remainder_of(weight.values[j], to_opmath(param.values[j]));
  }
  return result;
}

template <class Stored, int size>
__device__ __forceinline__ Pack<opmath_type<Stored>, size> direction_grads(
    const FilterRule<opmath_type<Stored>>& rule, const Pack<Stored, size>& grad,
    const Pack<opmath_type<Stored>, size>& weight) {
  Pack<opmath_type<Stored>, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    result.values[j] =
        direction_grad<opmath_type<Stored>>(rule, to_opmath(grad.values[j]), weight.values[j]);
  }
  return result;
}

template <class T, int size>
__device__ __forceinline__ void store_shared(T* to, const Pack<T, size>& pack) {
  constexpr int width = size < kWidest<T> ? size : kWidest<T>;
#pragma unroll
  for (int j = 0; j < size; j += width) {
    Pack<T, width> part;
#pragma unroll
    for (int i = 0; i < width; ++i) part.values[i] = pack.values[j + i];
    store_pack(to + j, part);
  }
}

template <int size, class T> __device__ __forceinline__ Pack<T, size> load_shared(const T* from) {
  constexpr int width = size < kWidest<T> ? size : kWidest<T>;
  Pack<T, size> pack;
#pragma unroll
  for (int j = 0; j < size; j += width) {
    const Pack<T, width> part = load_pack<width>(from + j);
#pragma unroll
    for (int i = 0; i < width; ++i) pack.values[j + i] = part.values[i];
  }
  return pack;
}

// <W, W>, <dW, W> and <dW, dW>.
constexpr int kSums = 3;

template <class Stored, int size>
__device__ __forceinline__ void add_products(opmath_type<Stored> (&sums)[kSums],
                                             const Pack<opmath_type<Stored>, size>& weight,
                                             const Pack<Stored, size>& grad) {
#pragma unroll
  for (int j = 0; j < size; ++j) {
    const opmath_type<Stored> w = weight.values[j], dw = to_opmath(grad.values[j]);
    sums[0] = multiply_add(w, w, sums[0]);
    sums[1] = multiply_add(dw, w, sums[1]);
    sums[2] = multiply_add(dw, dw, sums[2]);
  }
}

// `direction` is the gradient of V after CZMG.
template <class Stored, int size>
__device__ __forceinline__ void update_pack(const FilterRule<opmath_type<Stored>>& rule,
                                            Pack<opmath_type<Stored>, size>& weight,
                                            const Pack<opmath_type<Stored>, size>& direction,
                                            Pack<Stored, size>& momentum) {
  using T = opmath_type<Stored>;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    T m = to_opmath(momentum.values[j]);
    update_weight<T>(rule, direction.values[j], T(0), weight.values[j], m);
    momentum.values[j] = from_opmath<Stored>(m);
  }
}

}  // namespace czm
