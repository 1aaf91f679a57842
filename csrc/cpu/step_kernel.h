// The fused step over a range of work, for the instruction set that the including file selects.
//
// A filter is read twice: once for its sums, and, while it is still in the cache, once for the
// update. CZMG needs the sum over taps of dV alone, and dV is at hand in the second pass.
#pragma once

#include <cstdint>

#include "../descriptors.h"
#include "../prefetch.h"
#include "simd.h"

#include "../update_rule.h"

namespace czm {
inline namespace CZM_ARCH {

// Weights between the running sums in opmath_t and their totals in double.
constexpr int64_t kSumBlock = 4096;
// Terms of a channel's sum that are added one after the other; longer sums are compensated.
constexpr int64_t kMostPlainTerms = 256;
// How far ahead of the update weights and gradients are fetched, in bytes, where filters are shorter
// than that; longer ones are fetched a filter ahead. Momentum, which one pass reads, is fetched half as
// far ahead.
constexpr int64_t kPrefetchBytes = 4096;

// Not a lambda: GCC compiles those without the instruction set that the file selects.
struct Broadcast {
  template <class opmath_t> Vector<opmath_t> operator()(opmath_t x) const { return broadcast(x); }
};

template <class opmath_t> inline FilterRule<Vector<opmath_t>> broadcast_rule(const FilterRule<opmath_t>& rule) {
  return convert_rule<Vector<opmath_t>>(rule, Broadcast());
}

template <class Stored> struct Filter {
  using opmath_t = opmath_type<Stored>;
  Stored* weight;
  const Stored* grad;
  Stored* momentum;    // null without momentum
  int16_t* remainder;  // null if `weight` is all there is of the weights
  int64_t numel;
  int64_t prefetch;  // weights from here to what is fetched ahead

  Filter from(int64_t offset) const {
    return {weight + offset,
            grad + offset,
            momentum ? momentum + offset : nullptr,
            remainder ? remainder + offset : nullptr,
            numel - offset,
            prefetch};
  }
};

template <class Stored>
inline Vector<opmath_type<Stored>> load_weight(const Filter<Stored>& filter,
                                                             int64_t i) {
  const auto param = load(filter.weight + i);
  if constexpr (sizeof(Stored) == 2) {
    if (filter.remainder) return add_remainders(param, load_as<Half16s>(filter.remainder + i));
  }
  return param;
}

template <class Stored>
inline Vector<opmath_type<Stored>> load_first_weight(const Filter<Stored>& filter,
                                                                   int64_t i, int64_t count) {
  const auto param = load_first(filter.weight + i, count);
  if constexpr (sizeof(Stored) == 2) {
    if (filter.remainder)
      return add_remainders(param, load_first_halves(filter.remainder + i, count));
  }
  return param;
}

template <class Stored, class T>
inline void store_weight(const Filter<Stored>& filter, int64_t i, T weight) {
  store(filter.weight + i, weight);
  if constexpr (sizeof(Stored) == 2) {
    if (filter.remainder)
      store_as(filter.remainder + i, remainders_of(weight, load(filter.weight + i)));
  }
}

template <class Stored, class T>
inline void store_first_weight(const Filter<Stored>& filter, int64_t i, T weight, int64_t count) {
  store_first(filter.weight + i, weight, count);
  if constexpr (sizeof(Stored) == 2) {
    if (filter.remainder) {
      const T param = load_first(filter.weight + i, count);
      store_first_halves(filter.remainder + i, remainders_of(weight, param), count);
    }
  }
}

// The momentum that the second pass needs, fetched by the first, whose own numbers are in the cache.
template <class Stored>
CZM_PREFETCHES void prefetch_momentum(const Filter<Stored>& filter, int64_t i) {
  constexpr int64_t ahead = kPrefetchBytes / 2 / int64_t(sizeof(Stored));
  if (filter.momentum) __builtin_prefetch(filter.momentum + i + ahead, 1, 3);
}

// <dW, dW>, which few trainings need, only if `with_grad_grad`.
template <bool with_grad_grad, class T>
inline void add_products(FilterSums<T>& sums, T weight, T grad) {
  sums.weight_weight = multiply_add(weight, weight, sums.weight_weight);
  sums.grad_weight = multiply_add(grad, weight, sums.grad_weight);
  if constexpr (with_grad_grad) sums.grad_grad = multiply_add(grad, grad, sums.grad_grad);
}

template <bool with_grad_grad, class Stored>
FilterSums<opmath_type<Stored>> sum_products(const Filter<Stored>& filter) {
  using opmath_t = opmath_type<Stored>;
  constexpr int lanes = kLanes<opmath_t>;
  FilterSums<double> totals{};
  for (int64_t begin = 0; begin < filter.numel; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < filter.numel ? begin + kSumBlock : filter.numel;
    FilterSums<Vector<opmath_t>> sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * lanes <= end; i += 4 * lanes) {
      for (int k = 0; k < 4; ++k) {
        prefetch_momentum(filter, i + k * lanes);
        add_products<with_grad_grad>(sums[k], load_weight(filter, i + k * lanes),
                                     load(filter.grad + i + k * lanes));
      }
    }
    for (; i + lanes <= end; i += lanes) {
      prefetch_momentum(filter, i);
      add_products<with_grad_grad>(sums[0], load_weight(filter, i), load(filter.grad + i));
    }
    if (i < end) {
      add_products<with_grad_grad>(sums[1], load_first_weight(filter, i, end - i),
                                   load_first(filter.grad + i, end - i));
    }
    const auto& [a, b, c, d] = sums;
    totals.weight_weight += sum_lanes<opmath_t>((a.weight_weight + b.weight_weight) +
                                                (c.weight_weight + d.weight_weight));
    totals.grad_weight += sum_lanes<opmath_t>((a.grad_weight + b.grad_weight) +
                                              (c.grad_weight + d.grad_weight));
    if constexpr (with_grad_grad) {
      totals.grad_grad += sum_lanes<opmath_t>((a.grad_grad + b.grad_grad) +
                                              (c.grad_grad + d.grad_grad));
    }
  }
  return {static_cast<opmath_t>(totals.weight_weight), static_cast<opmath_t>(totals.grad_weight),
          static_cast<opmath_t>(totals.grad_grad)};
}

template <class Stored>
CZM_PREFETCHES void prefetch(const Filter<Stored>& filter, int64_t i) {
  __builtin_prefetch(filter.grad + i + filter.prefetch, 0, 3);
  __builtin_prefetch(filter.weight + i + filter.prefetch, 1, 3);
  prefetch_momentum(filter, i);
}

template <class Stored, class T>
inline void update_vector(const Filter<Stored>& filter, int64_t i, const FilterRule<T>& rule, T grad,
                          T removed) {
  T weight = load_weight(filter, i);
  T momentum = filter.momentum ? load(filter.momentum + i) : T{};
  update_weight(rule, grad, removed, weight, momentum);
  store_weight(filter, i, weight);
  if (filter.momentum) store(filter.momentum + i, momentum);
}

template <class Stored, class T>
inline T grad_vector(const Filter<Stored>& filter, int64_t i, const FilterRule<T>& rule) {
  return direction_grad(rule, load(filter.grad + i), load_weight(filter, i));
}

template <class Stored, class T>
inline T first_of_grad_vector(const Filter<Stored>& filter, int64_t i, const FilterRule<T>& rule,
                              int64_t count) {
  return direction_grad(rule, load_first(filter.grad + i, count),
                        load_first_weight(filter, i, count));
}

template <class Stored, class T>
inline void update_first_of_vector(const Filter<Stored>& filter, int64_t i,
                                   const FilterRule<T>& rule, T removed, int64_t count) {
  const T grad = first_of_grad_vector(filter, i, rule, count);
  T weight = load_first_weight(filter, i, count);
  T momentum = filter.momentum ? load_first(filter.momentum + i, count) : T{};
  update_weight(rule, grad, removed, weight, momentum);
  store_first_weight(filter, i, weight, count);
  if (filter.momentum) store_first(filter.momentum + i, momentum, count);
}

// All weights of `filter`, with the same mean removed from each.
template <class Stored, class T>
inline void update_with_mean(const Filter<Stored>& filter, const FilterRule<T>& rule, T removed) {
  constexpr int lanes = kLanes<opmath_type<Stored>>;
  int64_t i = 0;
  for (; i + lanes <= filter.numel; i += lanes) {
    prefetch(filter, i);
    update_vector(filter, i, rule, grad_vector(filter, i, rule), removed);
  }
  if (i < filter.numel) update_first_of_vector(filter, i, rule, removed, filter.numel - i);
}

// A running sum whose error does not grow with the number of terms (Kahan).
template <class T> struct CompensatedSum {
  T total{};
  T excess{};

  void add(T term) {
    const T rest = term - excess;
    const T next = total + rest;
    excess = (next - total) - rest;
    total = next;
  }
};

// The sums over a row of `width` weights and the `rows` - 1 rows that follow it, each `stride` after
// the last; lanes from `width` on are zero.
template <class Stored, class T>
T sum_rows(const Filter<Stored>& filter, const FilterRule<T>& rule, int64_t rows, int64_t stride,
           int64_t width) {
  CompensatedSum<T> sum;
  for (int64_t i = 0; i < rows * stride; i += stride) {
    if (width >= kLanes<opmath_type<Stored>>)
      sum.add(grad_vector(filter, i, rule));
    else
      sum.add(first_of_grad_vector(filter, i, rule, width));
  }
  return sum.total;
}

// One channel after the other, each with its own mean: any number of taps.
template <class Stored, class T>
void update_channels(const Filter<Stored>& filter, const FilterRule<T>& rule, int64_t taps) {
  using opmath_t = opmath_type<Stored>;
  constexpr int lanes = kLanes<opmath_t>;
  for (int64_t begin = 0; begin < filter.numel; begin += taps) {
    Filter<Stored> channel = filter.from(begin);
    channel.numel = taps;
    T sum{};
    int64_t i = 0;
    if (taps > kMostPlainTerms * lanes) {
      i = taps / lanes * lanes;
      sum = sum_rows(channel, rule, taps / lanes, lanes, lanes);
    }
    for (; i + lanes <= taps; i += lanes) sum += grad_vector(channel, i, rule);
    // Lanes beyond the last tap are zero, and so is their gradient.
    if (i < taps) sum += first_of_grad_vector(channel, i, rule, taps - i);
    update_with_mean(channel, rule, rule.mean * broadcast(sum_lanes<opmath_t>(sum)));
  }
}

template <class Stored, class T, int taps, size_t... number>
inline void update_channel_block(const Filter<Stored>& filter, const FilterRule<T>& rule,
                                 std::index_sequence<number...>) {
  using opmath_t = opmath_type<Stored>;
  constexpr int lanes = kLanes<opmath_t>;
  T grad[taps];
  for (int k = 0; k < taps; ++k) {
    prefetch(filter, k * lanes);
    grad[k] = grad_vector(filter, k * lanes, rule);
  }
  const T mean = rule.mean * TapSums<opmath_t, taps>::of(grad);
  (update_vector(filter, int64_t(number) * lanes, rule, grad[number],
                 permute<opmath_t, RepeatedLane<lanes, taps, int(number)>>(mean, mean)),
   ...);
}

// As many channels at a time as a vector has lanes; the taps of a channel are consecutive.
template <class Stored, class T, int taps>
void update_channel_blocks(const Filter<Stored>& filter, const FilterRule<T>& rule) {
  constexpr int lanes = kLanes<opmath_type<Stored>>;
  int64_t i = 0;
  for (; i + taps * lanes <= filter.numel; i += taps * lanes)
    update_channel_block<Stored, T, taps>(filter.from(i), rule, std::make_index_sequence<taps>{});
  update_channels(filter.from(i), rule, taps);
}

// channels_last: the channels of a tap are consecutive.
template <class Stored, class T>
void update_channels_last(const Filter<Stored>& filter, const FilterRule<T>& rule, int64_t taps) {
  constexpr int lanes = kLanes<opmath_type<Stored>>;
  const int64_t channels = filter.numel / taps;
  const int64_t plain_taps = taps <= kMostPlainTerms ? taps : 0;
  int64_t channel = 0;
  for (; channel + lanes <= channels; channel += lanes) {
    T sum{};
    for (int64_t tap = 0; tap < plain_taps; ++tap)
      sum += grad_vector(filter, tap * channels + channel, rule);
    if (!plain_taps) sum = sum_rows(filter.from(channel), rule, taps, channels, lanes);
    const T removed = rule.mean * sum;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t i = tap * channels + channel;
      prefetch(filter, i);
      update_vector(filter, i, rule, grad_vector(filter, i, rule), removed);
    }
  }
  if (channel == channels) return;
  const int64_t count = channels - channel;
  T sum{};
  for (int64_t tap = 0; tap < plain_taps; ++tap)
    sum += first_of_grad_vector(filter, tap * channels + channel, rule, count);
  if (!plain_taps) sum = sum_rows(filter.from(channel), rule, taps, channels, count);
  for (int64_t tap = 0; tap < taps; ++tap)
    update_first_of_vector(filter, tap * channels + channel, rule, rule.mean * sum, count);
}

