// Reads the live tensors of one step: finds the gradients and the state of the parameters, checks that
// each tensor is what the plan was built for, and returns a copy of the plan's descriptors with their
// addresses. Nothing is kept between two calls.
//
// Tensors are read through DLPack's exchange API, which every torch.Tensor offers to C code: it costs
// a sixth of passing them to an operator. It refuses what has no memory of its own (sparse, meta,
// functorch's wrappers); what it does not tell is asked here: the type, the negative bit, and storage
// that was resized to nothing.
#include "read_tensors.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "descriptors.h"
#include "tensor_records.h"

// DLPack's header is plain C and no part of torch's ABI.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

namespace czm {
namespace {

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// torch's own objects, passed with each call: (exchange API, Tensor, Parameter, Tensor.grad, the method
// is_neg of some tensor, Tensor.storage_offset, that tensor, the address of its storage).
struct Torch {
  DLPackDLTensorFromPyObjectNoSync read;
  PyObject *tensor_type, *parameter_type, *grad, *storage_offset;
  descrgetfunc get_grad;
  // A method without arguments is one C function for all tensors; called as such it takes less time.
  PyCFunction is_neg;

  explicit Torch(PyObject* objects) {
    auto* const api = static_cast<DLPackExchangeAPI*>(
        PyCapsule_GetPointer(PyTuple_GetItem(objects, 0), "dlpack_exchange_api"));
    read = api ? api->dltensor_from_py_object_no_sync : nullptr;
    tensor_type = PyTuple_GetItem(objects, 1);
    parameter_type = PyTuple_GetItem(objects, 2);
    grad = PyTuple_GetItem(objects, 3);
    get_grad = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad), Py_tp_descr_get));
    PyObject* const method = PyTuple_GetItem(objects, 4);
    is_neg = PyCFunction_GetFunction(method);
    if (PyCFunction_GetFlags(method) != METH_NOARGS)
      PyErr_SetString(PyExc_TypeError, "torch.Tensor.is_neg takes arguments");
    storage_offset = PyTuple_GetItem(objects, 5);
  }

  // `objects` as the constructor takes them.
  TensorRecords learn_records(PyObject* objects) const {
    PyObject* const tensor = PyTuple_GetItem(objects, 6);
    DLTensor sample;
    if (!tensor || !is_plain(tensor) || read(tensor, &sample) != 0) {
      PyErr_Clear();
      return {};
    }
    return {tensor, sample.shape, PyLong_AsUnsignedLongLong(PyTuple_GetItem(objects, 7))};
  }

  // A subclass may be anything.
  bool is_plain(PyObject* object) const {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_type || type == parameter_type;
  }

  PyObject* grad_of(PyObject* param) const {
    if (!is_plain(param)) return PyObject_GetAttrString(param, "grad");
    return get_grad(grad, param, reinterpret_cast<PyObject*>(Py_TYPE(param)));
  }

  bool has_negative_bit(PyObject* tensor) const {
    const Owned result(is_neg(tensor, nullptr));
    return result.get() != Py_False;
  }

  // Storage resized to nothing has no memory, and its tensors' addresses are their offsets. No real
  // address is below the first page, or equal to its offset.
  bool has_memory(PyObject* tensor, const DLTensor& read) const {
    constexpr uint64_t kLowAddresses = uint64_t(1) << 40;
    const auto address = reinterpret_cast<uint64_t>(read.data);
    if (address >= kLowAddresses) return true;
    if (address == 0) return false;
    const Owned offset(PyObject_CallFunctionObjArgs(storage_offset, tensor, nullptr));
    return offset && address != PyLong_AsUnsignedLongLong(offset.get()) * read.dtype.bits / 8;
  }
};

// As many tensors as a small cache holds all of.
constexpr size_t kFetchedAtOnce = 64;

// Fetches the next parameters, and what finding their gradients takes.
void fetch_params(const Torch& torch, const TensorRecords& records, PyObject* params, Py_ssize_t begin) {
  const Py_ssize_t end = std::min(PyList_Size(params), begin + Py_ssize_t(kFetchedAtOnce));
  const auto param = [&](Py_ssize_t i) { return PyList_GetItem(params, i); };
  for (Py_ssize_t i = begin; i < end; ++i) records.fetch_object(param(i));
  for (Py_ssize_t i = begin; i < end; ++i)
    if (torch.is_plain(param(i))) records.fetch_record(param(i));
  for (Py_ssize_t i = begin; i < end; ++i)
    if (torch.is_plain(param(i))) records.fetch_named(param(i));
}

// What a tensor must be, as written by czm_fused/ops/step/tensors.py: dtype, dimensions, sizes,
// strides. A stride of -1 may be anything.
class Layout {
 public:
  explicit Layout(const int64_t* words) : words_(words) {}

  const int64_t* end() const { return words_ + 2 + 2 * dim(); }

