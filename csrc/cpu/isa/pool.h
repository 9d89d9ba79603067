// Pooling windows over batch lanes: a pixel is `images` lanes, whole vectors, and its window a box of pixels.
//
//   out[j][lane] = max (or sum) over r < rows, q < cols of  in[r * row_step + j * step + q * images + lane]
#pragma once
#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

// A NaN stays, as in torch.
inline vf larger(vf a, vf b) { return b > a || b != b ? b : a; }

void max_windows(float* out, const float* in, const sk::Windows& w) {
  for (std::int64_t j = 0; j < w.count; ++j, in += w.step)
    for (std::int64_t lane = 0; lane < w.images; lane += W, out += W) {
      const float* row = in + lane;
      vf best = load(row);
      for (int r = 0; r < w.rows; ++r, row += w.row_step)
        for (int q = 0; q < w.cols; ++q) best = larger(best, load(row + q * w.images));
      store(out, best);
    }
}

// A row of the window has a sum of its own: one over a whole map would leave the error budget.
void sum_windows(float* out, const float* in, const sk::Windows& w) {
  for (std::int64_t j = 0; j < w.count; ++j, in += w.step)
    for (std::int64_t lane = 0; lane < w.images; lane += W, out += W) {
      const float* row = in + lane;
      vf sum = vf{};
      for (int r = 0; r < w.rows; ++r, row += w.row_step) {
        vf part = vf{};
        for (int q = 0; q < w.cols; ++q) part += load(row + q * w.images);
        sum += part;
      }
      store(out, sum);
    }
}

}  // namespace