template <class Stored>
void update_filter(const Filter<Stored>& filter, const TensorDescriptor& row,
                   const HyperParameters<opmath_type<Stored>>& hyper, int64_t number) {
  using opmath_t = opmath_type<Stored>;
  using T = Vector<opmath_t>;
  FilterSums<opmath_t> sums{};
  if (row.needs_sums) {
    sums = hyper.grad_norm > 0 ? sum_products<true>(filter) : sum_products<false>(filter);
  }
  opmath_t* log_scale = row.log_scale ? reinterpret_cast<opmath_t*>(row.log_scale) + number : nullptr;
  opmath_t* log_scale_momentum =
      row.log_scale_momentum_buffer
          ? reinterpret_cast<opmath_t*>(row.log_scale_momentum_buffer) + number
          : nullptr;
  const FilterRule<T> rule = broadcast_rule(filter_rule(
      hyper, sums, row.taps, log_scale, log_scale_momentum));
  if (rule.mean[0] == 0) {
    update_with_mean(filter, rule, T{});
  } else if (row.channels_last) {
    update_channels_last(filter, rule, row.taps);
  } else if (row.taps == 9) {
    update_channel_blocks<Stored, T, 9>(filter, rule);
  } else if (row.taps == 3) {
    update_channel_blocks<Stored, T, 3>(filter, rule);
  } else if (row.taps == 27) {
    update_channel_blocks<Stored, T, 27>(filter, rule);
  } else {
    update_channels(filter, rule, row.taps);
  }
}

