// The CUDA kernels on the host, for Python. Tensors come as addresses.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string_view>

#include "cuda_host.h"

#include "cuda/add_relu_noise_kernel.cuh"
#include "cuda/exp_scale_kernel.cuh"
#include "cuda/step_launch.h"

namespace {

template <class T> T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

void launch_step(int64_t dtype, bool has_large_blocks, int64_t items, int64_t blocks,
                 pybind11::bytes grads, int64_t tensors, pybind11::bytes hyperparameters,
                 pybind11::bytes hyperparameter_addresses, int64_t groups, int64_t grad_scale,
                 int64_t found_inf) {
  const auto data = [](const pybind11::bytes& bytes) {
    return static_cast<const void*>(std::string_view(bytes).data());
  };
  const czm::StepLaunch step{dtype,
                             has_large_blocks,
                             pointer<const czm::WorkItem>(items),
                             blocks,
                             data(grads),
                             tensors,
                             data(hyperparameters),
                             data(hyperparameter_addresses),
                             groups,
                             pointer<const float>(grad_scale),
                             pointer<const float>(found_inf)};
  const auto run = [&](auto kernel, const auto& arguments, int) {
    cuda_host::run_blocks(unsigned(blocks), czm::kThreads, [&] { kernel(arguments); });
  };
#ifdef CZM_TWO_KERNELS
  // Races do not depend on more, and compiling does.
  const auto arguments = czm::arguments_of<czm::kFewWords>(step);
  using czm::BlockSize, czm::kFewWords, czm::step_kernel;
  if (dtype == czm::kFloat32 && has_large_blocks) {
    return run(step_kernel<kFewWords, float, BlockSize::large>, arguments, 0);
  }
  if (dtype == czm::kFloat32) return run(step_kernel<kFewWords, float, BlockSize::small>, arguments, 0);
  if (dtype == czm::kBFloat16 && !has_large_blocks) {
    return run(step_kernel<kFewWords, __nv_bfloat16, BlockSize::small>, arguments, 0);
  }
  throw std::invalid_argument("not compiled");
#else
  czm::choose_kernel(step, run);
#endif
}

template <class Body> void for_dtype(int64_t dtype, const Body& body) {
  switch (dtype) {
    case czm::kFloat32: return body(float());
    case czm::kFloat64: return body(double());
    case czm::kBFloat16: return body(__nv_bfloat16());
    default: return body(__half());
  }
}

// `is_wide` takes the division of tensors too large for a test.
template <class Stored, class Launch, class... Address>
void for_noise(int64_t noise, int64_t count, int64_t channels, int64_t area, bool channels_last,
               bool is_wide, const Launch& launch, const Address*... addresses) {
  czm::choose_elementwise<Stored>(
      count,
      [&](auto size, auto divide_by) {
        const auto run = [&](const auto& factors) {
          cuda_host::run_blocks(czm::elementwise_blocks<size>(count), czm::kElementwiseThreads,
                                [&] { launch(size, factors); });
        };
        const auto* values = pointer<const czm::opmath_type<Stored>>(noise);
        if (is_wide) {
          run(czm::noise_of<Stored>(values, channels, area, channels_last,
                                    [](int64_t divisor) { return czm::WideDivider(divisor); }));
        } else {
          run(czm::noise_of<Stored>(values, channels, area, channels_last, divide_by));
        }
      },
      addresses...);
}

void add_relu_noise(int64_t dtype, int64_t output, int64_t x, int64_t residual, int64_t noise,
                    int64_t count, int64_t channels, int64_t area, bool channels_last,
                    bool is_wide) {
  for_dtype(dtype, [&](auto zero) {
    using Stored = decltype(zero);
    auto* out = pointer<Stored>(output);
    const auto *a = pointer<const Stored>(x), *b = pointer<const Stored>(residual);
    for_noise<Stored>(
        noise, count, channels, area, channels_last, is_wide,
        [&](auto size, const auto& factors) {
          czm::add_relu_noise_kernel<size>(out, a, b, factors, count);
        },
        out, a, b);
  });
}

void add_relu_noise_backward(int64_t dtype, int64_t grad_input, int64_t grad, int64_t output,
                             int64_t noise, int64_t count, int64_t channels, int64_t area,
                             bool channels_last, bool is_wide) {
  for_dtype(dtype, [&](auto zero) {
    using Stored = decltype(zero);
    auto* result = pointer<Stored>(grad_input);
    const auto *g = pointer<const Stored>(grad), *out = pointer<const Stored>(output);
    for_noise<Stored>(
        noise, count, channels, area, channels_last, is_wide,
        [&](auto size, const auto& factors) {
          czm::add_relu_noise_backward_kernel<size>(result, g, out, factors, count);
        },
        result, g, out);
  });
}

void exp_scale(int64_t dtype, int64_t weight, int64_t direction, int64_t log_scale,
               int64_t filters, int64_t filter_numel) {
  for_dtype(dtype, [&](auto zero) {
    using Stored = decltype(zero);
    auto* out = pointer<Stored>(weight);
    const auto* in = pointer<const Stored>(direction);
    czm::choose_filter_packs<Stored>(
        filter_numel,
        [&](auto size) {
          cuda_host::run_blocks(unsigned(filters), czm::kFilterThreads, [&] {
            czm::exp_scale_kernel<size>(out, in, pointer<const czm::opmath_type<Stored>>(log_scale),
                                        filter_numel);
          });
        },
        out, in);
  });
}

void exp_scale_backward(int64_t dtype, int64_t grad_direction, int64_t grad_log_scale,
                        int64_t grad, int64_t direction, int64_t log_scale, int64_t filters,
                        int64_t filter_numel) {
  for_dtype(dtype, [&](auto zero) {
    using Stored = decltype(zero);
    using T = czm::opmath_type<Stored>;
    auto* out = pointer<Stored>(grad_direction);
    const auto *dw = pointer<const Stored>(grad), *v = pointer<const Stored>(direction);
    czm::choose_filter_packs<Stored>(
        filter_numel,
        [&](auto size) {
          cuda_host::run_blocks(unsigned(filters), czm::kFilterThreads, [&] {
            czm::exp_scale_backward_kernel<size>(out, pointer<T>(grad_log_scale), dw, v,
                                                 pointer<const T>(log_scale), filter_numel);
          });
        },
        out, dw, v);
  });
}

}  // namespace

PYBIND11_MODULE(CZM_HOST_MODULE, module) {
  module.attr("block_threads") = CZM_BLOCK_THREADS;
  module.attr("few_words") = czm::kFewWords;
  module.attr("most_words") = czm::kManyWords;
  module.def("launch_step", launch_step);
  module.def("add_relu_noise", add_relu_noise);
  module.def("add_relu_noise_backward", add_relu_noise_backward);
  module.def("exp_scale", exp_scale);
  module.def("exp_scale_backward", exp_scale_backward);
  module.def("skip_barrier", cuda_host::skip_barrier);
  module.def("barriers_met", cuda_host::barriers_met);
}
