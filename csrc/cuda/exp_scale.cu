// czm_fused::exp_scale and its gradient on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../checks.h"
#include "../layout.h"
#include "exp_scale_kernel.cuh"
#include "launch_utils.h"

namespace czm {
namespace {

Tensor exp_scale(const Tensor& direction, const Tensor& log_scale) {
  const auto guard = on_device_of(direction);
  const Tensor v = contiguous_or_channels_last(direction);
  const Tensor g = checked_log_scale(log_scale, direction);
  Tensor weight = torch::stable::empty_like(v);
  if (v.numel() == 0) return weight;
  const int64_t filters = v.size(0), filter_numel = v.numel() / filters;
  for_dtype_of(v, "direction", [&](auto zero) {
    using Stored = decltype(zero);
    Stored* const out = mutable_elements<Stored>(weight);
    const Stored* const in = elements<Stored>(v);
    choose_filter_packs<Stored>(
        filter_numel,
        [&](auto size) {
          exp_scale_kernel<size><<<unsigned(filters), kFilterThreads, 0, current_stream(v)>>>(
              out, in, elements<opmath_type<Stored>>(g), filter_numel);
        },
        out, in);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return weight;
}

std::tuple<Tensor, Tensor> exp_scale_backward(const Tensor& grad, const Tensor& direction,
                                              const Tensor& log_scale) {
  check_alike(direction, "direction", grad, "grad");
  const auto guard = on_device_of(direction);
  const Tensor v = contiguous_or_channels_last(direction);
  const Tensor dw = to_layout_of(grad, v);
  const Tensor g = checked_log_scale(log_scale, direction);
  Tensor grad_direction = torch::stable::empty_like(v);
  Tensor grad_log_scale = torch::stable::empty_like(g);
  const int64_t filters = v.size(0), filter_numel = filters == 0 ? 0 : v.numel() / filters;
  if (filters > 0) {
    for_dtype_of(v, "direction", [&](auto zero) {
      using Stored = decltype(zero);
      Stored* const out = mutable_elements<Stored>(grad_direction);
      const Stored* const gradient = elements<Stored>(dw);
      const Stored* const in = elements<Stored>(v);
      choose_filter_packs<Stored>(
          filter_numel,
          [&](auto size) {
            exp_scale_backward_kernel<size>
                <<<unsigned(filters), kFilterThreads, 0, current_stream(v)>>>(
                    out, mutable_elements<opmath_type<Stored>>(grad_log_scale), gradient, in,
                    elements<opmath_type<Stored>>(g), filter_numel);
          },
          out, gradient, in);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_direction, as_type(grad_log_scale, log_scale.scalar_type())};
}

}  // namespace
}  // namespace czm

STABLE_TORCH_LIBRARY_IMPL(czm_fused, CUDA, m) {
  m.impl("exp_scale_native", TORCH_BOX(&czm::exp_scale));
  m.impl("exp_scale_backward_native", TORCH_BOX(&czm::exp_scale_backward));
}
