// dx[n, c, h, w] = sum over live stripes (k, t) of  w[row(k, t), c] * dy[n, k, p, q],  h = p * stride_h + r * dil_h - pad_top
//
// (filter, tap) is only a reduction index here: accumulators stay in registers over the whole list of stripes.
#pragma once
#include <memory>
#include <vector>

#include "core/conv_shape.h"
#include "cpu/driver.h"
#include "cpu/stripes.h"

namespace sk {

class Dgrad {
 public:
  Dgrad(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa);

  std::int64_t packed_floats() const {
    return static_cast<std::int64_t>(stripes_.count()) * shape_.group_c();
  }
  void pack_weight(const void* weight, DType type, float* packed) const;
  void run(const TensorView& dy, const float* packed, const TensorView& dx, int threads) const;

 private:
  struct ChannelTile {
    int begin, channels;
  };
  // One output lattice: stride 1 has one, stride s has s * s.
  struct Phase {
    Schedule schedule;
    std::vector<std::vector<IndexedStep>> steps;  // [group * tap sets + set]
  };

  void compute(const Phase& phase, const Part& part, const BlockPlan& block, const float* packed,
               const float* panel, float* lanes) const;

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  int part_count_;
  std::vector<Phase> phases_;
  std::vector<Part> parts_;
  std::vector<ChannelTile> tiles_;  // of C/groups; packed [group][tile][stripe of the group][channels]
};

}  // namespace sk
