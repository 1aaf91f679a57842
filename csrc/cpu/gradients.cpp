// czm_fused::read_gradients: checks all gradients of a step and collects their addresses, in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../descriptors.h"

namespace czm {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using TensorHandle = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// A std::vector<Tensor> would allocate a shared owner for each of them, which takes longer than all
// that is asked of them here.
std::vector<TensorHandle> take_tensors(StableListHandle list) {
  size_t size;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  std::vector<TensorHandle> tensors(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue tensor;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &tensor));
    tensors[i].reset(to<AtenTensorHandle>(tensor));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return tensors;
}

bool has_dtype(AtenTensorHandle tensor, int64_t dtype) {
  int32_t its;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &its));
  switch (dtype) {
    case kFloat32: return its == aoti_torch_dtype_float32();
    case kFloat64: return its == aoti_torch_dtype_float64();
    case kBFloat16: return its == aoti_torch_dtype_bfloat16();
    case kFloat16: return its == aoti_torch_dtype_float16();
    default: return false;
  }
}

bool lies_like(AtenTensorHandle tensor, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  if (layout != aoti_torch_layout_strided()) return false;
  int64_t its_dim, *its_sizes, *its_strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &its_dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &its_sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &its_strides));
  if (its_dim != dim) return false;
  for (int64_t d = 0; d < dim; ++d)
    if (its_sizes[d] != sizes[d] || (sizes[d] != 1 && its_strides[d] != strides[d])) return false;
  return true;
}

// `layouts` holds, for each gradient: dtype, dim, sizes, strides; where the size is 1, any stride.
bool read_gradients(const Tensor& layouts, const std::vector<TensorHandle>& grads,
                    Tensor& addresses) {
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
  int64_t* address = addresses.mutable_data_ptr<int64_t>();
  for (const TensorHandle& grad : grads) {
    const int64_t dtype = *take(1), dim = *take(1);
    const int64_t *sizes = take(dim), *strides = take(dim);
    if (!has_dtype(grad.get(), dtype) || !lies_like(grad.get(), dim, sizes, strides)) return false;
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(grad.get(), &data));
    *address++ = reinterpret_cast<int64_t>(data);
  }
  return true;
}

void read_gradients_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor layouts = to<Tensor>(stack[0]);
  const auto grads = take_tensors(to<StableListHandle>(stack[1]));
  Tensor addresses = to<Tensor>(stack[2]);
  stack[0] = from(read_gradients(layouts, grads, addresses));
}

}  // namespace

// Addresses are read, not followed: this serves every device.
STABLE_TORCH_LIBRARY_IMPL(czm_fused, CompositeExplicitAutograd, m) {
  m.impl("read_gradients", &read_gradients_boxed);
}

}  // namespace czm
