// The descriptors of a step, one for each tensor, written by czm_fused/ops/step/descriptors.py.
#pragma once

#include <cstdint>

namespace czm {

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// State of a tensor, in the order of czm_fused/ops/step/spec.py: the addresses of a descriptor after
// the parameter's. 0 where the tensor has no such state.
#define CZM_STATES(FIELD)                                               \
  FIELD(momentum_buffer)                                                \
  FIELD(log_scale)                                                      \
  FIELD(log_scale_momentum_buffer)                                      \
  FIELD(step)            /* float32, 0 before the first update */       \
  FIELD(param_remainder) /* of master weights, see param_remainder.h */

#define CZM_DESCRIPTOR_FIELDS(FIELD)                                              \
  FIELD(param)                                                                    \
  CZM_STATES(FIELD)                                                               \
  FIELD(numel)                                                                    \
  FIELD(filter_numel)  /* of a filter, or of a block of a tensor without */       \
  FIELD(taps)          /* 1 where CZMG has nothing to do */                       \
  FIELD(channels_last) /* taps, not channels, are outermost in a filter */        \
  FIELD(needs_sums)    /* the rule needs sums over the filter */                  \
  FIELD(dtype)                                                                    \
  FIELD(group)                                                                    \
  FIELD(first_filter)  /* filters of all descriptors before this one */           \
  FIELD(first_work)    /* units of work of all descriptors before this one */

struct TensorDescriptor {
#define CZM_FIELD(name) int64_t name;
  CZM_DESCRIPTOR_FIELDS(CZM_FIELD)
#undef CZM_FIELD
};

#define CZM_COUNT(name) +1
constexpr int kStateCount = 0 CZM_STATES(CZM_COUNT);
#undef CZM_COUNT

// Cost of a filter beside its weights, in weights.
constexpr int64_t kFilterWork = 128;

}  // namespace czm
