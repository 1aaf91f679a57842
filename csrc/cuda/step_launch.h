// From what a launch is given to its arguments: what the device and the tests' host run share.
#pragma once

#include <cstring>
#include <stdexcept>

#include "../descriptors.h"
#include "step.h"
#include "step_kernel.cuh"

namespace czm {

inline int64_t words_of(const StepLaunch& step) {
  return 2 * kGroupWords * step.groups + step.tensors;
}

template <int words> StepArguments<words> arguments_of(const StepLaunch& step) {
  StepArguments<words> result;
  result.items = step.items;
  result.grad_scale = step.grad_scale;
  result.found_inf = step.found_inf;
  result.groups = step.groups;
  const int64_t group_words = kGroupWords * step.groups;
  std::memcpy(result.words, step.hyperparameters, group_words * sizeof(int64_t));
  std::memcpy(result.words + group_words, step.hyperparameter_addresses,
              group_words * sizeof(int64_t));
  std::memcpy(result.words + 2 * group_words, step.grads, step.tensors * sizeof(int64_t));
  return result;
}

// Calls launch(kernel, arguments, shared_bytes) with the kernel for the dtype and the blocks of
// `step`, and for as many words as it takes.
template <class Launch> void choose_kernel(const StepLaunch& step, Launch&& launch) {
  const auto with_words = [&](auto words, auto kernel, auto traits) {
    launch(kernel, arguments_of<words>(step), decltype(traits)::kSharedBytes);
  };
  const auto for_dtype = [&](auto stored) {
    using Stored = decltype(stored);
    constexpr auto small = BlockSize::small, large = BlockSize::large;
    constexpr std::integral_constant<int, kFewWords> few;
    constexpr std::integral_constant<int, kManyWords> many;
    if (words_of(step) > (step.has_large_blocks ? kFewWords : kManyWords)) {
      throw std::invalid_argument("too many tensors and groups for one launch");
    }
    if (step.has_large_blocks) {
      // Few tensors have such filters, so the larger arguments are not worth a kernel.
      with_words(few, step_kernel<kFewWords, Stored, large>, BlockTraits<Stored, large>());
    } else if (words_of(step) <= kFewWords) {
      with_words(few, step_kernel<kFewWords, Stored, small>, BlockTraits<Stored, small>());
    } else {
      with_words(many, step_kernel<kManyWords, Stored, small>, BlockTraits<Stored, small>());
    }
  };
  switch (step.dtype) {
    case kFloat32: return for_dtype(float());
    case kFloat64: return for_dtype(double());
    case kBFloat16: return for_dtype(__nv_bfloat16());
    case kFloat16: return for_dtype(__half());
    default: throw std::invalid_argument("no such dtype");
  }
}

}  // namespace czm