  bool matches(const DLTensor& tensor) const {
    const int64_t dtype = int64_t(tensor.dtype.code) << 8 | tensor.dtype.bits;
    if (dtype != words_[0] || tensor.ndim != dim()) return false;
    const int64_t *sizes = words_ + 2, *strides = sizes + dim();
    for (int64_t d = 0; d < dim(); ++d)
      if (tensor.shape[d] != sizes[d] || (strides[d] >= 0 && tensor.strides[d] != strides[d]))
        return false;
    return true;
  }

  bool is_empty() const {
    for (int64_t d = 0; d < dim(); ++d)
      if (words_[2 + d] == 0) return true;
    return false;
  }

 private:
  int64_t dim() const { return words_[1]; }

  const int64_t* words_;
};

// A tensor to be read.
struct Found {
  PyObject* object;  // null if it was not found
  Layout layout;
  // An address at which this tensor's memory was found readable before, or 0: asking for the negative
  // bit takes longer than all else.
  int64_t known;
  int64_t* address;  // where it is to be written
  Py_ssize_t param;  // whose tensor it is
};

class Reader {
 public:
  Reader(const Torch& torch, const TensorRecords& records, const int64_t* device)
      : torch_(torch), records_(records), device_type_(device[0]), device_id_(device[1]) {}

  // Writes the addresses of all tensors. Returns the first that is not as its layout says, or null.
  const Found* read(const std::vector<Found>& found) const {
    fetch(found);
    // Reading one may run Python, which may drop another.
    std::vector<Owned> held;
    held.reserve(found.size());
    for (const Found& tensor : found) {
      Py_IncRef(tensor.object);
      held.emplace_back(tensor.object);
    }
    for (const Found& tensor : found)
      if (!read(tensor)) return &tensor;
    return nullptr;
  }

 private:
  CZM_PREFETCHES void fetch(const std::vector<Found>& found) const {
    for (const Found& tensor : found) records_.fetch_object(tensor.object);
    for (const Found& tensor : found)
      if (is_plain(tensor)) records_.fetch_record(tensor.object);
    for (const Found& tensor : found)
      if (is_plain(tensor)) records_.fetch_storage(tensor.object);
  }

  bool is_plain(const Found& found) const { return found.object && torch_.is_plain(found.object); }

  bool read(const Found& found) const {
    DLTensor tensor;
    if (!is_plain(found) || torch_.read(found.object, &tensor) != 0) return false;
    if (tensor.device.device_type != device_type_ || tensor.device.device_id != device_id_ ||
        !found.layout.matches(tensor))
      return false;
    const auto address = reinterpret_cast<int64_t>(tensor.data);
    *found.address = address;
    if ((address && address == found.known) || found.layout.is_empty()) return true;
    return torch_.has_memory(found.object, tensor) && !torch_.has_negative_bit(found.object);
  }

  const Torch& torch_;
  const TensorRecords& records_;
  int64_t device_type_, device_id_;
};

// The state of each parameter: a list of dictionaries, or for each name a list of the tensors of the
// parameters that have it, in a tuple. Each tensor is asked for once, in the order of the parameters.
class States {
 public:
  States(PyObject* states, PyObject* names) : states_(states), has_lists_(PyTuple_Check(states)) {
    for (int name = 0; name < kStateCount; ++name)
      names_[name] = PyTuple_GetItem(has_lists_ ? states : names, name);
  }

  PyObject* get(Py_ssize_t param, int name) {
    if (has_lists_) return PyList_GetItem(names_[name], next_[name]++);
    PyObject* const state = PyList_GetItem(states_, param);
    if (!state || !PyDict_Check(state)) return nullptr;
    return PyDict_GetItemWithError(state, names_[name]);
  }

 private:
  PyObject *states_, *names_[kStateCount];  // or the lists
  bool has_lists_;
  Py_ssize_t next_[kStateCount] = {};
};

// Appends the tensors of one parameter. Returns false if it has a gradient, but no place in the plan.
bool find_param(const int64_t* layouts, PyObject* param, PyObject* grad, States& states,
                Py_ssize_t index, const TensorDescriptor* before, TensorDescriptor& descriptor,
                int64_t* grad_address, std::vector<Found>& found) {
  static constexpr TensorDescriptor kUnknown{};
  if (!before) before = &kUnknown;
  const bool is_planned = *layouts++ != 0;
  *grad_address = 0;
  if (grad == Py_None) return true;
  if (!is_planned) return false;
  const Layout layout(layouts);
  found.push_back({param, layout, before->param, &descriptor.param, index});
  found.push_back({grad, layout, 0, grad_address, index});
  layouts = layout.end();
  const int64_t* const known = &before->param + 1;
  int64_t* const addresses = &descriptor.param + 1;
  for (int name = 0; name < kStateCount; ++name) {
    if (*layouts++ == 0) continue;
    const Layout state(layouts);
    found.push_back({states.get(index, name), state, known[name], addresses + name, index});
    layouts = state.end();
  }
  return true;
}

}  // namespace

