// What the warps of the step's kernel do, and what travels with a launch.
#pragma once

#include <cstdint>

#include "../update_rule.h"

namespace czm {

enum ItemFlag : int32_t {
  kInPacks = 1,       // filters can be moved in packs where they are aligned
  kChannelsLast = 2,  // taps, not channels, are outermost in a filter
  kNeedsSums = 4,     // the rule needs sums over the filter
};
constexpr int kItemFlagBits = 3;

// What one warp does: consecutive filters of one tensor, or a piece of a tensor without filters. The warps
// that share a filter have the same item. Written by czm_fused/ops/step/cuda.py.
struct alignas(16) WorkItem {
  int64_t param;  // addresses of the first filter's, 0 for none
  int64_t momentum_buffer;
  int64_t param_remainder;
  int64_t log_scale;
  int64_t log_scale_momentum_buffer;
  int64_t step;   // of the tensor
  int64_t first;  // weights of the tensor before the first filter
  int32_t numel;  // weights of all filters; 0 for a warp without work
  int32_t filter_numel;
  int32_t taps;    // 1 where CZMG has nothing to do
  int32_t tensor;  // of the launch
  int32_t group;   // of the launch
  int32_t flags;   // of ItemFlag; above them, the logarithm of the threads of a filter

  CZM_INLINE int log_threads() const { return flags >> kItemFlagBits; }
};
static_assert(sizeof(WorkItem) == 80);

// `words` holds, one after the other: for every group the bits of its GroupDescriptor, for every group the
// addresses that stand for its numbers, and for every tensor the address of its gradient.
template <int words_> struct StepArguments {
  const WorkItem* items;
  const float* grad_scale;  // null for 1
  const float* found_inf;   // null for 0
  int64_t groups;
  int64_t words[words_];
};

constexpr int kGroupWords = sizeof(GroupDescriptor) / sizeof(int64_t);
constexpr int kHeaderBytes = sizeof(StepArguments<1>) - sizeof(int64_t);
// A launch takes 4 KB of arguments on every device and driver, and 32,764 bytes on most.
constexpr int kFewWords = (4096 - kHeaderBytes) / sizeof(int64_t);
constexpr int kManyWords = (32764 - kHeaderBytes) / sizeof(int64_t);

}  // namespace czm
