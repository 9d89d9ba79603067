// row[i] = activation(row[i] * scale + shift + residual[i]), NaN kept where torch keeps it.
#pragma once
#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

// exp(x) to about one ulp: 2^n * p(r), r = x - n ln 2 in two parts; Taylor to r^7/7!, |r| <= ln(2)/2. Infinite above
// 88: a finite bound there would let silu(-1e38) through as -0.6.
inline vf exponential(vf x) {
  const vf low = splat(-87.f), high = splat(88.f);
  const vf clamped = x < low ? low : (x > high ? high : x);
  const vf shifted = clamped * 1.44269504088896341f + 12582912.f;  // rounds to a whole number in the low bits
  const vf n = shifted - 12582912.f;
  const vf r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  const float taylor[] = {1.f / 720.f, 1.f / 120.f, 1.f / 24.f, 1.f / 6.f, 0.5f, 1.f, 1.f};
  vf p = splat(1.f / 5040.f);
  for (const float c : taylor) p = p * r + c;
  const vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
  return x != x ? x : (x > high ? splat(__builtin_inff()) : p * power);
}

// A comparison with NaN is false: NaN passes through every one of these, as in torch.
template <sk::Activation A>
inline vf activate(vf x) {
  const vf zero = vf{}, six = splat(6.f);
  if constexpr (A == sk::Activation::relu) return x < zero ? zero : x;
  if constexpr (A == sk::Activation::relu6) return x < zero ? zero : (x > six ? six : x);
  if constexpr (A == sk::Activation::silu) return x / (exponential(-x) + 1.f);
  if constexpr (A == sk::Activation::hardswish) {
    const vf t = x + 3.f;
    return x * (t < zero ? zero : (t > six ? six : t)) / 6.f;
  }
  return x;
}

template <sk::Activation A, bool Residual>
inline vf finish_vector(const float* row, float scale, float shift, const float* residual) {
  vf v = load(row) * scale + shift;
  if constexpr (Residual) v += load(residual);
  return activate<A>(v);
}

template <sk::Activation A, bool Residual>
void finish_as(float* row, std::int64_t n, float scale, float shift, const float* residual) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W)
    store(row + i, finish_vector<A, Residual>(row + i, scale, shift, Residual ? residual + i : nullptr));
  if (i == n) return;
  float tail[2][W] = {};
  for (std::int64_t j = i; j < n; ++j) tail[0][j - i] = row[j], tail[1][j - i] = Residual ? residual[j] : 0.f;
  store(tail[0], finish_vector<A, Residual>(tail[0], scale, shift, tail[1]));
  for (std::int64_t j = i; j < n; ++j) row[j] = tail[0][j - i];
}

template <sk::Activation A>
void finish(float* row, std::int64_t n, float scale, float shift, const float* residual) {
  residual ? finish_as<A, true>(row, n, scale, shift, residual)
           : finish_as<A, false>(row, n, scale, shift, residual);
}

void finish_row(float* row, std::int64_t n, float scale, float shift, const float* residual,
                sk::Activation act) {
  switch (act) {
    case sk::Activation::none:
      return finish<sk::Activation::none>(row, n, scale, shift, residual);
    case sk::Activation::relu:
      return finish<sk::Activation::relu>(row, n, scale, shift, residual);
    case sk::Activation::relu6:
      return finish<sk::Activation::relu6>(row, n, scale, shift, residual);
    case sk::Activation::silu:
      return finish<sk::Activation::silu>(row, n, scale, shift, residual);
    case sk::Activation::hardswish:
      return finish<sk::Activation::hardswish>(row, n, scale, shift, residual);
  }
}

}  // namespace
