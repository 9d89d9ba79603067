// A CallList as a Python function of torch tensors, with as little as can be between its call and the first kernel.
//
// When a network is called again, its own kernels have pushed Python and torch out of the caches, and steps that take 50
// ns in a loop take microseconds: checks and allocations in Python were .2 of ResNet-56's 1.4 ms (Zen 3, batch 1). So
// tensors are seen through DLPack's C interface, conditions are asked for from native code (guard.h), and the arena stays.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/exchange.h"
#include "bindings/function.h"
#include "bindings/gil.h"
#include "cpu/call_list.h"

namespace sk {

class ListFunction {
 public:
  static constexpr const char* kName = "stripe_kernels.list_function";

  // list: a CallList; held: what it points to. inputs: tensors laid out as those of the calls will be. outputs, arena:
  // functions that make a tensor. parameters: tensors read at each call. The slots of the list are inputs, outputs and
  // parameters in this order. keep: whether an arena waits for the next call.
  ListFunction(pybind11::object list, pybind11::object held, Tensors tensors, int threads,
               const pybind11::tuple& inputs, pybind11::tuple outputs, pybind11::tuple parameters,
               pybind11::object arena, bool keep)
      : list_(std::move(list)),
        held_(std::move(held)),
        calls_(list_.cast<const CallList*>()),
        tensors_(std::move(tensors)),
        threads_(threads),
        inputs_(tensors_.layouts(inputs)),
        outputs_(std::move(outputs)),
        parameters_(std::move(parameters)),
        arena_(std::move(arena)),
        keep_(keep) {
    if (threads < 1) throw pybind11::value_error("threads is positive");
  }

  // The tuple of outputs; TypeError or ValueError for inputs other than those the list was made for.
  pybind11::object run(PyObject* const* args, Py_ssize_t n) {
    if (static_cast<std::size_t>(n) != inputs_.size()) throw pybind11::type_error("another number of inputs");
    std::vector<std::uintptr_t> slots;
    slots.reserve(inputs_.size() + outputs_.size() + parameters_.size());
    for (Py_ssize_t i = 0; i < n; ++i) {
      const dlpack::Tensor t = tensors_.view(args[i]);
      if (!inputs_[i].is(t))
        throw pybind11::value_error("input " + std::to_string(i) +
                                    " is laid out other than when the list was made");
      slots.push_back(Tensors::address(t));
    }
    pybind11::tuple outputs(outputs_.size());
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      PyObject* y = result_of(outputs_[i].ptr()).release().ptr();
      PyTuple_SET_ITEM(outputs.ptr(), static_cast<Py_ssize_t>(i), y);
      slots.push_back(Tensors::address(tensors_.view(y)));
    }
    for (const auto& p : parameters_) slots.push_back(Tensors::address(tensors_.view(p.ptr())));
    pybind11::object arena = kept_ ? std::exchange(kept_, {}) : result_of(arena_.ptr());
    const std::uintptr_t at = Tensors::address(tensors_.view(arena.ptr()));
    {
      const GilReleased released;
      calls_->run(at, slots, threads_);
    }
    if (keep_) kept_ = std::move(arena);
    return std::move(outputs);
  }

 private:
  pybind11::object list_, held_;
  const CallList* calls_;
  Tensors tensors_;
  int threads_;
  std::vector<Layout> inputs_;
  pybind11::tuple outputs_, parameters_;
  pybind11::object arena_;
  bool keep_;
  pybind11::object kept_;  // an arena that no call uses; the GIL guards it
};

}  // namespace sk
