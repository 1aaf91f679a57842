// The update of one filter: what FusedCZMSGD does to W, its momentum and its log-scale g.
// Host and device compile this same text; see czm_fused/ops/step/README.md.
// A file that instantiates it for vectors includes their multiply_add first.
#pragma once

#include <cmath>
#include <cstdint>

#include "arithmetic.h"

namespace czm {

// The hyperparameters of a parameter group, in the order of czm_fused/ops/step/spec.py.
#define CZM_HYPERPARAMETERS(FIELD) \
  FIELD(lr)                        \
  FIELD(momentum)                  \
  FIELD(dampening)                 \
  FIELD(weight_decay)              \
  FIELD(zmg)                       \
  FIELD(luma)                      \
  FIELD(grad_norm)                 \
  FIELD(nesterov)                  \
  FIELD(maximize)

struct GroupDescriptor {
#define CZM_FIELD(name) double name;
  CZM_HYPERPARAMETERS(CZM_FIELD)
#undef CZM_FIELD
};

inline namespace CZM_ARCH {

// What the rule takes of them for one tensor.
template <class opmath_t>
struct HyperParameters {
  opmath_t lr;
  opmath_t momentum;
  opmath_t one_minus_dampening;
  opmath_t weight_decay;
  opmath_t zmg;
  opmath_t luma;
  opmath_t grad_norm;
  opmath_t grad_factor;  // the sign of maximize over the scale of GradScaler
  bool nesterov;
};

// `is_first` is true for a tensor's first update: without momentum, and at its first update,
// torch.optim.SGD ignores dampening.
template <class opmath_t>
CZM_INLINE HyperParameters<opmath_t> hyperparameters_of(const GroupDescriptor& group, bool has_momentum,
                                                    bool is_first, opmath_t inverse_scale) {
  HyperParameters<opmath_t> result;
  result.lr = opmath_t(group.lr);
  result.momentum = has_momentum ? opmath_t(group.momentum) : opmath_t(0);
  result.one_minus_dampening =
      has_momentum && !is_first ? opmath_t(1 - group.dampening) : opmath_t(1);
  result.weight_decay = opmath_t(group.weight_decay);
  result.zmg = opmath_t(group.zmg);
  result.luma = opmath_t(group.luma);
  result.grad_norm = opmath_t(group.grad_norm);
  result.grad_factor = group.maximize != 0 ? -inverse_scale : inverse_scale;
  result.nesterov = group.nesterov != 0;
  return result;
}

// The coefficients of the weights' update. T is a number, or a vector of equal numbers.
template <class T>
struct FilterRule {
  T grad;          // dV takes grad * dW
  T weight;        // and weight * W, the anchor's gradient
  T mean;          // times the sum over taps is what CZMG removes
  T decay;         // times W is added after CZMG
  T momentum;
  T one_minus_dampening;
  T keep;          // W' = keep * W + rate * d
  T rate;
  bool nesterov;
};

// Returns the rule with each coefficient replaced by convert(coefficient).
template <class To, class From, class Convert>
CZM_INLINE FilterRule<To> convert_rule(const FilterRule<From>& rule, const Convert& convert) {
  FilterRule<To> result;
  result.grad = convert(rule.grad);
  result.weight = convert(rule.weight);
  result.mean = convert(rule.mean);
  result.decay = convert(rule.decay);
  result.momentum = convert(rule.momentum);
  result.one_minus_dampening = convert(rule.one_minus_dampening);
  result.keep = convert(rule.keep);
  result.rate = convert(rule.rate);
  result.nesterov = rule.nesterov;
  return result;
}

// The sums over a filter that its rule is made of; zeros for a tensor that needs none.
template <class T>
struct FilterSums {
  T weight_weight;  // <W, W>
  T grad_weight;    // <dW, W>
  T grad_grad;      // <dW, dW>
};

// What the gradients of a filter are multiplied by: with a norm of their own, whatever their scale.
template <class opmath_t>
CZM_INLINE opmath_t filter_grad_factor(const HyperParameters<opmath_t>& hyper,
                                       const FilterSums<opmath_t>& sums) {
  // A filter of zeros has no direction, and 1 for its norm, as for its scale.
  const opmath_t weight_norm =
      sums.weight_weight == opmath_t(0) ? opmath_t(1) : std::sqrt(sums.weight_weight);
  const opmath_t norm = weight_norm * std::sqrt(sums.grad_grad);
  if (!(hyper.grad_norm > opmath_t(0) && norm > opmath_t(0))) return hyper.grad_factor;
  opmath_t factor = hyper.grad_norm / norm;
  factor = factor <= kLargest<opmath_t> ? factor : kLargest<opmath_t>;
  return hyper.grad_factor < opmath_t(0) ? -factor : factor;
}

// From the sums over a filter to its rule; advances g in place.
// log_scale is null for a filter that is not exp-scaled, its momentum null without momentum.
template <class opmath_t>
CZM_INLINE FilterRule<opmath_t> filter_rule(const HyperParameters<opmath_t>& hyper,
                                        const FilterSums<opmath_t>& sums, int64_t taps,
                                        opmath_t* log_scale, opmath_t* log_scale_momentum) {
  const opmath_t g = log_scale ? *log_scale : opmath_t(0);
  const opmath_t scale = log_scale ? std::exp(g) : opmath_t(1);
  // exp(g) of a filter that has collapsed may be subnormal or 0 in this arithmetic, and W with it: V
  // is lost, and neither anchor nor decay has anything to act on.
  const opmath_t inverse_scale =
      scale >= kSmallestNormal<opmath_t> ? opmath_t(1) / scale : opmath_t(0);
  const opmath_t norm = std::sqrt(sums.weight_weight) * inverse_scale;
  // <W, W> underflows or overflows long before W does, and then the norm is not known.
  const bool has_anchor = norm > opmath_t(0) && norm <= kLargest<opmath_t>;
  const opmath_t factor = filter_grad_factor(hyper, sums);
  FilterRule<opmath_t> rule;
  rule.grad = factor * scale;
  rule.weight = has_anchor
                    ? opmath_t(2) * hyper.luma * ((norm - opmath_t(1)) / norm) * inverse_scale
                    : opmath_t(0);
  rule.mean = taps > 1 ? hyper.zmg / static_cast<opmath_t>(taps) : opmath_t(0);
  rule.decay = hyper.weight_decay * inverse_scale;
  rule.momentum = hyper.momentum;
  rule.one_minus_dampening = hyper.one_minus_dampening;
  rule.keep = opmath_t(1);
  rule.rate = -hyper.lr;
  rule.nesterov = hyper.nesterov;
  if (log_scale) {
    const opmath_t dg = factor * sums.grad_weight;
    opmath_t m = log_scale_momentum ? *log_scale_momentum : opmath_t(0);
    m = multiply_add(hyper.one_minus_dampening, dg, hyper.momentum * m);
    if (log_scale_momentum) *log_scale_momentum = m;
    const opmath_t direction = hyper.nesterov ? multiply_add(hyper.momentum, m, dg) : m;
    *log_scale = multiply_add(-hyper.lr, direction, g);
    // Bounded, so that a weight of 0 stays 0, also where both g are -inf.
    const opmath_t keep = std::exp(*log_scale - g);
    rule.keep = keep <= kLargest<opmath_t> ? keep : kLargest<opmath_t>;
    rule.rate *= std::exp(*log_scale);
  }
  return rule;
}

// dV before CZMG: the data gradient and the anchor's.
template <class T>
CZM_INLINE T direction_grad(const FilterRule<T>& rule, T grad, T weight) {
  return multiply_add(rule.grad, grad, rule.weight * weight);
}

template <class T>
CZM_INLINE void update_weight(const FilterRule<T>& rule, T direction_grad, T removed_mean,
                              T& weight, T& momentum_buffer) {
  const T grad = multiply_add(rule.decay, weight, direction_grad - removed_mean);
  momentum_buffer =
      multiply_add(rule.one_minus_dampening, grad, rule.momentum * momentum_buffer);
  const T direction =
      rule.nesterov ? multiply_add(rule.momentum, momentum_buffer, grad) : momentum_buffer;
  weight = multiply_add(rule.rate, direction, rule.keep * weight);
}

}  // namespace CZM_ARCH
}  // namespace czm
