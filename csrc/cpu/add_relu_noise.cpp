// relu(x + residual) * u and its gradient, each in one pass over memory.
//
// u > 0, so the sign of the output is the mask of the ReLU, and relu((x + residual) * u) is the
// same number. Every output element depends on its own inputs alone: the same bits on any number
// of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "../layout.h"

namespace czm {
namespace {

// The noise of shape (samples, channels), as seen from the elements of a dense activation.
template <typename A>
struct Noise {
  const A* values;  // null: no noise
  int64_t channels;
  int64_t area;        // elements of one sample and channel
  bool channels_last;  // channels are neighbours in memory

  // Calls body(first, count, u) for consecutive runs of elements that cover [begin, end);
  // u(j) is the factor of element first + j.
  template <typename Body>
  void for_each_run(int64_t begin, int64_t end, const Body& body) const {
    if (values == nullptr) {
      body(begin, end - begin, [](int64_t) { return A(1); });
      return;
    }
    const int64_t length = channels_last ? channels : area;
    int64_t index = begin / length;
    int64_t offset = begin % length;
    for (int64_t first = begin; first < end; ++index, offset = 0) {
      const int64_t count = std::min(length - offset, end - first);
      if (channels_last) {
        const A* u = values + index / area * channels + offset;
        body(first, count, [u](int64_t j) { return u[j]; });
      } else {
        const A u = values[index];
        body(first, count, [u](int64_t) { return u; });
      }
      first += count;
    }
  }
};

template <typename T>
CZM_VECTORISED void forward_range(
    T* output, const T* x, const T* residual, const Noise<opmath_type<T>>& noise, int64_t begin,
    int64_t end) {
  using A = opmath_type<T>;
  noise.for_each_run(begin, end, [=](int64_t first, int64_t count, auto u) {
    T* __restrict__ out = output + first;
    const T* __restrict__ a = x + first;
    // NaN and -0 pass, as in torch.relu.
    const auto relu = [](A value) { return static_cast<T>(value < A(0) ? A(0) : value); };
    if (residual == nullptr) {
      for (int64_t j = 0; j < count; ++j) {
        out[j] = relu(static_cast<A>(a[j]) * u(j));
      }
    } else {
      const T* __restrict__ b = residual + first;
      for (int64_t j = 0; j < count; ++j) {
        out[j] = relu((static_cast<A>(a[j]) + static_cast<A>(b[j])) * u(j));
      }
    }
  });
}

template <typename T>
CZM_VECTORISED void backward_range(
    T* grad_input, const T* grad, const T* output, const Noise<opmath_type<T>>& noise,
    int64_t begin, int64_t end) {
  using A = opmath_type<T>;
  noise.for_each_run(begin, end, [=](int64_t first, int64_t count, auto u) {
    T* __restrict__ result = grad_input + first;
    const T* __restrict__ g = grad + first;
    const T* __restrict__ out = output + first;
    for (int64_t j = 0; j < count; ++j) {
      const A value = static_cast<A>(g[j]) * u(j);
      result[j] = static_cast<T>(static_cast<A>(out[j]) <= A(0) ? A(0) : value);
    }
  });
}

// `activation` is dense, `noise` contiguous.
template <typename A>
Noise<A> noise_of(const std::optional<Tensor>& noise, const Tensor& activation) {
  int64_t area = 1;
  for (int64_t d = 2; d < activation.dim(); ++d) {
    area *= activation.size(d);
  }
  return {
      noise ? noise->const_data_ptr<A>() : nullptr, activation.size(1), area,
      area == 1 || !activation.is_contiguous()};
}

Tensor add_relu_noise(
    const Tensor& x, std::optional<Tensor> residual, const std::optional<Tensor>& noise) {
  check_activation(x, "x");
  const Tensor dense_x = contiguous_or_channels_last(x);
  if (residual) {
    check_alike(x, "x", *residual, "residual");
    residual = to_layout_of(*residual, dense_x);
  }
  const std::optional<Tensor> u = checked_noise(noise, x);
  Tensor output = torch::stable::empty_like(dense_x);
  THO_DISPATCH_V2(
      x.scalar_type(), "add_relu_noise", AT_WRAP([&] {
        const auto factors = noise_of<opmath_type<scalar_t>>(u, dense_x);
        scalar_t* out = output.mutable_data_ptr<scalar_t>();
        const scalar_t* a = dense_x.const_data_ptr<scalar_t>();
        const scalar_t* b = residual ? residual->const_data_ptr<scalar_t>() : nullptr;
        torch::stable::parallel_for(
            0, x.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
              forward_range<scalar_t>(out, a, b, factors, begin, end);
            });
      }),
      AT_EXPAND(AT_FLOATING_TYPES), ScalarType::BFloat16, ScalarType::Half);
  return output;
}

Tensor add_relu_noise_backward(
    const Tensor& grad, const Tensor& output, const std::optional<Tensor>& noise) {
  check_activation(output, "output");
  check_alike(output, "output", grad, "grad");
  const Tensor dense_output = contiguous_or_channels_last(output);
  const Tensor dense_grad = to_layout_of(grad, dense_output);
  const std::optional<Tensor> u = checked_noise(noise, output);
  Tensor grad_input = torch::stable::empty_like(dense_output);
  THO_DISPATCH_V2(
      output.scalar_type(), "add_relu_noise_backward", AT_WRAP([&] {
        const auto factors = noise_of<opmath_type<scalar_t>>(u, dense_output);
        scalar_t* result = grad_input.mutable_data_ptr<scalar_t>();
        const scalar_t* g = dense_grad.const_data_ptr<scalar_t>();
        const scalar_t* out = dense_output.const_data_ptr<scalar_t>();
        torch::stable::parallel_for(
            0, output.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
              backward_range<scalar_t>(result, g, out, factors, begin, end);
            });
      }),
      AT_EXPAND(AT_FLOATING_TYPES), ScalarType::BFloat16, ScalarType::Half);
  return grad_input;
}

}  // namespace
}  // namespace czm

STABLE_TORCH_LIBRARY_IMPL(czm_fused, CPU, m) {
  m.impl("add_relu_noise_native", TORCH_BOX(&czm::add_relu_noise));
  m.impl("add_relu_noise_backward_native", TORCH_BOX(&czm::add_relu_noise_backward));
}
