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

class ListFunction {
 public:
  // What has to hold for a network's call to need its kernels only. Otherwise the function returns NotImplemented; one
  // without a Front raises TypeError or ValueError for inputs other than those it was made for.
  struct Front {
    pybind11::tuple types;     // of the inputs, exactly
    pybind11::tuple silent;    // functions that return something false
    pybind11::object threads;  // a function that returns the list's number of threads
    pybind11::tuple
        empty;  // dicts. Not of objects that own the function: the collector does not look into it
    pybind11::tuple denied;  // functions of an input that return something false
  };

  // list: a CallList; held: what it points to. tensor: torch.Tensor, whose exchange interface `exchange` is. inputs: tensors laid out as those of
  // the calls will be. outputs, arena: functions that make a tensor. parameters: tensors read at each call. The slots of
  // the list are inputs, outputs and parameters in this order. keep: whether arenas wait for the next call.
  ListFunction(pybind11::object list, pybind11::object held, pybind11::object tensor,
               const pybind11::capsule& exchange, int threads, const pybind11::tuple& inputs,
               pybind11::tuple outputs, pybind11::tuple parameters, pybind11::object arena, bool keep)
      : list_(std::move(list)),
        held_(std::move(held)),
        calls_(list_.cast<const CallList*>()),
        tensor_(std::move(tensor)),
        exchange_(
            static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::kCapsule))),
        threads_(threads),
        outputs_(std::move(outputs)),
        parameters_(std::move(parameters)),
        arena_(std::move(arena)),
        keep_(keep) {
    if (!exchange_) throw pybind11::error_already_set();
    if (exchange_->major != dlpack::kMajor) throw std::invalid_argument("another DLPack");
    if (threads < 1) throw std::invalid_argument("threads is positive");
    for (const auto& x : inputs) {
      const dlpack::Tensor t = view(x.ptr());
      inputs_.push_back({t.device, t.dtype, {t.shape, t.shape + t.ndim}, {t.strides, t.strides + t.ndim}});
    }
  }

  // Owned by the function it returns.
  static pybind11::object bind(std::unique_ptr<ListFunction> f, std::unique_ptr<Front> front) {
    static PyMethodDef method{"list_function",
                              reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called)), METH_FASTCALL,
                              "The outputs of a list of native calls."};
    f->front_ = std::move(front);
    const pybind11::capsule self(f.release(), kSelf, [](PyObject* capsule) {
      delete static_cast<ListFunction*>(PyCapsule_GetPointer(capsule, kSelf));
    });
    return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
  }

 private:
  static constexpr const char* kSelf = "stripe_kernels.list_function";

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

  static PyObject* called(PyObject* self, PyObject* const* args, Py_ssize_t n) {
    auto* f = static_cast<ListFunction*>(PyCapsule_GetPointer(self, kSelf));
    try {
      return f->call(args, n);
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

  PyObject* call(PyObject* const* args, Py_ssize_t n) {
    if (front_ && !ours(args, n)) Py_RETURN_NOTIMPLEMENTED;
    std::vector<std::uintptr_t> slots;
    slots.reserve(inputs_.size() + outputs_.size() + parameters_.size());
    if (static_cast<std::size_t>(n) != inputs_.size()) throw pybind11::type_error("another number of inputs");
    for (Py_ssize_t i = 0; i < n; ++i) {
      const dlpack::Tensor t = view(args[i]);
      if (!inputs_[i].is(t)) {
        if (front_) Py_RETURN_NOTIMPLEMENTED;
        throw pybind11::value_error("input " + std::to_string(i) +
                                    " is laid out other than when the list was made");
      }
      slots.push_back(address(t));
    }
    pybind11::tuple outputs(outputs_.size());
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      PyObject* y = made(outputs_[i].ptr()).release().ptr();
      PyTuple_SET_ITEM(outputs.ptr(), static_cast<Py_ssize_t>(i), y);
      slots.push_back(address(view(y)));
    }
    for (const auto& p : parameters_) slots.push_back(address(view(p.ptr())));
    pybind11::object arena;
    if (idle_.empty()) {
      arena = made(arena_.ptr());
    } else {
      arena = std::move(idle_.back());
      idle_.pop_back();
    }
    const std::uintptr_t at = address(view(arena.ptr()));
    {
      const GilReleased released;
      calls_->run(at, slots, threads_);
    }
    if (keep_) idle_.push_back(std::move(arena));
    if (!front_) return outputs.release().ptr();
    return pybind11::object(outputs[0]).release().ptr();
  }

  // The conditions of `Front`, layouts aside.
  bool ours(PyObject* const* args, Py_ssize_t n) const {
    if (static_cast<std::size_t>(n) != inputs_.size()) return false;
    for (const auto& hooks : front_->empty)
      if (PyDict_Size(hooks.ptr())) return false;
    for (Py_ssize_t i = 0; i < n; ++i)
      if (!exactly(args[i])) return false;
    for (const auto& function : front_->silent)
      if (truth(made(function.ptr()))) return false;
    const long threads = PyLong_AsLong(made(front_->threads.ptr()).ptr());
    if (threads == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    if (threads != threads_) return false;
    for (Py_ssize_t i = 0; i < n; ++i)
      for (const auto& function : front_->denied)
        if (truth(owned(PyObject_CallOneArg(function.ptr(), args[i])))) return false;
    return true;
  }

  bool exactly(PyObject* x) const {
    for (const auto& type : front_->types)
      if (type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(x))) return true;
    return false;
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

  static pybind11::object made(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }

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
  pybind11::object tensor_;
  const dlpack::Exchange* exchange_;
  int threads_;
  std::vector<Layout> inputs_;
  pybind11::tuple outputs_, parameters_;
  pybind11::object arena_;
  bool keep_;
  std::unique_ptr<Front> front_;
  std::vector<pybind11::object> idle_;  // arenas that no call uses; the GIL guards them
};

}  // namespace sk
