// fprop for few channels: two filters at a time through all their taps, sums in registers, y written every 48 products.
//
//   y[filter, pixels] = sum over its live taps (r, s), sum over c of  w[row(filter, r, s), c] * panel[c, s, r's phase][pixels + dr * pitch]
//
// The panel is an im2col along the width: one plane for every kernel column (and phase of its rows under a stride), rows of Q
// pixels, to whole vectors where that costs at most a tenth. A tap is a pointer offset and its loads are aligned where vectors divide Q.
// Two filters that keep a tap share its loads; filters are paired so that they share many. Taps that only one of a pair
// keeps run beside one that only the other keeps, and what is left over beside a row of zeros with weights of zero: exact at
// one filter.
#pragma once
#include <vector>

#include "core/conv_shape.h"
#include "core/tensor.h"
#include "cpu/isa/isa.h"
#include "cpu/lattice.h"
#include "cpu/planes.h"
#include "cpu/stripes.h"

namespace sk {

class FpropTaps {
 public:
  // Blocks of `rows` output rows; throws std::length_error where one of them has a panel beyond 2^31 values.
  FpropTaps(const ConvShape& shape, Stripes stripes, int rows, const IsaKernels& isa);

  std::int64_t packed_floats() const { return packed_floats_; }
  void pack_weight(const void* weight, DType type, float* packed) const;  // weight [A, C/groups]
  void run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e, int threads,
           InPlanes planes = {}) const;

 private:
  struct Segment {  // stripes summed in registers
    bool shared;
    int stripes;
    int offsets, rows;    // into offsets_, rows_
    std::int64_t weight;  // packed [stripes][C/groups][2] begins here
  };
  struct Pair {
    int filter[2];    // within the group; the second -1 where none is left
    int first, last;  // into segments_
  };

  struct Step {  // of a pair: taps and weight rows of its filters, -1 where one has none left
    int tap[2], row[2];
  };
  void lay_out_panel();
  void pair_filters(int group);
  void add_segments(bool shared, const std::vector<Step>& steps);
  void fill(const TensorView& x, int n, int group, Range out_rows, float* panel, float* stage) const;
  void compute(int group, Range out_rows, const float* packed, const float* panel, float* lanes,
               std::int64_t ld, float* nobody) const;

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  int rows_, row_blocks_, vectors_;
  struct Phase {  // pixels of x that lie a stride apart, and how far taps shift them
    Plane plane;
    Range rows, cols;
    std::int64_t stage;
  };
  struct TapPlane {
    int phase, shift;
  };
  std::int64_t phase_floats(const Phase& p) const {
    return static_cast<std::int64_t>(rows_ + p.rows.size() - 1) * (pitch_ + p.cols.size() - 1);
  }
  std::vector<Phase> phases_;
  std::vector<TapPlane> planes_;
  std::vector<std::int64_t> tap_offsets_;  // [taps]
  Range shifts_{0, 0};                     // of all taps, in rows
  int pitch_;
  std::int64_t zeros_, c_stride_, plane_floats_, stage_floats_ = 0;
  std::vector<Pair> pairs_;
  std::vector<int> pair_ptr_{0};  // [groups + 1]
  std::vector<Segment> segments_;
  std::vector<std::int32_t> offsets_;
  std::vector<std::int32_t> row_of_;  // weight rows, two a stripe, -1: zeros
  std::int64_t packed_floats_ = 0;
};

}  // namespace sk
