// czm_fused._C_cpu.step: the work of a step split over torch's threads.
#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "../descriptors.h"
#include "../update_rule.h"

namespace czm {

using StepRange = void(const TensorDescriptor* descriptors, const int64_t* grads, int64_t descriptor_count,
                       const GroupDescriptor* groups, double inverse_scale, int64_t begin, int64_t end);

namespace baseline { StepRange step_range; }
#if defined(__x86_64__)
namespace avx2 { StepRange step_range; }
namespace avx512 { StepRange step_range; }
#endif

namespace {

StepRange* best_step_range() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::step_range;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::step_range;
#endif
  return baseline::step_range;
}

// Grain size of parallel_for, in weights: below this, waking a thread takes longer than the work.
constexpr int64_t kGrainSize = 65536;

}  // namespace

const char kStepDoc[] =
    "step(tensors, groups, work, inverse_scale) -> None\n\n"
    "Update the tensors that read_tensors has read, by the hyperparameters of their groups, float64.";

PyObject* step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "step takes 4 arguments");
    return nullptr;
  }
  const char* const tensors = PyBytes_AsString(arguments[0]);
  const char* const groups = tensors ? PyBytes_AsString(arguments[1]) : nullptr;
  if (!groups) return nullptr;
  const int64_t work = PyLong_AsLongLong(arguments[2]);
  const double inverse_scale = PyFloat_AsDouble(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  const auto* const descriptors = reinterpret_cast<const TensorDescriptor*>(tensors);
  const int64_t descriptor_count =
      PyBytes_Size(arguments[0]) / int64_t(sizeof(TensorDescriptor) + sizeof(int64_t));
  const auto* const grads = reinterpret_cast<const int64_t*>(descriptors + descriptor_count);
  const auto* const group_descriptors = reinterpret_cast<const GroupDescriptor*>(groups);
  static StepRange* const step_range = best_step_range();
  Py_BEGIN_ALLOW_THREADS
  torch::stable::parallel_for(0, work, kGrainSize, [&](int64_t begin, int64_t end) {
    step_range(descriptors, grads, descriptor_count, group_descriptors, inverse_scale, begin, end);
  });
  Py_END_ALLOW_THREADS
  Py_IncRef(Py_None);
  return Py_None;
}

}  // namespace czm
