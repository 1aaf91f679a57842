// W[f] = exp(g[f]) * V[f] and its gradient, each in one pass over memory, a filter at a time.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../checks.h"
#include "../layout.h"

namespace czm {
namespace {

// A sum of products in a fixed order: lanes within a block, so that it vectorises, and blocks in
// double precision, so that the error does not grow with the length of the filter.
template <typename T>
CZM_VECTORISED double dot(const T* __restrict__ a, const T* __restrict__ b, int64_t count) {
  using A = opmath_type<T>;
  constexpr int64_t kLanes = 16;
  constexpr int64_t kBlock = 32 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(first + kBlock, count);
    A lanes[kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<A>(a[i + lane]) * static_cast<A>(b[i + lane]);
      }
    }
    for (int64_t lane = 0; i < end; ++i, ++lane) {
      lanes[lane] += static_cast<A>(a[i]) * static_cast<A>(b[i]);
    }
    for (const A lane : lanes) {
      total += lane;
    }
  }
  return total;
}

template <typename T>
CZM_VECTORISED void multiply(
    T* __restrict__ out, const T* __restrict__ in, opmath_type<T> factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<T>(factor * static_cast<opmath_type<T>>(in[i]));
  }
}

// Calls body(f, first, count) for every filter f, whose weights are [first, first + count).
template <typename Body>
void for_each_filter(const Tensor& direction, const Body& body) {
  const int64_t filters = direction.size(0);
  const int64_t count = filters == 0 ? 0 : direction.numel() / filters;
  const int64_t filters_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, count));
  torch::stable::parallel_for(0, filters, filters_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      body(f, f * count, count);
    }
  });
}

Tensor exp_scale(const Tensor& direction, const Tensor& log_scale) {
  const Tensor v = contiguous_or_channels_last(direction);
  const Tensor g = checked_log_scale(log_scale, direction);
  Tensor weight = torch::stable::empty_like(v);
  THO_DISPATCH_V2(
      direction.scalar_type(), "exp_scale", AT_WRAP([&] {
        using A = opmath_type<scalar_t>;
        const A* log_scales = g.const_data_ptr<A>();
        const scalar_t* directions = v.const_data_ptr<scalar_t>();
        scalar_t* weights = weight.mutable_data_ptr<scalar_t>();
        for_each_filter(v, [=](int64_t f, int64_t first, int64_t count) {
          multiply<scalar_t>(weights + first, directions + first, std::exp(log_scales[f]), count);
        });
      }),
      AT_EXPAND(AT_FLOATING_TYPES), ScalarType::BFloat16, ScalarType::Half);
  return weight;
}

std::tuple<Tensor, Tensor> exp_scale_backward(
    const Tensor& grad, const Tensor& direction, const Tensor& log_scale) {
  check_alike(direction, "direction", grad, "grad");
  const Tensor v = contiguous_or_channels_last(direction);
  const Tensor dw = to_layout_of(grad, v);
  const Tensor g = checked_log_scale(log_scale, direction);
  Tensor grad_direction = torch::stable::empty_like(v);
  Tensor grad_log_scale = torch::stable::empty_like(g);
  THO_DISPATCH_V2(
      direction.scalar_type(), "exp_scale_backward", AT_WRAP([&] {
        using A = opmath_type<scalar_t>;
        const A* log_scales = g.const_data_ptr<A>();
        const scalar_t* directions = v.const_data_ptr<scalar_t>();
        const scalar_t* grads = dw.const_data_ptr<scalar_t>();
        scalar_t* grad_directions = grad_direction.mutable_data_ptr<scalar_t>();
        A* grad_log_scales = grad_log_scale.mutable_data_ptr<A>();
        for_each_filter(v, [=](int64_t f, int64_t first, int64_t count) {
          const A scale = std::exp(log_scales[f]);
          multiply<scalar_t>(grad_directions + first, grads + first, scale, count);
          const double inner = dot<scalar_t>(grads + first, directions + first, count);
          grad_log_scales[f] = static_cast<A>(scale * inner);
        });
      }),
      AT_EXPAND(AT_FLOATING_TYPES), ScalarType::BFloat16, ScalarType::Half);
  return {grad_direction, as_type(grad_log_scale, log_scale.scalar_type())};
}

}  // namespace
}  // namespace czm

STABLE_TORCH_LIBRARY_IMPL(czm_fused, CPU, m) {
  m.impl("exp_scale_native", TORCH_BOX(&czm::exp_scale));
  m.impl("exp_scale_backward_native", TORCH_BOX(&czm::exp_scale_backward));
}
