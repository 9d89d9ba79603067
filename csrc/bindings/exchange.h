// torch's tensors seen through DLPack's C interface, without a Python object for each of their properties.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"

namespace sk {

// Whether tensors of torch can be seen through what torch.Tensor offers as its exchange interface; others may have put
// theirs there. Before version 1.2 strides may be null.
inline const dlpack::Exchange* usable_exchange(pybind11::handle capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
  const auto* e = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  return e->major == dlpack::kMajor && e->minor >= dlpack::kMinor && e->view ? e : nullptr;
}

struct Layout {
  dlpack::Device device;
  dlpack::DataType dtype;
  std::vector<std::int64_t> sizes, strides;

  explicit Layout(const dlpack::Tensor& t)
      : device(t.device),
        dtype(t.dtype),
        sizes(t.shape, t.shape + t.ndim),
        strides(t.strides, t.strides + t.ndim) {}
  bool is(const dlpack::Tensor& t) const {
    return t.device == device && t.dtype == dtype && static_cast<std::size_t>(t.ndim) == sizes.size() &&
           std::equal(sizes.begin(), sizes.end(), t.shape) &&
           std::equal(strides.begin(), strides.end(), t.strides);
  }
};

class Tensors {
 public:
  // type: torch.Tensor, whose interface `capsule` is.
  Tensors(pybind11::object type, pybind11::object capsule)
      : type_(std::move(type)), capsule_(std::move(capsule)), exchange_(usable_exchange(capsule_)) {
    if (!exchange_) throw pybind11::value_error("no exchange interface to tensors");
  }

  dlpack::Tensor view(PyObject* x) const {
    if (!PyObject_TypeCheck(x, reinterpret_cast<PyTypeObject*>(type_.ptr())))
      throw pybind11::type_error(std::string("a list of calls takes tensors, got ") + Py_TYPE(x)->tp_name);
    dlpack::Tensor t;
    if (exchange_->view(x, &t)) throw pybind11::error_already_set();
    return t;
  }
  // Of what is a tensor; false where it has no plain memory.
  bool sees(PyObject* x, dlpack::Tensor& t) const {
    if (exchange_->view(x, &t) == 0) return t.data != nullptr;
    PyErr_Clear();
    return false;
  }
  std::vector<Layout> layouts(const pybind11::tuple& tensors) const {
    std::vector<Layout> found;
    for (const auto& t : tensors) found.emplace_back(view(t.ptr()));
    return found;
  }

  static std::uintptr_t address(const dlpack::Tensor& t) {
    return reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
  }

 private:
  pybind11::object type_, capsule_;
  const dlpack::Exchange* exchange_;
};

}  // namespace sk
