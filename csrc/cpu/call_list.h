// Calls of kernels that follow each other in a network, made as one: a layer of a small network takes less time than
// getting from Python to its kernel.
//
// Tensors between the calls lie in an arena; tensors that come from outside or go there are pointers given to run().
// Kernels, packed weights and biases belong to the caller and outlive the list.
#pragma once
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "core/tensor.h"
#include "cpu/dgrad.h"
#include "cpu/fprop.h"
#include "cpu/head.h"
#include "cpu/planes.h"
#include "cpu/wgrad.h"

namespace sk {

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

class CallList {
 public:
  CallList() = default;
  CallList(const CallList&) = delete;  // the calls hold its address
  CallList& operator=(const CallList&) = delete;

  // A tensor `offset` bytes into the arena, or where pointer number `slot` of run() points; returns its number.
  int add_arena(DType type, const std::int64_t (&stride)[4], std::int64_t offset);
  int add_slot(DType type, const std::int64_t (&stride)[4], int slot);
  // Planes `offset` bytes into the arena. Calls read and write them by their strides, Fprop where they lie if it can.
  int add_planes(const Planes& planes, std::int64_t offset);

  // y = kernel(x) with its epilogue; residual < 0: none. Kernel: Fprop, FpropFilters, FpropMatrix or FpropTaps.
  template <class Kernel>
  void add_fprop(const Kernel& kernel, const float* packed, Epilogue e, int x, int residual, int y) {
    check(x), check(y), check(residual < 0 ? y : residual);
    calls_.push_back([this, &kernel, packed, e, x, residual, y](const Frame& f) {
      Epilogue now = e;
      if (residual >= 0) now.residual = view(f, residual);
      if constexpr (std::is_invocable_v<decltype(&Kernel::run), const Kernel&, TensorView, const float*,
                                        TensorView, Epilogue, int, InPlanes>) {
        const InPlanes planes{is_planes(x), is_planes(y) ? &places_[y].planes : nullptr};
        kernel.run(view(f, x), packed, view(f, y), now, f.threads, planes);
      } else {
        kernel.run(view(f, x), packed, view(f, y), now, f.threads);
        clear_around(f, y);
      }
    });
  }

  // A training step's, whose weight changes from run to run: packed, weight [A, C/groups] and bias [K] (< 0: none) are
  // tensors of this list, contiguous; packed and bias are float32.
  template <class Kernel>
  void add_pack(const Kernel& kernel, int weight, int packed) {
    check(weight), check(packed);
    calls_.push_back([this, &kernel, weight, packed](const Frame& f) {
      const TensorView w = view(f, weight);
      kernel.pack_weight(w.data, w.dtype, floats(f, packed));
    });
  }
  template <class Kernel>
  void add_packed_fprop(const Kernel& kernel, int packed, int bias, int x, int y) {
    check(packed), check(x), check(y), check(bias < 0 ? y : bias);
    calls_.push_back([this, &kernel, packed, bias, x, y](const Frame& f) {
      Epilogue e;
      if (bias >= 0) e.shift = floats(f, bias);
      kernel.run(view(f, x), floats(f, packed), view(f, y), e, f.threads);
    });
  }
  void add_dgrad(const Dgrad& kernel, int packed, int dy, int dx);
  void add_wgrad(const Wgrad& kernel, int x, int dy, int dw);

  // Maxima over windows clipped to the map; NaN wins, as in torch. float32.
  void add_max_pool(const Window& window, const MapSize& in, const MapSize& out, int x, int y);

  // Those of head.h.
  void add_average(const MapSize& size, int x, int y);
  void add_flatten(const MapSize& size, int x, int y);
  // weight and bias are tensors of this list too, bias < 0: none.
  void add_linear(int weight, int bias, int images, int features, int outputs, int x, int y);

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
    Planes planes;
  };

  void check(int tensor) const;
  void check_dense(int tensor, int dimension) const;  // its stride there is 1
  TensorView view(const Frame& f, int tensor) const;
  float* floats(const Frame& f, int tensor) const { return static_cast<float*>(view(f, tensor).data); }
  bool is_planes(int tensor) const { return places_[tensor].planes.pitch > 0; }
  // For calls that write pixels only: the zeros around them, where y lies in planes.
  void clear_around(const Frame& f, int y) const;

  std::vector<Place> places_;
  int slots_ = 0;
  std::vector<std::function<void(const Frame&)>> calls_;
};

}  // namespace sk
