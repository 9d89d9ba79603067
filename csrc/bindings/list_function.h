// A CallList as a Python function of torch tensors, with as little as can be between its call and the first kernel.
//
// When a network is called again, its own kernels have pushed Python and torch out of the caches, and steps that take 50
// ns in a loop take microseconds: checks and allocations in Python were .2 of ResNet-56's 1.4 ms (Zen 3, batch 1). So
// tensors are seen through DLPack's C interface, conditions are asked for from here, and the arena stays.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/gil.h"
#include "cpu/call_list.h"

namespace sk {

// What has to hold for a network's call to need its kernels only.
struct Conditions {
  pybind11::tuple types;     // of the inputs, exactly
  pybind11::tuple silent;    // functions that return something false
  pybind11::tuple denied;    // functions of an input that return something false
  pybind11::object threads;  // a function that returns the same number as when the list was made
  long number;
  // Dicts without an entry. Not those of an object that owns the function: the collector does not look into it.
  pybind11::tuple empty;
};

// Whether tensors of torch can be seen through what torch.Tensor offers as its exchange interface; others may have put
// theirs there. Before version 1.2 strides may be null.
inline const dlpack::Exchange* usable_exchange(pybind11::handle capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
  const auto* e = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  return e->major == dlpack::kMajor && e->minor >= dlpack::kMinor && e->view ? e : nullptr;
}

class ListFunction {
 public:
  // list: a CallList; held: what it points to. tensor: torch.Tensor, whose interface `exchange` is. inputs: tensors laid
  // out as those of the calls will be. outputs, arena: functions that make a tensor. parameters: tensors read at each
  // call. The slots of the list are inputs, outputs and parameters in this order. keep: whether an arena waits for the
  // next call.
  ListFunction(pybind11::object list, pybind11::object held, pybind11::object tensor,
               pybind11::object exchange, int threads, const pybind11::tuple& inputs, pybind11::tuple outputs,
               pybind11::tuple parameters, pybind11::object arena, bool keep)
      : list_(std::move(list)),
        held_(std::move(held)),
        calls_(list_.cast<const CallList*>()),
        tensor_(std::move(tensor)),
        capsule_(std::move(exchange)),
        exchange_(usable_exchange(capsule_)),
        threads_(threads),
        outputs_(std::move(outputs)),
        parameters_(std::move(parameters)),
        arena_(std::move(arena)),
        keep_(keep) {
    if (!exchange_) throw pybind11::value_error("no exchange interface to tensors");
    if (threads < 1) throw pybind11::value_error("threads is positive");
    for (const auto& x : inputs) {
      const dlpack::Tensor t = view(x.ptr());
      inputs_.push_back({t.device, t.dtype, {t.shape, t.shape + t.ndim}, {t.strides, t.strides + t.ndim}});
    }
  }

