// The Python module czm_fused._C_cuda. Importing it loads the library, and with it the kernels that the
// files beside this one register with torch. Its attribute `architectures` names the compute
// capabilities that they were compiled for, as in "8.0,9.0,12.0+PTX"; it is empty where unknown.
#include <Python.h>

#define CZM_STRING_OF(...) #__VA_ARGS__
#define CZM_STRING(...) CZM_STRING_OF(__VA_ARGS__)

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0,
                                   nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "architectures",
                                           CZM_STRING(CZM_CUDA_ARCHITECTURES)) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