const char kFindTensorsDoc[] =
    "find_tensors(torch, params, state)\n\n"
    "Return the gradients of the parameters, and their values in the dictionary `state`, as two lists;\n"
    "None for what there is not.";

PyObject* find_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyList_Check(arguments[1]) || !PyDict_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "find_tensors takes a tuple, a list and a dict");
    return nullptr;
  }
  const Torch torch(arguments[0]);
  if (PyErr_Occurred()) return nullptr;
  PyObject *const params = arguments[1], *const state = arguments[2];
  const TensorRecords records = torch.learn_records(arguments[0]);
  const Py_ssize_t params_count = PyList_Size(params);
  const Owned grads(PyList_New(params_count)), states(PyList_New(params_count));
  if (!grads || !states) return nullptr;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; i < params_count; ++i) {
    if (i % kFetchedAtOnce == 0) fetch_params(torch, records, params, i);
    PyObject* const param = PyList_GetItem(params, i);
    PyObject* const grad = param ? torch.grad_of(param) : nullptr;
    if (!grad) return nullptr;
    PyList_SetItem(grads.get(), i, grad);
    // Hashing a tensor calls Python, so the order of the parameters is tried first.
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t next = position;
    if (PyDict_Next(state, &next, &key, &value) && key == param) {
      position = next;
    } else {
      value = PyDict_GetItemWithError(state, param);
      if (!value && PyErr_Occurred()) return nullptr;
    }
    if (!value) value = Py_None;
    Py_IncRef(value);
    PyList_SetItem(states.get(), i, value);
  }
  return PyTuple_Pack(2, grads.get(), states.get());
}

const char kReadTensorsDoc[] =
    "read_tensors(torch, descriptors, layouts, names, params, grads, states, before)\n\n"
    "Return the descriptors with the addresses of these tensors, followed by the addresses of the\n"
    "gradients, and True if none of these is 0; or the index of the first parameter that is not as\n"
    "`layouts` says. `before` are the addresses of an earlier call, or None.";

PyObject* read_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 8) {
    PyErr_SetString(PyExc_TypeError, "read_tensors takes 8 arguments");
    return nullptr;
  }
  PyObject *const planned = arguments[1], *const params = arguments[4], *const grads = arguments[5];
  const Torch torch(arguments[0]);
  const char* const layouts = PyBytes_AsString(arguments[2]);
  if (PyErr_Occurred() || !torch.read || !layouts) return nullptr;
  const Py_ssize_t size = PyBytes_Size(planned), params_count = PyList_Size(params);
  if (size != params_count * Py_ssize_t(sizeof(TensorDescriptor)) ||
      PyList_Size(grads) != params_count) {
    PyErr_SetString(PyExc_ValueError, "read_tensors takes a descriptor and a gradient a parameter");
    return nullptr;
  }
  Owned result(PyBytes_FromStringAndSize(nullptr, size + params_count * Py_ssize_t(sizeof(int64_t))));
  if (!result) return nullptr;
  char* const bytes = PyBytes_AsString(result.get());
  std::memcpy(bytes, PyBytes_AsString(planned), size);
  auto* const descriptors = reinterpret_cast<TensorDescriptor*>(bytes);
  auto* const grad_addresses = reinterpret_cast<int64_t*>(bytes + size);

  const TensorDescriptor* before = nullptr;
  if (PyBytes_Check(arguments[7]) && PyBytes_Size(arguments[7]) == PyBytes_Size(result.get()))
    before = reinterpret_cast<const TensorDescriptor*>(PyBytes_AsString(arguments[7]));

  // The device, then for each parameter the number of its words and these.
  const auto* words = reinterpret_cast<const int64_t*>(layouts);
  const TensorRecords records = torch.learn_records(arguments[0]);
  const Reader reader(torch, records, words);
  words += 2;
  States states(arguments[6], arguments[3]);
  Py_ssize_t wrong = params_count;
  bool is_complete = true;
  std::vector<Found> found;
  for (Py_ssize_t i = 0; i < params_count && wrong == params_count; ++i) {
    PyObject* const grad = PyList_GetItem(grads, i);
    if (!find_param(words + 1, PyList_GetItem(params, i), grad, states, i,
                    before ? before + i : nullptr, descriptors[i], grad_addresses + i, found))
      wrong = i;
    words += *words;
    if (found.size() < kFetchedAtOnce && i + 1 < params_count && wrong != i) continue;
    if (const Found* const tensor = reader.read(found)) wrong = tensor->param;
    found.clear();
  }
  if (wrong < params_count) {
    // Whatever made a tensor unreadable is told by its name, in Python.
    PyErr_Clear();
    return PyLong_FromSsize_t(wrong);
  }
  for (Py_ssize_t i = 0; i < params_count; ++i) is_complete &= grad_addresses[i] != 0;
  return PyTuple_Pack(2, result.get(), is_complete ? Py_True : Py_False);
}

}  // namespace czm
