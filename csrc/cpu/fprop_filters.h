// fprop with lanes along the filters that keep a tap: for few pixels, where pixel lanes stay empty and reading the weights
// is the work.
//
//   z[pixel, j] = sum over c of  x[n, c, p', q'] * w[row(filter j of tap t), c]      pixels that tap t reaches, exactly
//   y[pixel, filter j] += z[pixel, j]                                               one scalar scatter a tap: 1/C of the work
//
// The broadcast operand is x itself, or a copy of it in pixels: nothing is padded or wasted on out-of-image taps.
#pragma once
#include <vector>

#include "core/conv_shape.h"
#include "core/tensor.h"
#include "cpu/driver.h"
#include "cpu/isa/isa.h"
#include "cpu/stripes.h"

namespace sk {

class FpropFilters {
 public:
  FpropFilters(const ConvShape& shape, Stripes stripes, int images, int filter_parts, const IsaKernels& isa);

  std::int64_t packed_floats() const { return packed_floats_; }
  void pack_weight(const void* weight, DType type, float* packed) const;  // weight [A, C/groups]
  void run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e,
           int threads) const;

 private:
  // Of one part. Packed tile by tile, [tile][C/groups][vectors of the tile * lanes], the last lanes zero: every tile reads one
  // stream, and from beyond L2 once for all its pixels.
  struct TapFilters {
    std::int64_t weight;
    int vectors;
    int first, last;  // into stripes_
    Range rows, cols;
    int tile_pixels, tile_vectors;
    TapAccess access;
  };

  // Whether a tap reads its pixels as a stretch of a map that registers hold whole (isa.span). Then x is read with its pixels
  // dense, and a pixel between two that a tap reads is computed for nothing: of 4x4 16 % of the products.
  bool spans() const {
    const ConvShape& s = shape_;
    return images_ == 1 && lattice_.step_h == 1 && lattice_.step_w == 1 && s.H * s.W > kMaxTileFilters &&
           s.H * s.W <= isa_.most_span;
  }
  // Floats a pixel takes in a copy of x: an odd number of cache lines.
  std::int64_t pixel_floats() const { return ((shape_.C + 15) / 16 | 1) * std::int64_t{16}; }
  void compute(const Part& part, const TapFilters* taps, int n0, int images, const TensorView& x,
               const float* packed, std::int32_t* places, float* sums) const;

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  Lattice lattice_;
  int images_, part_count_;
  std::vector<Part> parts_;
  std::vector<TapFilters> taps_;  // [parts * lattice taps]
  std::int64_t packed_floats_ = 0;
};

}  // namespace sk
