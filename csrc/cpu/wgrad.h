// dw[row(k, t), c] = sum over n, p, q of  dy[n, k, p, q] * x[n, c, p', q']     (live stripes only; p', q' as in fprop)
//
// Lanes run along c, and both tensors are turned pixel-major first: exact borders, no halo, no horizontal sums. Every
// thread owns stripes, so the sums have one order whatever the number of threads. The sums of chunks meet in float64: in
// float32 equal addends, as equal images have, err the same way every time (generated problems).
#pragma once
#include <vector>

#include "core/conv_shape.h"
#include "cpu/isa/isa.h"
#include "cpu/stripes.h"

namespace sk {

class Wgrad {
 public:
  Wgrad(const ConvShape& shape, Stripes stripes, int chunk_pixels, const IsaKernels& isa);

  void run(const TensorView& x, const TensorView& dy, void* dw, DType type,
           int threads) const;  // dw [A, C/groups]

 private:
  // Output pixels that are worked on together: whole rows of one image, or several whole images.
  struct Chunk {
    int images, rows;
  };
  struct Task {  // filters of one tap of one group
    int group, tap, first, filters;
  };
  struct Pixels;  // the pixel-major copies of a chunk

  std::int64_t padded(std::int64_t n) const { return (n + isa_.lanes - 1) / isa_.lanes * isa_.lanes; }
  // tile[f * padded(C/groups) + c] = the task's sums over these pixels.
  void compute(const Task& task, const Pixels& pixels, float* tile) const;
  void store(void* dw, DType type, int stripe, const float* row) const;

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  Chunk chunk_;
  std::vector<Task> tasks_;
};

}  // namespace sk
