// Maxima along the rows of a map, and pooling windows over batch lanes: there a pixel is `images` lanes, whole vectors, and its
// window a box of pixels.
//
//   out[j][lane] = max (or sum) over r < rows, q < cols of  in[r * row_step + j * step + q * images + lane]
#pragma once
#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

// A NaN stays, as in torch.
inline vf larger(vf a, vf b) { return b > a || b != b ? b : a; }
inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// fn(i) for vectors that cover [0, n), the last one from n - W: taking the larger twice changes nothing. False: n < W.
template <class Fn>
inline bool vectors_over(std::int64_t n, const Fn& fn) {
  if (n < W) return false;
  for (std::int64_t i = 0; i + W < n; i += W) fn(i);
  fn(n - W);
  return true;
}

void larger_of(float* y, const float* a, const float* b, std::int64_t n) {
  if (vectors_over(n, [=](std::int64_t i) { store(y + i, larger(load(a + i), load(b + i))); })) return;
  for (std::int64_t i = 0; i < n; ++i) y[i] = larger(a[i], b[i]);
}

// Every second of 2 W values, from the first or the second on.
inline vf every_second(vf a, vf b, int first) {
  vi m;
  for (int i = 0; i < W; ++i) m[i] = 2 * i + first;
  return __builtin_shuffle(a, b, m);
}

void keep_larger(float* y, const float* x, std::int64_t step, std::int64_t n) {
  if (step == 1) return larger_of(y, y, x, n);
  std::int64_t i = 0;
  // The last value stays out: a vector reads the one behind it too.
  if (step == 2 && vectors_over(n - 1, [=](std::int64_t j) {
        store(y + j, larger(load(y + j), every_second(load(x + 2 * j), load(x + 2 * j + W), 0)));
      }))
    i = n - 1;
  for (; i < n; ++i) y[i] = larger(y[i], x[i * step]);
}

void largest_of_squares(float* y, const float* a, const float* b, std::int64_t n) {
  const auto square = [=](std::int64_t i, std::int64_t half) {
    const vf lo = larger(load(a + 2 * i), load(b + 2 * i)),
             hi = larger(load(a + 2 * i + half), load(b + 2 * i + half));
    return larger(every_second(lo, hi, 0), every_second(lo, hi, 1));
  };
  if (vectors_over(n, [=](std::int64_t i) { store(y + i, square(i, W)); })) return;
  if (2 * n == W) {
    const vf both = square(0, 0);
    std::memcpy(y, &both, sizeof(float) * W / 2);
    return;
  }
  for (std::int64_t i = 0; i < n; ++i)
    y[i] = larger(larger(a[2 * i], a[2 * i + 1]), larger(b[2 * i], b[2 * i + 1]));
}

// The same of a dense map whose rows have `width` values, all in one: a vector holds several rows.
void largest_of_narrow_squares(float* y, const float* x, int width, std::int64_t n) {
  const int half = width / 2;
  std::int64_t i = 0;
  if (2 * W % width == 0) {
    vi top;
    for (int j = 0; j < W; ++j) top[j] = j / half * width + j % half;
    const vi bottom = top + half;
    const auto pairs = [](const float* p) {
      const vf a = load(p), b = load(p + W);
      return larger(every_second(a, b, 0), every_second(a, b, 1));
    };
    for (; i + W <= n; i += W) {
      const vf a = pairs(x + 4 * i), b = pairs(x + 4 * i + 2 * W);
      store(y + i, larger(__builtin_shuffle(a, b, top), __builtin_shuffle(a, b, bottom)));
    }
  }
  for (; i < n; ++i) {
    const float* const square = x + (i / half * width + i % half) * 2;
    y[i] = larger(larger(square[0], square[1]), larger(square[width], square[width + 1]));
  }
}

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
