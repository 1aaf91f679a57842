// The update of one filter by a thread group.
//
// A filter that its thread group can hold in registers is read once: W, dW and the momentum are all under
// way before the first sum. A larger one is read in tiles, and again for its update.
#pragma once

#include "../param_remainder.h"
#include "../update_rule.h"
#include "channel_sums.cuh"
#include "packed_types.cuh"
#include "thread_group.cuh"

namespace czm {

// How many packs of W, of dW and of the momentum a thread holds: what registers allow, since half
// types are computed in float.
template <class Stored> constexpr int kPacks = sizeof(Stored) == 2 ? 3 : 5;
template <class Stored> constexpr int kRegisterWeights = kPacks<Stored> * kWidest<Stored>;

template <class Stored> struct Filter {
  Stored* weight;
  const Stored* grad;
  Stored* momentum;    // null without momentum
  int16_t* remainder;  // null if `weight` is all there is of the weights
  int64_t numel;     // 0 for a thread group without a filter
  int64_t distance;  // from one filter of the tensor to the next
  int64_t taps;      // 1 if CZMG has nothing to do
  bool channels_last;
};

template <class Stored>
__device__ __forceinline__ bool is_aligned(const Filter<Stored>& filter) {
  return are_aligned(filter.weight, filter.grad, filter.momentum, filter.remainder);
}

template <class Stored, int size>
__device__ __forceinline__ Pack<opmath_type<Stored>, size> to_opmath(const Pack<Stored, size>& pack) {
  Pack<opmath_type<Stored>, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) result.values[j] = to_opmath(pack.values[j]);
  return result;
}

template <class Stored, int size>
__device__ __forceinline__ Pack<Stored, size> from_opmath(const Pack<opmath_type<Stored>, size>& pack) {
  Pack<Stored, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) result.values[j] = from_opmath<Stored>(pack.values[j]);
  return result;
}

template <int size>
__device__ __forceinline__ void add_remainders(Pack<float, size>& weight,
                                               const Pack<int16_t, size>& remainder) {
#pragma unroll
  for (int j = 0; j < size; ++j) {
    weight.values[j] = add_remainder(weight.values[j], remainder.values[j]);
  }
}

template <class Stored, int size>
__device__ __forceinline__ Pack<int16_t, size> remainders_of(const Pack<float, size>& weight,
                                                             const Pack<Stored, size>& param) {
  Pack<int16_t, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    result.values[j] = remainder_of(weight.values[j], to_opmath(param.values[j]));
  }
  return result;
}

template <class Stored, int size>
__device__ __forceinline__ Pack<opmath_type<Stored>, size> direction_grads(
    const FilterRule<opmath_type<Stored>>& rule, const Pack<Stored, size>& grad,
    const Pack<opmath_type<Stored>, size>& weight) {
  Pack<opmath_type<Stored>, size> result;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    result.values[j] =
        direction_grad<opmath_type<Stored>>(rule, to_opmath(grad.values[j]), weight.values[j]);
  }
  return result;
}

template <class T, int size>
__device__ __forceinline__ void store_shared(T* to, const Pack<T, size>& pack) {
  constexpr int width = size < kWidest<T> ? size : kWidest<T>;
#pragma unroll
  for (int j = 0; j < size; j += width) {
    Pack<T, width> part;
#pragma unroll
    for (int i = 0; i < width; ++i) part.values[i] = pack.values[j + i];
    store_pack(to + j, part);
  }
}

template <class Stored, int size>
__device__ __forceinline__ void add_products(opmath_type<Stored> (&sums)[2],
                                             const Pack<opmath_type<Stored>, size>& weight,
                                             const Pack<Stored, size>& grad) {
#pragma unroll
  for (int j = 0; j < size; ++j) {
    const opmath_type<Stored> w = weight.values[j];
    sums[0] = multiply_add(w, w, sums[0]);
    sums[1] = multiply_add(opmath_type<Stored>(to_opmath(grad.values[j])), w, sums[1]);
  }
}

// `removed(j)` is what CZMG takes from the gradient of weight j of the pack.
template <class Stored, int size, class Removed>
__device__ __forceinline__ void update_pack(const FilterRule<opmath_type<Stored>>& rule,
                                            Pack<opmath_type<Stored>, size>& weight,
                                            const Pack<Stored, size>& grad,
                                            Pack<Stored, size>& momentum, const Removed& removed) {
  const Pack<opmath_type<Stored>, size> dv = direction_grads(rule, grad, weight);
#pragma unroll
  for (int j = 0; j < size; ++j) {
    opmath_type<Stored> m = to_opmath(momentum.values[j]);
    update_weight<opmath_type<Stored>>(rule, dv.values[j], removed(j), weight.values[j], m);
    momentum.values[j] = from_opmath<Stored>(m);
  }
}

