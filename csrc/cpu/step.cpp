// czm_fused::launch_step on CPU tensors: the table split by work over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <optional>

#include "../descriptors.h"

namespace czm {

using StepRange = void(const TensorDescriptor* rows, const int64_t* grads, int64_t row_count,
                       const GroupRow* groups, double inverse_scale, int64_t begin, int64_t end);

namespace baseline { StepRange step_range; }
#if defined(__x86_64__)
namespace avx2 { StepRange step_range; }
namespace avx512 { StepRange step_range; }
#endif

namespace {

StepRange* best_step_range() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::step_range;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::step_range;
#endif
  return baseline::step_range;
}

// What a thread must have to do before another is worth waking, in weights.
constexpr int64_t kLeastWork = 16384;

using torch::stable::Tensor;

void launch_step(Tensor table, Tensor grads, Tensor groups, Tensor /*group_addresses*/,
                 int64_t work, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) * sizeof(int64_t) == sizeof(TensorDescriptor),
                  "czm_fused: the step table has ", table.size(1), " columns");
  STD_TORCH_CHECK(groups.dim() == 2 && groups.size(1) * sizeof(double) == sizeof(GroupRow),
                  "czm_fused: the group table has ", groups.size(1), " columns");
  STD_TORCH_CHECK(grads.numel() == table.size(0), "czm_fused: ", grads.numel(),
                  " gradients for ", table.size(0), " tensors");
  if (found_inf && *found_inf->const_data_ptr<float>() != 0) return;
  const double inverse_scale = grad_scale ? 1.0 / *grad_scale->const_data_ptr<float>() : 1.0;
  const auto* rows = reinterpret_cast<const TensorDescriptor*>(table.const_data_ptr<int64_t>());
  const auto* grad_addresses = grads.const_data_ptr<int64_t>();
  const auto* group_rows = reinterpret_cast<const GroupRow*>(groups.const_data_ptr<double>());
  static StepRange* const step_range = best_step_range();
  torch::stable::parallel_for(0, work, kLeastWork, [&](int64_t begin, int64_t end) {
    step_range(rows, grad_addresses, table.size(0), group_rows, inverse_scale, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(czm_fused, CPU, m) { m.impl("launch_step", TORCH_BOX(&launch_step)); }

}  // namespace czm
