// Calls of kernels that follow each other in a network, made as one: a layer of a small network takes less time than
// getting from Python to its kernel.
//
// Tensors between the calls lie in an arena; tensors that come from outside or go there are pointers given to run().
// Kernels, packed weights and biases belong to the caller and outlive the list.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "core/tensor.h"

namespace sk {

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

struct MapSize {
  int n, c, h, w;
};

class CallList {
 public:
  CallList() = default;
  CallList(const CallList&) = delete;  // the calls hold its address
  CallList& operator=(const CallList&) = delete;

  // A tensor `offset` bytes into the arena, or where pointer number `slot` of run() points; returns its number.
  int add_arena(DType type, const std::int64_t (&stride)[4], std::int64_t offset);
  int add_slot(DType type, const std::int64_t (&stride)[4], int slot);

  // y = kernel(x) with its epilogue; residual < 0: none. Kernel: Fprop or FpropFilters.
  template <class Kernel>
  void add_fprop(const Kernel& kernel, const float* packed, Epilogue e, int x, int residual, int y) {
    check(x), check(y), check(residual < 0 ? y : residual);
    calls_.push_back([this, &kernel, packed, e, x, residual, y](const Frame& f) {
      Epilogue now = e;
      if (residual >= 0) now.residual = view(f, residual);
      kernel.run(view(f, x), packed, view(f, y), now, f.threads);
    });
  }
  // Maxima over windows clipped to the map; NaN wins, as in torch. float32.
  void add_max_pool(const Window& window, const MapSize& in, const MapSize& out, int x, int y);

  void run(std::uintptr_t arena, const std::vector<std::uintptr_t>& slots, int threads) const;

 private:
  struct Frame {
    char* arena;
    const std::uintptr_t* slots;
    int threads;
  };
  struct Place {
    TensorView view;
    std::int64_t offset;
    int slot;  // -1: in the arena
  };

  void check(int tensor) const;
  TensorView view(const Frame& f, int tensor) const;

  std::vector<Place> places_;
  int slots_ = 0;
  std::vector<std::function<void(const Frame&)>> calls_;
};

}  // namespace sk
