// Reads the addresses of tensors by DLPack's exchange API, which is how C code reads a torch.Tensor
// without torch's own ABI: what benchmarks/host_time.py takes as the floor of reading one.
#include <ATen/dlpack.h>
#include <Python.h>

#include <cstdint>

namespace {

// addresses(exchange_api, tensors) -> the sum of the addresses, so that each is read.
PyObject* addresses(PyObject*, PyObject* arguments) {
  PyObject *capsule, *tensors;
  if (!PyArg_ParseTuple(arguments, "OO!", &capsule, &PyList_Type, &tensors)) return nullptr;
  const auto* const api =
      static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return nullptr;
  uint64_t sum = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(PyList_GET_ITEM(tensors, i), &tensor) != 0) return nullptr;
    sum += reinterpret_cast<uint64_t>(tensor.data);
  }
  return PyLong_FromUnsignedLongLong(sum);
}

PyMethodDef methods[] = {{"addresses", addresses, METH_VARARGS, nullptr}, {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "czm_addresses", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_czm_addresses() { return PyModule_Create(&definition); }
