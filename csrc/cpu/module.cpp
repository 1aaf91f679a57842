// The Python module czm_fused._C_cpu. Importing it also registers, with torch, the operators' kernels of
// the files beside this one.
#include <Python.h>

#include "../read_tensors.h"
#include "../descriptors.h"
#include "../update_rule.h"
#include "step.h"

namespace {

// The names that Python's list of them, czm_fused/ops/step/spec.py, is compared with.
#define CZM_NAME(name) #name " "
const char kDescriptorFields[] = CZM_DESCRIPTOR_FIELDS(CZM_NAME);
const char kHyperparameters[] = CZM_HYPERPARAMETERS(CZM_NAME);
#undef CZM_NAME

template <class Function> PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"find_tensors", as_method(czm::find_tensors), METH_FASTCALL, czm::kFindTensorsDoc},
    {"read_tensors", as_method(czm::read_tensors), METH_FASTCALL, czm::kReadTensorsDoc},
    {"step", as_method(czm::step), METH_FASTCALL, czm::kStepDoc},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C_cpu(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1,
                                   methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyModule_AddStringConstant(module, "descriptor_fields", kDescriptorFields);
  PyModule_AddStringConstant(module, "hyperparameters", kHyperparameters);
  return module;
}