template <class Stored>
void step_tensor(const TensorDescriptor& descriptor, int64_t grad, const GroupDescriptor& group,
                 double inverse_scale, int64_t first_filter, int64_t last_filter) {
  using opmath_t = opmath_type<Stored>;
  const bool is_first = descriptor.step && *reinterpret_cast<const float*>(descriptor.step) == 0;
  const auto hyper = hyperparameters_of<opmath_t>(group, descriptor.momentum_buffer != 0, is_first,
                                                  opmath_t(inverse_scale));
  // Hints into L1 made the kernel 3 to 8 % faster on AMD and up to 8 % on Intel, hints into L2 less or
  // none. Tensors of one pass are a stream, which hardware follows by itself, but not into the next
  // page: there they gain 1 to 2 % on AMD.
  const int64_t least_prefetch = kPrefetchBytes / int64_t(sizeof(Stored));
  const int64_t prefetch =
      descriptor.filter_numel > least_prefetch ? descriptor.filter_numel : least_prefetch;
  const Filter<Stored> tensor{
      reinterpret_cast<Stored*>(descriptor.param),
      reinterpret_cast<const Stored*>(grad),
      reinterpret_cast<Stored*>(descriptor.momentum_buffer),
      reinterpret_cast<int16_t*>(descriptor.param_remainder),
      descriptor.numel,
      prefetch};
  for (int64_t number = first_filter; number < last_filter; ++number) {
    Filter<Stored> filter = tensor.from(number * descriptor.filter_numel);
    if (filter.numel > descriptor.filter_numel) filter.numel = descriptor.filter_numel;
    update_filter(filter, descriptor, hyper, number);
  }
}

