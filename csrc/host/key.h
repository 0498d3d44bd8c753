// What a call is recognised by, so that what was chosen for it is found again.
#pragma once

#include <Python.h>

#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cstdint>

#include "layer.h"

namespace fusedshape {

// What a call is recognised by: sizes, strides and dtypes of its tensors, and its other arguments.
// Strings and objects are taken by identity.
class Key {
 public:
  // Each `add` returns whether the argument can be part of a key.
  bool add_tensor(PyObject* object) {
    if (object == Py_None) {
      return add(0);
    }
    if (!THPVariable_CheckExact(object)) {
      return false;
    }
    const Tensor& x = THPVariable_Unpack(object);
    if (!is_plain(x)) {
      return false;
    }
    add(1 + static_cast<int64_t>(x.scalar_type()));
    add(x.dim());
    for (const int64_t size : x.sizes()) {
      add(size);
    }
    for (const int64_t stride : x.strides()) {
      add(stride);
    }
    return true;
  }

  bool add_argument(PyObject* object) {
    if (PyLong_CheckExact(object)) {
      return add(1) && add_integer(object);
    }
    if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
      add(PyTuple_CheckExact(object) ? 2 : 3);
      add(size);
      for (Py_ssize_t i = 0; i < size; ++i) {
        if (!add_integer(PySequence_Fast_GET_ITEM(object, i))) {
          return false;
        }
      }
      return true;
    }
    if (PyFloat_CheckExact(object)) {
      return false;  // no argument is one, so that Python may say what is wrong
    }
    add(4);
    if (!PyUnicode_CheckExact(object)) {
      return add_object(object);
    }
    Py_INCREF(object);
    PyUnicode_InternInPlace(&object);  // equal strings become one
    const THPObjectPtr own(object);
    return add_object(object);
  }

  // The key keeps the object alive, so that no other can have its address.
  bool add_object(PyObject* object) {
    Py_INCREF(object);
    objects_.emplace_back(object);
    return add(reinterpret_cast<int64_t>(object));
  }

  bool operator==(const Key& other) const { return words_ == other.words_; }

  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 0x9e3779b97f4a7c15;
      for (const int64_t word : key.words_) {
        hash = (hash ^ static_cast<uint64_t>(word)) * 0xff51afd7ed558ccd;
        hash ^= hash >> 32;
      }
      return hash;
    }
  };

 private:
  bool add(int64_t word) {
    words_.push_back(word);
    return true;
  }

  bool add_integer(PyObject* object) {
    if (!PyLong_CheckExact(object)) {
      return false;
    }
    int overflow = 0;
    add(PyLong_AsLongLongAndOverflow(object, &overflow));
    return overflow == 0;
  }

  c10::SmallVector<int64_t, 64> words_;
  c10::SmallVector<THPObjectPtr, 8> objects_;
};

}  // namespace fusedshape
