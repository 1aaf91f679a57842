// The Python module czm_fused._C_cpu. It is empty: importing it loads the library, and with it the
// kernels that the files beside this one register with torch.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cpu(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, 0,
                                   nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
