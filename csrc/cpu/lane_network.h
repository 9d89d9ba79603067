// A whole frozen network on activations that stay in batch lanes: [channel][pixel][image], one block of images at a time.
//
// Nothing is transposed, padded or copied between layers, a block's activations stay in this core's caches, and threads meet
// only where blocks are too few to share out. Convolutions are stripe fprops (a full skeleton makes one dense; a linear layer
// is a 1x1 convolution on a 1x1 map).
#pragma once
#include <memory>
#include <vector>

#include "core/conv_shape.h"
#include "core/tensor.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "cpu/stripes.h"

namespace sk {

enum class Pool : int {
  max = 0,
  average = 1,
  average_padded = 2
};  // average_padded counts the padding, as torch's default

struct PoolShape {
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

class LaneNetwork {
 public:
  // Blocks of `images` images, whole vectors; `parts`: the most threads that will share a block.
  LaneNetwork(int images, int parts, const IsaKernels& isa);
  ~LaneNetwork();

  // An activation of C x H x W that lies `offset` floats into a thread's arena; returns its number. Who lives where, and
  // that two that are needed at once do not overlap, is the caller's plan. Channels are channel_floats(h, w) apart.
  int add_activation(int c, int h, int w, std::int64_t offset);
  std::int64_t channel_floats(int h, int w) const;

  // y = activation(conv(x) * scale + shift + residual); residual < 0: none. Weight [A, C/groups] float32.
  void add_conv(const ConvShape& shape, Stripes stripes, const float* weight, const float* scale,
                const float* shift, Activation activation, int x, int residual, int y);
  void add_pool(Pool kind, const PoolShape& shape, int x, int y);
  // y = activation(x * scale + shift + residual), channel by channel; null and < 0 leave a term out.
  void add_pointwise(const float* scale, const float* shift, Activation activation, int x, int residual,
                     int y);

  // x [N, C, H, W] into activation `input`; activation `output` to y. Any N; the last block may be partly filled.
  void run(const TensorView& x, int n, int input, const TensorView& y, int output, int threads) const;
  std::int64_t bytes_per_thread() const { return arena_floats_ * 4; }

 private:
  struct Activation3;
  struct Step;
  struct ConvStep;
  struct PoolStep;
  struct PointwiseStep;

  void check(int activation) const;
  static void check_residual(const Activation3& residual, const Activation3& y);

  int images_, parts_;
  const IsaKernels& isa_;
  std::vector<Activation3> activations_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::int64_t arena_floats_ = 0, staging_floats_ = 0;
};

}  // namespace sk
