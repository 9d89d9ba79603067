// dw[row(k, t), c] = sum over n, p, q of  dy[n, k, p, q] * x[n, c, p', q']     (live stripes only; p', q' as in fprop)
//
// Lanes run along c, and x is turned pixel-major first: exact borders, no halo, no horizontal sums. dy is read a scalar at a
// time, so it stays as it is, filter by filter: turned as well, every scalar came from a cache line of its own. Every thread
// owns stripes, so the sums have one order whatever the number of threads. The sums of chunks meet in float64: in
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
  struct Pixels;  // the copies of a chunk

  std::int64_t padded(std::int64_t n) const { return (n + isa_.lanes - 1) / isa_.lanes * isa_.lanes; }
  // The pixels of a chunk whose input lies inside the image, one step each: one loop without an end at every row.
  std::int64_t list_steps(int tap, const Pixels& pixels, IndexedStep* steps) const;
  // tile[f * padded(C/groups) + c] = the task's sums over n steps.
  void compute(const Task& task, const Pixels& pixels, const IndexedStep* steps, std::int64_t n,
               float* tile) const;
  void store(void* dw, DType type, int stripe, const float* row) const;

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  Chunk chunk_;
  int in_rows_;  // most of a chunk
  std::int64_t x_ld_, dy_ld_;
  bool whole_sums_;
  std::vector<Task> tasks_;
};

}  // namespace sk
