// The Python function czm_fused._C_cpu.step; see step.cpp.
#pragma once

#include <Python.h>

namespace czm {

extern const char kStepDoc[];
PyObject* step(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace czm
