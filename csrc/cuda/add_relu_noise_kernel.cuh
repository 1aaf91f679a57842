// relu((x + residual) * u) and its gradient, element by element, in packs.
#pragma once

#include "packed_types.cuh"

namespace czm {

constexpr int kElementwiseThreads = 256;

// Division by a number known to the host, exact for numerators below 2^31 (Granlund, Montgomery 1994).
struct Divider {
  uint32_t divisor;
  uint32_t inverse;
  uint32_t shift;

  explicit Divider(uint32_t divisor) : divisor(divisor), shift(0) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    inverse = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t quotient(uint32_t i) const {
    return (__umulhi(i, inverse) + i) >> shift;
  }
};

// For larger tensors.
struct WideDivider {
  int64_t divisor;

  explicit WideDivider(int64_t divisor) : divisor(divisor) {}

  __device__ __forceinline__ int64_t quotient(int64_t i) const { return i / divisor; }
};

// u of shape (samples, channels), as seen from the elements of a dense activation.
template <class T, class Division> struct Noise {
  const T* values;  // null for 1
  bool channels_last;
  int64_t channels;
  Division run;     // by the elements of a channel or, where channels_last, the channels
  Division sample;  // by the elements of a sample

  __device__ __forceinline__ T at(int64_t i) const {
    if (!values) return T(1);
    if (!channels_last) return values[run.quotient(i)];
    return values[sample.quotient(i) * channels + (i - int64_t(run.quotient(i)) * channels)];
  }
};

// Calls body(i, width) for the elements of this thread: packs of `size`, and what is left.
template <int size, class Body>
__device__ __forceinline__ void for_each_pack(int64_t count, const Body& body) {
  const int64_t i = (int64_t(blockIdx.x) * kElementwiseThreads + threadIdx.x) * size;
  if (i + size <= count) {
    body(i, std::integral_constant<int, size>());
  } else {
    for (int64_t j = i; j < count; ++j) body(j, std::integral_constant<int, 1>());
  }
}

template <int size, class Stored, class Division>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
add_relu_noise_kernel(Stored* output, const Stored* x, const Stored* residual,
                      const Noise<opmath_type<Stored>, Division> noise, int64_t count) {
  for_each_pack<size>(count, [&](int64_t i, auto pack_size) {
    constexpr int width = decltype(pack_size)::value;
    Pack<Stored, width> pack = load_pack<width>(x + i);
    Pack<Stored, width> added{};
    if (residual) added = load_pack<width>(residual + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      opmath_type<Stored> value = to_opmath(pack.values[j]);
      if (residual) value += to_opmath(added.values[j]);
      value *= noise.at(i + j);
      // NaN and -0 pass, as in torch.relu.
      pack.values[j] = from_opmath<Stored>(value < 0 ? opmath_type<Stored>(0) : value);
    }
    store_pack(output + i, pack);
  });
}

template <int size, class Stored, class Division>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
add_relu_noise_backward_kernel(Stored* grad_input, const Stored* grad, const Stored* output,
                               const Noise<opmath_type<Stored>, Division> noise, int64_t count) {
  for_each_pack<size>(count, [&](int64_t i, auto pack_size) {
    constexpr int width = decltype(pack_size)::value;
    Pack<Stored, width> pack = load_pack<width>(grad + i);
    const Pack<Stored, width> out = load_pack<width>(output + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const opmath_type<Stored> value = to_opmath(pack.values[j]) * noise.at(i + j);
      pack.values[j] =
          from_opmath<Stored>(to_opmath(out.values[j]) <= 0 ? opmath_type<Stored>(0) : value);
    }
    store_pack(grad_input + i, pack);
  });
}

// Calls launch(size, division) with the widest packs that the addresses, and the cheapest division that
// the count allows. `division` is made from a number.
template <class Stored, class Launch, class... Address>
void choose_elementwise(int64_t count, Launch&& launch, const Address*... addresses) {
  const auto with_division = [&](auto size) {
    if (count < (int64_t(1) << 31) - kElementwiseThreads * kWidest<Stored>) {
      launch(size, [](int64_t divisor) { return Divider(uint32_t(divisor)); });
    } else {
      launch(size, [](int64_t divisor) { return WideDivider(divisor); });
    }
  };
  if (are_aligned(addresses...)) {
    with_division(std::integral_constant<int, kWidest<Stored>>());
  } else {
    with_division(std::integral_constant<int, 1>());
  }
}

// The noise of an activation of `channels` and, for each of them, `area` elements in a sample.
template <class Stored, class MakeDivision>
auto noise_of(const opmath_type<Stored>* values, int64_t channels, int64_t area, bool channels_last,
              const MakeDivision& divide_by) {
  using Division = decltype(divide_by(1));
  return Noise<opmath_type<Stored>, Division>{values, channels_last, channels,
                                       divide_by(channels_last ? channels : area),
                                       divide_by(channels * area)};
}

template <int size> unsigned elementwise_blocks(int64_t count) {
  constexpr int64_t elements = int64_t(kElementwiseThreads) * size;
  return unsigned((count + elements - 1) / elements);
}

}  // namespace czm
