// From the tensors of a launch to its arguments: what the device and the tests' host run share.
#pragma once

#include <cstring>

#include "step_kernel.cuh"

namespace czm {

// What czm_fused::launch_step_cuda is given.
struct StepLaunch {
  const TensorDescriptor* rows;
  const WorkItem* items;
  int64_t item_count;
  const int64_t* grads;
  int64_t tensor_count;
  const GroupRow* groups;
  const int64_t* group_addresses;
  int64_t group_count;
  const float* grad_scale;
  const float* found_inf;

  int64_t words() const { return 2 * kGroupWords * group_count + tensor_count; }

  template <int words_> StepArguments<words_> arguments() const {
    StepArguments<words_> result;
    result.rows = rows;
    result.items = items;
    result.grad_scale = grad_scale;
    result.found_inf = found_inf;
    result.groups = group_count;
    const int64_t group_words = kGroupWords * group_count;
    std::memcpy(result.words, groups, group_words * sizeof(int64_t));
    std::memcpy(result.words + group_words, group_addresses, group_words * sizeof(int64_t));
    std::memcpy(result.words + 2 * group_words, grads, tensor_count * sizeof(int64_t));
    return result;
  }
};

// Calls launch(kernel, arguments) with the kernel for tensors of one dtype, or of any (-1), and for
// as many words as it takes.
template <class Launch> void choose_kernel(const StepLaunch& step, int64_t dtype, Launch&& launch) {
  const auto with_words = [&](auto few, auto many) {
    if (step.words() <= kFewWords) {
      launch(few, step.arguments<kFewWords>());
    } else {
      launch(many, step.arguments<kManyWords>());
    }
  };
  const auto for_dtype = [&](auto stored) {
    using Stored = decltype(stored);
    with_words(step_kernel<kFewWords, Stored>, step_kernel<kManyWords, Stored>);
  };
  switch (dtype) {
    case kFloat32: return for_dtype(float());
    case kFloat64: return for_dtype(double());
    case kBFloat16: return for_dtype(__nv_bfloat16());
    case kFloat16: return for_dtype(__half());
    default: break;
  }
  // Few models mix dtypes, so the smaller arguments are not worth a kernel.
  launch(step_kernel<kManyWords, float, double, __nv_bfloat16, __half>,
         step.arguments<kManyWords>());
}

}  // namespace czm
