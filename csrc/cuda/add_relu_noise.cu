// czm_fused::add_relu_noise and its gradient on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "../layout.h"
#include "add_relu_noise_kernel.cuh"
#include "launch_utils.h"

namespace czm {
namespace {

// Calls launch(size, noise) for a dense activation that has elements.
template <class Stored, class Launch, class... Address>
void for_noise(const std::optional<Tensor>& u, const Tensor& activation, const Launch& launch,
               const Address*... addresses) {
  const int64_t count = activation.numel(), channels = activation.size(1);
  const int64_t area = count / (activation.size(0) * channels);
  choose_elementwise<Stored>(
      count,
      [&](auto size, auto divide_by) {
        launch(size, noise_of<Stored>(u ? elements<opmath_type<Stored>>(*u) : nullptr, channels, area,
                                      area == 1 || !activation.is_contiguous(), divide_by));
      },
      addresses...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor add_relu_noise(const Tensor& x, std::optional<Tensor> residual,
                      const std::optional<Tensor>& noise) {
  check_activation(x, "x");
  const auto guard = on_device_of(x);
  const Tensor dense_x = contiguous_or_channels_last(x);
  if (residual) {
    check_alike(x, "x", *residual, "residual");
    residual = to_layout_of(*residual, dense_x);
  }
  const std::optional<Tensor> u = checked_noise(noise, x);
  Tensor output = torch::stable::empty_like(dense_x);
  const int64_t count = x.numel();
  if (count == 0) return output;
  for_dtype_of(x, "x", [&](auto zero) {
    using Stored = decltype(zero);
    Stored* const out = mutable_elements<Stored>(output);
    const Stored* const a = elements<Stored>(dense_x);
    const Stored* const b = residual ? elements<Stored>(*residual) : nullptr;
    for_noise<Stored>(
        u, dense_x,
        [&](auto size, const auto& factors) {
          add_relu_noise_kernel<size>
              <<<elementwise_blocks<size>(count), kElementwiseThreads, 0, current_stream(x)>>>(
                  out, a, b, factors, count);
        },
        out, a, b);
  });
  return output;
}

Tensor add_relu_noise_backward(const Tensor& grad, const Tensor& output,
                               const std::optional<Tensor>& noise) {
  check_activation(output, "output");
  check_alike(output, "output", grad, "grad");
  const auto guard = on_device_of(output);
  const Tensor dense_output = contiguous_or_channels_last(output);
  const Tensor dense_grad = to_layout_of(grad, dense_output);
  const std::optional<Tensor> u = checked_noise(noise, output);
  Tensor grad_input = torch::stable::empty_like(dense_output);
  const int64_t count = output.numel();
  if (count == 0) return grad_input;
  for_dtype_of(output, "output", [&](auto zero) {
    using Stored = decltype(zero);
    Stored* const result = mutable_elements<Stored>(grad_input);
    const Stored* const g = elements<Stored>(dense_grad);
    const Stored* const out = elements<Stored>(dense_output);
    for_noise<Stored>(
        u, dense_output,
        [&](auto size, const auto& factors) {
          add_relu_noise_backward_kernel<size>
              <<<elementwise_blocks<size>(count), kElementwiseThreads, 0, current_stream(output)>>>(
                  result, g, out, factors, count);
        },
        result, g, out);
  });
  return grad_input;
}

}  // namespace
}  // namespace czm

STABLE_TORCH_LIBRARY_IMPL(czm_fused, CUDA, m) {
  m.impl("add_relu_noise_native", TORCH_BOX(&czm::add_relu_noise));
  m.impl("add_relu_noise_backward_native", TORCH_BOX(&czm::add_relu_noise_backward));
}
