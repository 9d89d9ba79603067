// guard(*inputs, *parameters) = function(*inputs, *rest) where nothing but kernels is needed, else NotImplemented: what a
// layer's or a network's call asks before it goes past torch's machinery, asked in one place and from here, for in Python
// each question costs what its code costs to fetch once the kernels have emptied the caches.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/exchange.h"
#include "bindings/function.h"

namespace sk {

struct Conditions {
  pybind11::tuple types;   // of the inputs, exactly
  pybind11::tuple silent;  // functions that return something false
  pybind11::tuple denied;  // functions of an input that return something false
  pybind11::tuple same;    // pairs of a function and what it returns
  // Dicts without an entry. Not those of an object that owns the guard: the collector does not look into it.
  pybind11::tuple empty;
};

class Guard {
 public:
  static constexpr const char* kName = "stripe_kernels.guard";

  // inputs: tensors laid out as those of the calls will be. parameters: tensors or None, the same ones in every call,
  // where and as they are now. function returns what the guard does, or a tuple of only that.
  Guard(pybind11::object function, pybind11::tuple rest, Conditions conditions, Tensors tensors,
        const pybind11::tuple& inputs, const pybind11::tuple& parameters)
      : function_(std::move(function)),
        rest_(std::move(rest)),
        conditions_(std::move(conditions)),
        tensors_(std::move(tensors)),
        inputs_(tensors_.layouts(inputs)) {
    for (const auto& p : parameters) {
      Parameter now{pybind11::reinterpret_borrow<pybind11::object>(p), std::nullopt, 0, 0};
      if (!p.is_none()) {
        const dlpack::Tensor t = tensors_.view(p.ptr());
        now.layout.emplace(t);
        now.address = Tensors::address(t);
        now.version = version(p.ptr());
      }
      parameters_.push_back(std::move(now));
    }
  }

  pybind11::object run(PyObject* const* args, Py_ssize_t n) const {
    if (!holds(args, n)) return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
    std::vector<PyObject*> all(args, args + inputs_.size());
    for (const auto& r : rest_) all.push_back(r.ptr());
    pybind11::object y = owned(PyObject_Vectorcall(function_.ptr(), all.data(), all.size(), nullptr));
    return PyTuple_CheckExact(y.ptr()) && PyTuple_GET_SIZE(y.ptr()) == 1
               ? pybind11::reinterpret_borrow<pybind11::object>(PyTuple_GET_ITEM(y.ptr(), 0))
               : y;
  }

 private:
  struct Parameter {
    pybind11::object tensor;
    std::optional<Layout> layout;
    std::uintptr_t address;
    long version;
  };

  bool holds(PyObject* const* args, Py_ssize_t n) const {
    const Conditions& c = conditions_;
    if (static_cast<std::size_t>(n) != inputs_.size() + parameters_.size()) return false;
    for (const auto& dict : c.empty)
      if (PyDict_Size(dict.ptr())) return false;
    for (std::size_t i = 0; i < inputs_.size(); ++i)
      if (!is_one_of(c.types, reinterpret_cast<PyObject*>(Py_TYPE(args[i])))) return false;
    for (const auto& function : c.silent)
      if (truth(result_of(function.ptr()))) return false;
    for (const auto& pair : c.same)
      if (!equal(result_of(PyTuple_GET_ITEM(pair.ptr(), 0)), PyTuple_GET_ITEM(pair.ptr(), 1))) return false;
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      for (const auto& function : c.denied)
        if (truth(owned(PyObject_CallOneArg(function.ptr(), args[i])))) return false;
      dlpack::Tensor t;
      // What it does not see, it leaves to others to say in their words.
      if (!tensors_.sees(args[i], t) || !inputs_[i].is(t)) return false;
    }
    for (std::size_t i = 0; i < parameters_.size(); ++i)
      if (!is_as_it_was(parameters_[i], args[inputs_.size() + i])) return false;
    return true;
  }

  bool is_as_it_was(const Parameter& p, PyObject* now) const {
    if (p.tensor.ptr() != now) return false;
    if (!p.layout) return true;
    dlpack::Tensor t;
    return tensors_.sees(now, t) && p.layout->is(t) && p.address == Tensors::address(t) &&
           p.version == version(now);
  }

  static long version(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    const long n = PyLong_AsLong(owned(PyObject_GetAttr(tensor, name)).ptr());
    if (n == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return n;
  }

  static bool equal(const pybind11::object& a, PyObject* b) {
    const int is = PyObject_RichCompareBool(a.ptr(), b, Py_EQ);
    if (is < 0) throw pybind11::error_already_set();
    return is;
  }

  static bool is_one_of(const pybind11::tuple& types, const PyObject* type) {
    return std::any_of(types.begin(), types.end(), [=](pybind11::handle t) { return t.ptr() == type; });
  }

  pybind11::object function_;
  pybind11::tuple rest_;
  Conditions conditions_;
  Tensors tensors_;
  std::vector<Layout> inputs_;
  std::vector<Parameter> parameters_;
};

}  // namespace sk