  // A Python function that returns the tuple of outputs, and raises TypeError or ValueError for inputs other than those
  // the list was made for. With conditions: one that returns the first output, and NotImplemented where it may not.
  static pybind11::object bind(std::shared_ptr<ListFunction> list, std::unique_ptr<Conditions> conditions) {
    // NOLINTNEXTLINE(bugprone-casting-through-void): CPython's own way to name a function of another type
    static PyMethodDef method{"list_function", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&enter)),
                              METH_FASTCALL, "The outputs of a list of native calls."};
    auto entry = std::make_unique<Entry>(Entry{std::move(list), std::move(conditions)});
    const pybind11::capsule self(entry.release(), kEntry, [](PyObject* capsule) {
      delete static_cast<Entry*>(PyCapsule_GetPointer(capsule, kEntry));
    });
    return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
  }

 private:
  static constexpr const char* kEntry = "stripe_kernels.list_function";

  struct Entry {
    std::shared_ptr<ListFunction> list;
    std::unique_ptr<Conditions> conditions;
  };

  struct Layout {
    dlpack::Device device;
    dlpack::DataType dtype;
    std::vector<std::int64_t> sizes, strides;

    bool is(const dlpack::Tensor& t) const {
      return t.device == device && t.dtype == dtype && static_cast<std::size_t>(t.ndim) == sizes.size() &&
             std::equal(sizes.begin(), sizes.end(), t.shape) &&
             std::equal(strides.begin(), strides.end(), t.strides);
    }
  };

  static PyObject* enter(PyObject* self, PyObject* const* args, Py_ssize_t n) {
    const auto* entry = static_cast<Entry*>(PyCapsule_GetPointer(self, kEntry));
    try {
      if (!entry->conditions) return entry->list->run(args, n).release().ptr();
      if (!entry->list->may_run(*entry->conditions, args, n)) Py_RETURN_NOTIMPLEMENTED;
      return pybind11::object(entry->list->run(args, n)[0]).release().ptr();
    } catch (pybind11::error_already_set& e) {
      e.restore();
    } catch (const pybind11::builtin_exception& e) {
      e.set_error();
    } catch (const std::bad_alloc& e) {
      PyErr_SetString(PyExc_MemoryError, e.what());
    } catch (const std::exception& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
  }

  pybind11::tuple run(PyObject* const* args, Py_ssize_t n) {
    if (static_cast<std::size_t>(n) != inputs_.size()) throw pybind11::type_error("another number of inputs");
    std::vector<std::uintptr_t> slots;
    slots.reserve(inputs_.size() + outputs_.size() + parameters_.size());
    for (Py_ssize_t i = 0; i < n; ++i) {
      const dlpack::Tensor t = view(args[i]);
      if (!inputs_[i].is(t))
        throw pybind11::value_error("input " + std::to_string(i) +
                                    " is laid out other than when the list was made");
      slots.push_back(address(t));
    }
    pybind11::tuple outputs(outputs_.size());
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      PyObject* y = result_of(outputs_[i].ptr()).release().ptr();
      PyTuple_SET_ITEM(outputs.ptr(), static_cast<Py_ssize_t>(i), y);
      slots.push_back(address(view(y)));
    }
    for (const auto& p : parameters_) slots.push_back(address(view(p.ptr())));
    pybind11::object arena = kept_ ? std::exchange(kept_, {}) : result_of(arena_.ptr());
    const std::uintptr_t at = address(view(arena.ptr()));
    {
      const GilReleased released;
      calls_->run(at, slots, threads_);
    }
    if (keep_) kept_ = std::move(arena);
    return outputs;
  }

  bool may_run(const Conditions& c, PyObject* const* args, Py_ssize_t n) const {
    if (static_cast<std::size_t>(n) != inputs_.size()) return false;
    for (const auto& dict : c.empty)
      if (PyDict_Size(dict.ptr())) return false;
    for (Py_ssize_t i = 0; i < n; ++i)
      if (!is_one_of(c.types, reinterpret_cast<PyObject*>(Py_TYPE(args[i])))) return false;
    for (const auto& function : c.silent)
      if (truth(result_of(function.ptr()))) return false;
    const long threads = PyLong_AsLong(result_of(c.threads.ptr()).ptr());
    if (threads == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    if (threads != c.number) return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
      for (const auto& function : c.denied)
        if (truth(owned(PyObject_CallOneArg(function.ptr(), args[i])))) return false;
      dlpack::Tensor t;
      if (exchange_->view(args[i], &t)) {  // it has no plain memory; forward says so in its own words
        PyErr_Clear();
        return false;
      }
      if (!t.data || !inputs_[i].is(t)) return false;
    }
    return true;
  }

  static bool is_one_of(const pybind11::tuple& types, const PyObject* type) {
    return std::any_of(types.begin(), types.end(), [=](pybind11::handle t) { return t.ptr() == type; });
  }

  static bool truth(const pybind11::object& o) {
    const int is = PyObject_IsTrue(o.ptr());
    if (is < 0) throw pybind11::error_already_set();
    return is;
  }

  static pybind11::object owned(PyObject* o) {
    if (!o) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(o);
  }

  static pybind11::object result_of(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }

  dlpack::Tensor view(PyObject* x) const {
    if (!PyObject_TypeCheck(x, reinterpret_cast<PyTypeObject*>(tensor_.ptr())))
      throw pybind11::type_error(std::string("a list of calls takes tensors, got ") + Py_TYPE(x)->tp_name);
    dlpack::Tensor t;
    if (exchange_->view(x, &t)) throw pybind11::error_already_set();
    return t;
  }

  static std::uintptr_t address(const dlpack::Tensor& t) {
    return reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
  }

  pybind11::object list_, held_;
  const CallList* calls_;
  pybind11::object tensor_, capsule_;
  const dlpack::Exchange* exchange_;
  int threads_;
  std::vector<Layout> inputs_;
  pybind11::tuple outputs_, parameters_;
  pybind11::object arena_;
  bool keep_;
  pybind11::object kept_;  // an arena that no call uses; the GIL guards it
};

}  // namespace sk
