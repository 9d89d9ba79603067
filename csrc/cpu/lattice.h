// The one picture behind fprop and dgrad, for every stride, padding and dilation:
//
//   out(i, j) = sum over taps t of  W_t * plane[t.plane](i + t.dr, j + t.ds)
//   plane(a, b) = in[a * step_h + row0, b * step_w + col0], zero outside the tensor
//
// fprop of stride s splits its input into s*s planes, so that a tap is a pointer offset. dgrad of stride s has one
// plane and s*s output lattices: lattice (i, j) is pixel (out_h0 + i * out_sh, out_w0 + j * out_sw).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/conv_shape.h"

namespace sk {

struct Range {
  int lo, hi;
  int size() const { return std::max(0, hi - lo); }
};

inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int ceil_div(int a, int b) { return -floor_div(-a, b); }
inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
inline Range intersect(Range a, Range b) { return {std::max(a.lo, b.lo), std::min(a.hi, b.hi)}; }

struct Plane {
  int row0, col0;
};

struct TapAccess {
  int tap;  // r * S + s
  int plane, dr, ds;
};

struct Lattice {
  int rows, cols;      // output lattice
  int in_h, in_w;      // extent of the tensor that is read
  int step_h, step_w;  // of the planes in that tensor
  int out_h0 = 0, out_w0 = 0, out_sh = 1, out_sw = 1;
  std::vector<Plane> planes;
  std::vector<TapAccess> taps;

  // Plane rows (columns) that lie inside the tensor.
  Range plane_rows(const Plane& p) const {
    return {ceil_div(-p.row0, step_h), floor_div(in_h - 1 - p.row0, step_h) + 1};
  }
  Range plane_cols(const Plane& p) const {
    return {ceil_div(-p.col0, step_w), floor_div(in_w - 1 - p.col0, step_w) + 1};
  }
  // Output rows (columns) for which a tap falls inside the image.
  Range valid_rows(const TapAccess& t) const {
    const Range in = plane_rows(planes[t.plane]);
    return intersect({in.lo - t.dr, in.hi - t.dr}, {0, rows});
  }
  Range valid_cols(const TapAccess& t) const {
    const Range in = plane_cols(planes[t.plane]);
    return intersect({in.lo - t.ds, in.hi - t.ds}, {0, cols});
  }
};

// Which taps share a plane: all of a phase; those of a column (an im2col along the width: where rows are whole vectors every
// load is aligned); none (an im2col that is exact for small maps: no lane is spent on the halo, every load is aligned).
enum class PlanePer { phase, column, tap };

// fprop: one lattice; `live[t]` says whether any filter keeps tap t.
Lattice fprop_lattice(const ConvShape& s, const std::vector<bool>& live, PlanePer per);

// dgrad: stride_h * stride_w lattices over the input pixels, each with the taps that reach it.
std::vector<Lattice> dgrad_lattices(const ConvShape& s, const std::vector<bool>& live, PlanePer per);

}  // namespace sk
