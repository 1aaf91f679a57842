// The Python function czm_fused._C_cpu.read_tensors; see read_tensors.cpp.
#pragma once

#include <Python.h>

namespace czm {

extern const char kReadTensorsDoc[];
PyObject* read_tensors(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace czm
