// fprop of bfloat16 in matrix registers, 16 filters by 16 lanes by 32 channels an instruction:
//
//   y[n, k, p, q] = epilogue( sum over live taps t of filter k  of  sum over c of  w[row(k, t), c] * x[n, c, p', q'] )
//
// As in fprop.h every tap has its own packed list of filters; a tap's sums over c end in registers and are then added to the
// lanes of y, which takes as long as a product: 1 / (C / 32 + 1) of the work. Lanes lie in cells of two channels and begin
// at whole vectors: along pixels, every column of taps has a copy of x that is moved by so many columns.
#pragma once
#include <vector>

#include "core/conv_shape.h"
#include "cpu/driver.h"
#include "cpu/stripes.h"

namespace sk {

class FpropMatrix {
 public:
  // C/groups is a multiple of kMatrixChannels: zeros in its place would turn a neighbour's NaN into one's own.
  FpropMatrix(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa);

  std::int64_t packed_floats() const { return packed_floats_; }
  void pack_weight(const void* weight, DType type, float* packed) const;  // weight [A, C/groups]
  void run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e,
           int threads) const;  // x is bfloat16

  const Schedule& schedule() const { return schedule_; }
  // Adds a block's runs into the lanes of one part's filters.
  void accumulate(int part, const BlockPlan& block, const float* packed, Channels<const float> panel,
                  Channels<float> lanes) const;

 private:
  struct TapFilters {     // of one part
    std::int64_t weight;  // packed [tiles][steps][height][16 cells] begins here
    int first, last;      // into order_ and local_
  };

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  Schedule schedule_;
  int steps_;
  int height_;  // filters of a tile
  int part_count_;
  std::vector<Part> parts_;
  std::vector<std::int64_t> tap_offsets_;  // by index into lattice().taps
  std::vector<TapFilters> filters_;        // [parts][taps]
  std::vector<std::int32_t> order_;        // weight row of each packed filter
  std::vector<std::int32_t> local_;        // its channel within the part
  std::int64_t packed_floats_ = 0;
};

}  // namespace sk
