// The descriptor table of a step, written by czm_fused/ops/table.py: one row a tensor.
#pragma once

#include <cstdint>

namespace czm {

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct TensorDescriptor {
  int64_t param;
  int64_t momentum_buffer;             // 0 without momentum
  int64_t log_scale;                   // 0 if not exp-scaled
  int64_t log_scale_momentum_buffer;   // 0 without momentum, or not exp-scaled
  int64_t step;                        // 0 unless dampened: float32, 0 before the first update
  int64_t param_remainder;             // 0 if the parameter is the whole weight; see param_remainder.h
  int64_t numel;
  int64_t filter_numel;                // of a filter, or of a block of a plain tensor
  int64_t taps;
  int64_t channels_last;               // whether taps, not channels, are outermost in a filter
  int64_t reduces;                     // whether the rule needs <W, W> and <dW, W>
  int64_t dtype;
  int64_t group;
  int64_t first_filter;                // filters of all rows before this one
  int64_t first_work;                  // work units of all rows before this one
};

// One row a parameter group, in float64. A second table of this shape, in int64, holds for each
// number the address of a float32 on the device that stands for it, or 0.
struct GroupRow {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double zmg;
  double luma;
  double nesterov;
  double maximize;
};

// What a filter costs beside its weights, in weights.
constexpr int64_t kFilterWork = 128;

}  // namespace czm
