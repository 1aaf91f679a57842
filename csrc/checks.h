// What the operators on whole tensors ask of their arguments, on every device alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace czm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  if (a.is_cpu() || b.is_cpu()) return a.is_cpu() && b.is_cpu();
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_alike(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  STD_TORCH_CHECK(same_sizes(a, b) && a.scalar_type() == b.scalar_type() && on_same_device(a, b),
                  a_name, " and ", b_name, " must have the same shape, dtype and device");
}

inline ScalarType opmath_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline void check_activation(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() >= 2, name, " must have the dimensions (samples, channels, ...)");
}

inline std::optional<Tensor> checked_noise(const std::optional<Tensor>& noise,
                                           const Tensor& activation) {
  if (!noise) return std::nullopt;
  STD_TORCH_CHECK(noise->dim() == 2 && noise->size(0) == activation.size(0) &&
                      noise->size(1) == activation.size(1) && on_same_device(*noise, activation),
                  "noise must have the shape (samples, channels) and the device of the activation");
  STD_TORCH_CHECK(noise->scalar_type() == opmath_dtype(activation),
                  "noise must be float32, or float64 for a float64 activation");
  return torch::stable::contiguous(*noise);
}

// The log-scales of `direction`, contiguous and in the type of the arithmetic.
inline Tensor checked_log_scale(const Tensor& log_scale, const Tensor& direction) {
  STD_TORCH_CHECK(direction.dim() >= 1, "direction must have the dimensions (filters, ...)");
  STD_TORCH_CHECK(log_scale.dim() == 1 && log_scale.size(0) == direction.size(0) &&
                      on_same_device(log_scale, direction),
                  "log_scale must hold one number for each filter of direction, on its device");
  return torch::stable::contiguous(as_type(log_scale, opmath_dtype(direction)));
}

}  // namespace czm
