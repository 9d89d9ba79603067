#include "cpu/lattice.h"

namespace sk {
namespace {

int plane_index(std::vector<Plane>& planes, Plane p, bool always_new) {
  if (!always_new)
    for (std::size_t i = 0; i < planes.size(); ++i)
      if (planes[i].row0 == p.row0 && planes[i].col0 == p.col0) return static_cast<int>(i);
  planes.push_back(p);
  return static_cast<int>(planes.size()) - 1;
}

// The tap reads in[i * step + offset]: the plane holds the offset's phase, the rest moves the pointer.
void add_tap(Lattice& l, int tap, int off_h, int off_w, PlanePer per) {
  TapAccess t{tap, 0, 0, 0};
  if (per != PlanePer::tap) t.dr = floor_div(off_h, l.step_h);
  if (per == PlanePer::phase) t.ds = floor_div(off_w, l.step_w);
  t.plane = plane_index(l.planes, {off_h - t.dr * l.step_h, off_w - t.ds * l.step_w}, per == PlanePer::tap);
  l.taps.push_back(t);
}

}  // namespace

Lattice fprop_lattice(const ConvShape& s, const std::vector<bool>& live, PlanePer per) {
  Lattice l{};
  l.rows = s.P, l.cols = s.Q, l.in_h = s.H, l.in_w = s.W;
  l.step_h = s.stride_h, l.step_w = s.stride_w;
  l.out_sh = l.out_sw = 1;
  for (int r = 0; r < s.R; ++r)
    for (int c = 0; c < s.S; ++c)
      if (live[r * s.S + c]) add_tap(l, r * s.S + c, r * s.dil_h - s.pad_top, c * s.dil_w - s.pad_left, per);
  return l;
}

std::vector<Lattice> dgrad_lattices(const ConvShape& s, const std::vector<bool>& live, PlanePer per) {
  std::vector<Lattice> all;
  for (int h0 = 0; h0 < std::min(s.stride_h, s.H); ++h0)
    for (int w0 = 0; w0 < std::min(s.stride_w, s.W); ++w0) {
      Lattice l{};
      l.rows = ceil_div(s.H - h0, s.stride_h), l.cols = ceil_div(s.W - w0, s.stride_w);
      l.in_h = s.P, l.in_w = s.Q, l.step_h = l.step_w = 1;
      l.out_h0 = h0, l.out_w0 = w0, l.out_sh = s.stride_h, l.out_sw = s.stride_w;
      for (int r = 0; r < s.R; ++r)
        for (int c = 0; c < s.S; ++c) {
          // Pixel h is read by output p = (h + pad - r * dil) / stride where that is whole.
          const int off_h = h0 + s.pad_top - r * s.dil_h, off_w = w0 + s.pad_left - c * s.dil_w;
          const bool whole = off_h - floor_div(off_h, s.stride_h) * s.stride_h == 0 &&
                             off_w - floor_div(off_w, s.stride_w) * s.stride_w == 0;
          if (live[r * s.S + c] && whole)
            add_tap(l, r * s.S + c, floor_div(off_h, s.stride_h), floor_div(off_w, s.stride_w), per);
        }
      all.push_back(std::move(l));
    }
  return all;
}

}  // namespace sk
