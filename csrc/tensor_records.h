// Fetches what tensors are read from into the cache, many at once. After a backward pass none of it is
// there, and reading one tensor follows a chain of addresses: its Python object, the record that this
// names, the storage that the record names. One chain after the other, they took two thirds of the time
// of reading.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>

#include "prefetch.h"

namespace czm {

// Where a tensor keeps these addresses is learned from a tensor, not assumed, and nothing is fetched
// where it cannot be.
class TensorRecords {
 public:
  TensorRecords() = default;

  // `sizes` and `storage`: where the record of `tensor` keeps its sizes, and the address of its storage.
  TensorRecords(PyObject* tensor, const void* sizes, uint64_t storage) {
    const auto* const words = reinterpret_cast<const uint64_t*>(tensor);
    const auto end = reinterpret_cast<uint64_t>(sizes);
    const size_t count = object_words(tensor);
    for (size_t n = sizeof(PyObject) / sizeof(uint64_t); n < count; ++n) {
      // The sizes lie in the record, near its begin; words up to there are the record's.
      if (words[n] == 0 || words[n] > end || end - words[n] >= kMostBeforeSizes) continue;
      record_ = n;
      const auto* const record = reinterpret_cast<const uint64_t*>(words[n]);
      named_ = (end - words[n]) / sizeof(uint64_t);
      for (size_t k = 0; k < named_; ++k)
        if (storage && record[k] == storage) storage_ = k;
      return;
    }
  }

  // Each of these looks at what the one before it has fetched. `object` is null or of a type that
  // `tensor` was.
  CZM_PREFETCHES static void fetch_object(PyObject* object) { __builtin_prefetch(object); }

  CZM_PREFETCHES void fetch_record(PyObject* object) const {
    if (record_) fetch(record_of(object), kRecordBytes);
  }

  CZM_PREFETCHES void fetch_storage(PyObject* object) const {
    if (!storage_) return;
    const auto* const record = static_cast<const void* const*>(record_of(object));
    if (record && record[storage_]) fetch(record[storage_], kNamedBytes);
  }

  // All that the record names before the sizes: of a parameter autograd's data and the version, too.
  CZM_PREFETCHES void fetch_named(PyObject* object) const {
    if (!record_) return;
    const auto* const record = static_cast<const void* const*>(record_of(object));
    for (size_t k = 0; record && k < named_; ++k)
      if (reinterpret_cast<uint64_t>(record[k]) >= kLeastAddress) fetch(record[k], kNamedBytes);
  }

 private:
  static constexpr size_t kLineBytes = 64, kRecordBytes = 256, kNamedBytes = 128;
  // Less than any record has, so that sizes further off lie in memory of their own.
  static constexpr uint64_t kMostBeforeSizes = 128;
  // Words below are numbers.
  static constexpr uint64_t kLeastAddress = uint64_t(1) << 40;

  static size_t object_words(PyObject* object) {
    PyObject* const size =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__basicsize__");
    const size_t bytes = size ? PyLong_AsSize_t(size) : 0;
    Py_XDECREF(size);
    PyErr_Clear();
    return bytes / sizeof(uint64_t);
  }

  const void* record_of(PyObject* object) const {
    return reinterpret_cast<const void* const*>(object)[record_];
  }

  CZM_PREFETCHES static void fetch(const void* address, size_t bytes) {
    for (size_t offset = 0; offset < bytes; offset += kLineBytes)
      __builtin_prefetch(static_cast<const char*>(address) + offset);
  }

  // Words of an object and of a record; 0 where it was not found.
  size_t record_ = 0, storage_ = 0;
  size_t named_ = 0;  // words of a record before its sizes
};

}  // namespace czm