// Updates the filters whose first unit of work lies in [begin, end).
void step_range(const TensorDescriptor* descriptors, const int64_t* grads, int64_t descriptor_count,
                const GroupDescriptor* groups, double inverse_scale, int64_t begin, int64_t end) {
  int64_t low = 0, high = descriptor_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (descriptors[middle].first_work <= begin ? low : high) = middle;
  }
  for (; low < descriptor_count && descriptors[low].first_work < end; ++low) {
    const TensorDescriptor& descriptor = descriptors[low];
    if (!grads[low]) continue;
    const int64_t filters = (descriptor.numel + descriptor.filter_numel - 1) / descriptor.filter_numel;
    const int64_t work = descriptor.filter_numel + kFilterWork;
    const auto filter_from = [&](int64_t unit) {
      const int64_t number = (unit - descriptor.first_work + work - 1) / work;
      return number < filters ? number : filters;
    };
    const int64_t first_filter = begin > descriptor.first_work ? filter_from(begin) : 0;
    const int64_t last_filter = filter_from(end);
    const GroupDescriptor& group = groups[descriptor.group];
    switch (descriptor.dtype) {
      case kFloat32:
        step_tensor<float>(descriptor, grads[low], group, inverse_scale, first_filter, last_filter);
        break;
      case kFloat64:
        step_tensor<double>(descriptor, grads[low], group, inverse_scale, first_filter, last_filter);
        break;
      case kBFloat16:
        step_tensor<BFloat16>(descriptor, grads[low], group, inverse_scale, first_filter, last_filter);
        break;
      default:
        step_tensor<Float16>(descriptor, grads[low], group, inverse_scale, first_filter, last_filter);
    }
  }
}

}  // namespace CZM_ARCH
}  // namespace czm