// A filter in the registers of its thread group.
template <class Stored> class RegisterFilter {
 public:
  using T = opmath_type<Stored>;

  // `shared` is the thread group's, a number for each weight it can hold.
  __device__ __forceinline__ RegisterFilter(const Filter<Stored>& filter, T* shared, const ThreadGroup& threads)
      : filter_(filter),
        shared_(shared),
        threads_(threads),
        // Idle groups take the same branch as busy ones, because both branches have a barrier.
        is_direct_(filter.numel % kSize == 0 && filter.distance % kSize == 0 &&
                   is_aligned(filter)) {
    load_weight();
    load(grad_, filter.grad);
    load(momentum_, filter.momentum);
  }

  __device__ __forceinline__ void add_products_to(T (&sums)[2]) const {
#pragma unroll
    for (int k = 0; k < kPacks<Stored>; ++k) add_products(sums, weight_[k], grad_[k]);
  }

  __device__ __forceinline__ void update(const FilterRule<T>& rule) {
    if (filter_.taps == 1) {
      update_removing(rule, [](int) { return T(0); });
    } else {
      const int taps = int(filter_.taps);
      const ChannelTile tile(int(filter_.numel) / taps, taps, filter_.channels_last);
#pragma unroll
      for (int k = 0; k < kPacks<Stored>; ++k) {
        // Zeros beyond the filter, but within the thread group's share.
        if (first(k) < filter_.numel) {
          store_shared(shared_ + first(k), direction_grads(rule, grad_[k], weight_[k]));
        }
      }
      tile.sum_over_taps(shared_, threads_);
      update_removing(rule, [&](int i) { return rule.mean * shared_[tile.place_of_sum(i)]; });
    }
    store_weight();
    if (filter_.momentum) store(filter_.momentum, momentum_);
  }

 private:
  static constexpr int kSize = kWidest<Stored>;
  template <class Element> using Packs = Pack<Element, kSize>[kPacks<Stored>];

  __device__ __forceinline__ int first(int k) const {
    return (k * threads_.size + threads_.rank) * kSize;
  }

  template <class Removed>
  __device__ __forceinline__ void update_removing(const FilterRule<T>& rule,
                                                  const Removed& removed) {
#pragma unroll
    for (int k = 0; k < kPacks<Stored>; ++k) {
      if (first(k) < filter_.numel) {
        update_pack(rule, weight_[k], grad_[k], momentum_[k],
                    [&](int j) { return removed(first(k) + j); });
      }
    }
  }

  __device__ __forceinline__ void load_weight() {
    Packs<Stored> param;
    load(param, filter_.weight);
#pragma unroll
    for (int k = 0; k < kPacks<Stored>; ++k) weight_[k] = to_opmath(param[k]);
    if constexpr (sizeof(Stored) == 2) {
      if (!filter_.remainder) return;
      Packs<int16_t> remainder;
      load(remainder, filter_.remainder);
#pragma unroll
      for (int k = 0; k < kPacks<Stored>; ++k) add_remainders(weight_[k], remainder[k]);
    }
  }

  __device__ __forceinline__ void store_weight() const {
    Packs<Stored> param;
#pragma unroll
    for (int k = 0; k < kPacks<Stored>; ++k) param[k] = from_opmath<Stored>(weight_[k]);
    store(filter_.weight, param);
    if constexpr (sizeof(Stored) == 2) {
      if (!filter_.remainder) return;
      Packs<int16_t> remainder;
#pragma unroll
      for (int k = 0; k < kPacks<Stored>; ++k) remainder[k] = remainders_of(weight_[k], param[k]);
      store(filter_.remainder, remainder);
    }
  }

  template <class Element>
  __device__ __forceinline__ void load(Packs<Element>& packs, const Element* from) const {
    if (is_direct_ || !from) {
#pragma unroll
      for (int k = 0; k < kPacks<Stored>; ++k) {
        packs[k] = {};
        if (from && first(k) < filter_.numel) packs[k] = load_global<kSize>(from + first(k));
      }
      return;
    }
    Element* const staged = reinterpret_cast<Element*>(shared_);
    for (int i = threads_.rank; i < threads_.size * kRegisterWeights<Stored>; i += threads_.size) {
      staged[i] = i < filter_.numel ? *in_global(from + i) : Element{};
    }
    threads_.sync();
#pragma unroll
    for (int k = 0; k < kPacks<Stored>; ++k) packs[k] = load_pack<kSize>(staged + first(k));
    threads_.sync();
  }

  template <class Element>
  __device__ __forceinline__ void store(Element* to, const Packs<Element>& packs) const {
    if (is_direct_) {
#pragma unroll
      for (int k = 0; k < kPacks<Stored>; ++k) {
        if (first(k) < filter_.numel) store_global(to + first(k), packs[k]);
      }
      return;
    }
    Element* const staged = reinterpret_cast<Element*>(shared_);
    threads_.sync();
#pragma unroll
    for (int k = 0; k < kPacks<Stored>; ++k) store_pack(staged + first(k), packs[k]);
    threads_.sync();
    for (int i = threads_.rank; i < filter_.numel; i += threads_.size) *in_global(to + i) = staged[i];
  }

  const Filter<Stored>& filter_;
  T* const shared_;
  const ThreadGroup& threads_;
  const bool is_direct_;
  Packs<T> weight_;
  Packs<Stored> grad_, momentum_;
};

