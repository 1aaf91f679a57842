// The Python functions czm_fused._C_cpu.find_tensors and read_tensors; see read_tensors.cpp.
#pragma once

#include <Python.h>

namespace czm {

extern const char kFindTensorsDoc[];
PyObject* find_tensors(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

extern const char kReadTensorsDoc[];
PyObject* read_tensors(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace czm
