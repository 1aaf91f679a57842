// czm_fused::launch_step_cuda: one launch for all tensors of a plan.
//
// Hyper-parameters and the addresses of the gradients are arguments of the kernel, so that nothing is
// copied and the host never waits; a CUDA graph keeps them as they were.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "step_launch.h"
#include "launch_utils.h"

namespace czm {
namespace {

void launch_step_cuda(Tensor table, Tensor work_items, Tensor grads, Tensor groups,
                      Tensor group_addresses, int64_t dtype, std::optional<Tensor> grad_scale,
                      std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) * sizeof(int64_t) == sizeof(TensorDescriptor),
                  "czm_fused: the step table has ", table.size(1), " columns");
  STD_TORCH_CHECK(work_items.dim() == 2 && work_items.size(1) * sizeof(int64_t) == sizeof(WorkItem),
                  "czm_fused: the work items have ", work_items.size(1), " columns");
  STD_TORCH_CHECK(groups.dim() == 2 && groups.size(1) * sizeof(double) == sizeof(GroupRow),
                  "czm_fused: the group table has ", groups.size(1), " columns");
  STD_TORCH_CHECK(grads.numel() == table.size(0), "czm_fused: ", grads.numel(),
                  " gradients for ", table.size(0), " tensors");
  const StepLaunch step{
      reinterpret_cast<const TensorDescriptor*>(table.const_data_ptr<int64_t>()),
      reinterpret_cast<const WorkItem*>(work_items.const_data_ptr<int64_t>()),
      work_items.size(0),
      grads.const_data_ptr<int64_t>(),
      grads.numel(),
      reinterpret_cast<const GroupRow*>(groups.const_data_ptr<double>()),
      group_addresses.const_data_ptr<int64_t>(),
      groups.size(0),
      grad_scale ? grad_scale->const_data_ptr<float>() : nullptr,
      found_inf ? found_inf->const_data_ptr<float>() : nullptr};
  STD_TORCH_CHECK(step.words() <= kManyWords, "czm_fused: ", step.tensor_count, " tensors in ",
                  step.group_count, " groups are too many for one launch");
  if (step.item_count == 0) return;
  const auto guard = on_device_of(table);
  choose_kernel(step, dtype, [&](auto kernel, const auto& arguments) {
    kernel<<<unsigned(step.item_count), kBlockThreads, 0, current_stream(table)>>>(arguments);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(czm_fused, CUDA, m) {
  m.impl("launch_step_cuda", TORCH_BOX(&launch_step_cuda));
}

}  // namespace czm