// A filter too large for the registers of its thread group, in packs of `size` weights.
template <class Stored, int size> class TiledFilter {
 public:
  using T = opmath_type<Stored>;

  __device__ __forceinline__ TiledFilter(const Filter<Stored>& filter, T* shared,
                                            const ThreadGroup& threads)
      : filter_(filter), shared_(shared), threads_(threads) {}

  __device__ __forceinline__ void add_products_to(T (&sums)[2]) const {
    double totals[2] = {};
#pragma unroll 4
    for (int64_t i = threads_.rank * size; i < filter_.numel; i += threads_.size * size) {
      T products[2] = {};
      add_products(products, load_weight(i), load_global<size>(filter_.grad + i));
      totals[0] += products[0];
      totals[1] += products[1];
    }
    sums[0] += T(totals[0]);
    sums[1] += T(totals[1]);
  }

  // Removes the same from the gradient of every weight [begin, begin + count) * stride.
  __device__ __forceinline__ void update_range(const FilterRule<T>& rule, int64_t begin,
                                               int64_t count, int64_t stride, T removed) const {
    for (int64_t i = threads_.rank * size; i < count; i += threads_.size * size) {
      update_at(rule, begin + i * stride, [&](int) { return removed; });
    }
  }

  // The channels [channel, channel + count) of `channels`, with all their taps.
  __device__ __forceinline__ void update_channels(const FilterRule<T>& rule, int64_t channel,
                                                  int64_t channels, int count) const {
    const ChannelTile tile(count, int(filter_.taps), filter_.channels_last);
    const auto place = [&](int i) {
      if (!tile.channels_last) return channel * tile.taps + i;
      const int tap = tile.divider.quotient(i);
      return tap * channels + channel + (i - tap * tile.channels);
    };
    for (int i = threads_.rank * size; i < tile.weights(); i += threads_.size * size) {
      const int64_t at = place(i);
      store_shared(shared_ + i, direction_grads(rule, load_global<size>(filter_.grad + at),
                                                load_weight(at)));
    }
    tile.sum_over_taps(shared_, threads_);
    for (int i = threads_.rank * size; i < tile.weights(); i += threads_.size * size) {
      update_at(rule, place(i), [&](int j) { return rule.mean * shared_[tile.place_of_sum(i + j)]; });
    }
  }

  // One channel of any number of taps.
  __device__ __forceinline__ void update_channel(const FilterRule<T>& rule, int64_t channel,
                                                 int64_t channels, T* partial) const {
    static_assert(size == 1);
    const int64_t stride = filter_.channels_last ? channels : 1;
    const int64_t begin = filter_.channels_last ? channel : channel * filter_.taps;
    double total = 0;
    for (int64_t tap = threads_.rank; tap < filter_.taps; tap += threads_.size) {
      const int64_t i = begin + tap * stride;
      total += direction_grads(rule, load_global<1>(filter_.grad + i), load_weight(i)).values[0];
    }
    T sum[1] = {T(total)};
    // Until here, threads may be reading the sums before this one.
    threads_.sync();
    threads_.sum(sum, partial);
    update_range(rule, begin, filter_.taps, stride, rule.mean * sum[0]);
  }

 private:
  __device__ __forceinline__ Pack<T, size> load_weight(int64_t i) const {
    Pack<T, size> weight = to_opmath(load_global<size>(filter_.weight + i));
    if constexpr (sizeof(Stored) == 2) {
      if (filter_.remainder) add_remainders(weight, load_global<size>(filter_.remainder + i));
    }
    return weight;
  }

  __device__ __forceinline__ void store_weight(int64_t i, const Pack<T, size>& weight) const {
    const Pack<Stored, size> param = from_opmath<Stored>(weight);
    store_global(filter_.weight + i, param);
    if constexpr (sizeof(Stored) == 2) {
      if (filter_.remainder) store_global(filter_.remainder + i, remainders_of(weight, param));
    }
  }

  template <class Removed>
  __device__ __forceinline__ void update_at(const FilterRule<T>& rule, int64_t i,
                                            const Removed& removed) const {
    Pack<T, size> weight = load_weight(i);
    const Pack<Stored, size> grad = load_global<size>(filter_.grad + i);
    Pack<Stored, size> momentum{};
    if (filter_.momentum) momentum = load_global<size>(filter_.momentum + i);
    update_pack(rule, weight, grad, momentum, removed);
    store_weight(i, weight);
    if (filter_.momentum) store_global(filter_.momentum + i, momentum);
  }

  const Filter<Stored>& filter_;
  T* const shared_;
  const ThreadGroup& threads_;
};

}  // namespace czm
