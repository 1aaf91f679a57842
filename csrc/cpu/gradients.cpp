// czm_fused::read_gradients: checks all gradients of a step and collects their addresses, in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <vector>

#include "../step_table.h"

namespace czm {
namespace {

using torch::stable::Tensor;

bool has_dtype(const Tensor& t, int64_t dtype) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return dtype == kFloat32;
    case torch::headeronly::ScalarType::Double: return dtype == kFloat64;
    case torch::headeronly::ScalarType::BFloat16: return dtype == kBFloat16;
    case torch::headeronly::ScalarType::Half: return dtype == kFloat16;
    default: return false;
  }
}

// `layouts` holds, for each gradient: dtype, dim, sizes, number of strides, strides. None means
// contiguous.
bool read_gradients(Tensor layouts, std::vector<Tensor> grads, Tensor addresses) {
  STD_TORCH_CHECK(addresses.numel() == static_cast<int64_t>(grads.size()), "czm_fused: ",
                  grads.size(), " gradients for ", addresses.numel(), " addresses");
  const int64_t* next = layouts.const_data_ptr<int64_t>();
  const int64_t* const end = next + layouts.numel();
  const auto take = [&](int64_t count) {
    STD_TORCH_CHECK(count >= 0 && end - next >= count, "czm_fused: too few layouts for ",
                    grads.size(), " gradients");
    next += count;
    return next - count;
  };
  const auto take_list = [&] {
    const int64_t size = *take(1);
    return torch::headeronly::IntHeaderOnlyArrayRef(take(size), size_t(size));
  };
  int64_t* address = addresses.mutable_data_ptr<int64_t>();
  for (const Tensor& grad : grads) {
    const int64_t dtype = *take(1);
    const auto sizes = take_list(), strides = take_list();
    if (grad.layout() != torch::headeronly::Layout::Strided || !has_dtype(grad, dtype) ||
        !grad.sizes().equals(sizes) ||
        (strides.empty() ? !grad.is_contiguous() : !grad.strides().equals(strides)))
      return false;
    *address++ = reinterpret_cast<int64_t>(grad.const_data_ptr());
  }
  return true;
}

}  // namespace

// Addresses are read, not followed: this serves every device.
STABLE_TORCH_LIBRARY_IMPL(czm_fused, CompositeExplicitAutograd, m) {
  m.impl("read_gradients", TORCH_BOX(&read_gradients));
}

}  // namespace czm
