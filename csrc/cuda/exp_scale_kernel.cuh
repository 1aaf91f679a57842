// W[f] = exp(g[f]) * V[f] and its gradient, a block a filter.
#pragma once

#include <cmath>

#include "packed_types.cuh"
#include "thread_group.cuh"

// The tests run the kernels with smaller blocks.
#ifndef CZM_FILTER_THREADS
#define CZM_FILTER_THREADS 128
#endif

namespace czm {

constexpr int kFilterThreads = CZM_FILTER_THREADS;

template <int size, class Stored>
__global__ void __launch_bounds__(kFilterThreads)
exp_scale_kernel(Stored* weight, const Stored* direction, const opmath_type<Stored>* log_scale,
                 int64_t filter_numel) {
  const opmath_type<Stored> scale = std::exp(log_scale[blockIdx.x]);
  const int64_t first = blockIdx.x * filter_numel;
  for (int64_t i = int64_t(threadIdx.x) * size; i < filter_numel; i += kFilterThreads * size) {
    store_pack(weight + first + i, scaled(scale, load_pack<size>(direction + first + i)));
  }
}

template <int size, class Stored>
__global__ void __launch_bounds__(kFilterThreads)
exp_scale_backward_kernel(Stored* grad_direction, opmath_type<Stored>* grad_log_scale, const Stored* grad,
                          const Stored* direction, const opmath_type<Stored>* log_scale,
                          int64_t filter_numel) {
  __shared__ double partial[kFilterThreads / kWarp];
  const opmath_type<Stored> scale = std::exp(log_scale[blockIdx.x]);
  const int64_t first = blockIdx.x * filter_numel;
  double inner[] = {0};
  for (int64_t i = int64_t(threadIdx.x) * size; i < filter_numel; i += kFilterThreads * size) {
    const Pack<Stored, size> dw = load_pack<size>(grad + first + i);
    const Pack<Stored, size> v = load_pack<size>(direction + first + i);
    store_pack(grad_direction + first + i, scaled(scale, dw));
    opmath_type<Stored> sum = 0;
#pragma unroll
    for (int j = 0; j < size; ++j) sum += to_opmath(dw.values[j]) * to_opmath(v.values[j]);
    inner[0] += sum;
  }
  ThreadGroup(log2_of(kFilterThreads)).sum(inner, partial);
  if (threadIdx.x == 0) grad_log_scale[blockIdx.x] = opmath_type<Stored>(scale * inner[0]);
}

// Calls launch(size) with the widest packs in which every filter can be moved.
template <class Stored, class Launch, class... Address>
void choose_filter_packs(int64_t filter_numel, Launch&& launch, const Address*... addresses) {
  if (are_aligned(addresses...) && filter_numel % kWidest<Stored> == 0) {
    launch(std::integral_constant<int, kWidest<Stored>>());
  } else {
    launch(std::integral_constant<int, 1>());
  }
}

}  // namespace czm
