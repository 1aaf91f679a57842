// The memory layouts of the operators on whole tensors, and loops over their elements.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arithmetic.h"

// A function that the compiler vectorises once for each instruction set, with all that it calls; the
// loader picks. Nothing in it may be reordered or contracted: every version gives the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CZM_VECTORISED \
  __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CZM_VECTORISED
#endif

namespace czm {

using torch::stable::Tensor;

// Grain size of parallel_for, in elements.
constexpr int64_t kElementsPerTask = 32768;

// Dense in the order (0, 2, 3, ..., 1): torch's channels_last, for any number of dimensions.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() < 3) {
    return false;
  }
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool match = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return match;
  };
  bool match = matches(1);
  for (int64_t d = t.dim() - 1; match && d >= 2; --d) {
    match = matches(d);
  }
  return match && matches(0);
}

// `t` itself if it is contiguous or channels-last, else a contiguous copy.
inline Tensor contiguous_or_channels_last(const Tensor& t) {
  return t.is_contiguous() || is_channels_last(t) ? t : torch::stable::contiguous(t);
}

// `t` itself if its elements lie as those of `like` do, else a copy that does. `like` is dense.
inline Tensor to_layout_of(const Tensor& t, const Tensor& like) {
  bool same = true;
  for (int64_t d = 0; same && d < t.dim(); ++d) {
    same = t.size(d) == 1 || t.stride(d) == like.stride(d);
  }
  if (same) {
    return t;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace czm
