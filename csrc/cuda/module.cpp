// The Python module czm_fused._C_cuda. Importing it loads the library, and with it the kernels that the
// files beside this one register with torch. Its attribute `architectures` names the compute
// capabilities that they were compiled for, as in "8.0,9.0,12.0+PTX"; it is empty where unknown.
#include <Python.h>

#include <exception>

#include "step.h"

#define CZM_STRING_OF(...) #__VA_ARGS__
#define CZM_STRING(...) CZM_STRING_OF(__VA_ARGS__)

namespace {

// Returns what body() does, or raises what it throws.
template <class Body> PyObject* raising(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

bool takes(Py_ssize_t expected, Py_ssize_t count) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "takes %zd arguments, but was given %zd", expected, count);
  return false;
}

PyObject* launch_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!takes(12, count)) return nullptr;
  const auto integer = [&](int n) { return PyLong_AsLongLong(arguments[n]); };
  const auto bytes = [&](int n) { return static_cast<const void*>(PyBytes_AsString(arguments[n])); };
  const auto numbers = [&](int n) { return reinterpret_cast<const float*>(integer(n)); };
  const czm::StepLaunch step{integer(1),
                             integer(2) != 0,
                             reinterpret_cast<const czm::WorkItem*>(integer(3)),
                             integer(4),
                             bytes(5),
                             integer(6),
                             bytes(7),
                             bytes(8),
                             integer(9),
                             numbers(10),
                             numbers(11)};
  const int device = int(integer(0));
  if (PyErr_Occurred()) return nullptr;
  return raising([&] {
    czm::launch_step(step, device);
    Py_RETURN_NONE;
  });
}

PyObject* stream_of(PyObject*, PyObject* device) {
  const int index = int(PyLong_AsLong(device));
  if (PyErr_Occurred()) return nullptr;
  return raising([&] {
    const czm::StreamState state = czm::stream_of(index);
    return Py_BuildValue("LO", (long long)(state.id), state.is_capturing ? Py_True : Py_False);
  });
}

PyObject* most_words(PyObject*, PyObject* device) {
  const int index = int(PyLong_AsLong(device));
  if (PyErr_Occurred()) return nullptr;
  return raising([&] { return PyLong_FromLongLong(czm::most_words(index)); });
}

PyObject* keep_on_device(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!takes(2, count)) return nullptr;
  const int index = int(PyLong_AsLong(arguments[0]));
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyErr_Occurred() || PyBytes_AsStringAndSize(arguments[1], &data, &size) < 0) return nullptr;
  return raising([&] { return PyLong_FromLongLong(czm::keep_on_device(index, data, size)); });
}

template <class Function> PyCFunction as_function(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyMethodDef methods[] = {
      {"launch_step", as_function(launch_step), METH_FASTCALL,
       "launch_step(device, dtype, has_large_blocks, items, blocks, grads, tensors, hyperparameters,\n"
       "hyperparameter_addresses, groups, grad_scale, found_inf)\n\n"
       "Launch one step; see csrc/cuda/step.h."},
      {"stream_of", stream_of, METH_O,
       "stream_of(device) -> (id, is_capturing)\n\nReturn the state of the device's current stream."},
      {"most_words", most_words, METH_O,
       "most_words(device) -> int\n\nReturn how many words a launch takes outside of a capture."},
      {"keep_on_device", as_function(keep_on_device), METH_FASTCALL,
       "keep_on_device(device, data) -> int\n\n"
       "Return the address of a copy of `data` that lives as long as the process."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0,
                                   methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "architectures",
                                           CZM_STRING(CZM_CUDA_ARCHITECTURES)) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
