// Native objects as Python functions that take positional arguments and nothing else: pybind11's own dispatch takes
// longer than what stands behind these.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <new>
#include <utility>

namespace sk {

inline pybind11::object owned(PyObject* o) {
  if (!o) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(o);
}

inline pybind11::object result_of(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }

inline bool truth(const pybind11::object& o) {
  const int is = PyObject_IsTrue(o.ptr());
  if (is < 0) throw pybind11::error_already_set();
  return is;
}

// T has kName, and run(args, n), which returns a pybind11::object.
template <class T>
pybind11::object as_function(std::shared_ptr<T> object) {
  using Held = std::shared_ptr<T>;
  static constexpr auto enter = [](PyObject* self, PyObject* const* args, Py_ssize_t n) -> PyObject* {
    try {
      return (*static_cast<Held*>(PyCapsule_GetPointer(self, T::kName)))->run(args, n).release().ptr();
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
  };
  static PyObject* (*const function)(PyObject*, PyObject* const*, Py_ssize_t) = enter;
  // NOLINTNEXTLINE(bugprone-casting-through-void): CPython's own way to name a function of another type
  static PyMethodDef method{T::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)),
                            METH_FASTCALL, nullptr};
  auto held = std::make_unique<Held>(std::move(object));
  const pybind11::capsule self(held.release(), T::kName, [](PyObject* capsule) {
    delete static_cast<Held*>(PyCapsule_GetPointer(capsule, T::kName));
  });
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace sk
