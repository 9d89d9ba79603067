// row[i] = activation(row[i] * scale + shift + residual[i]), NaN kept where torch keeps it.
#pragma once
#include <cmath>

#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

template <sk::Activation A>
inline float activate(float x) {
  if constexpr (A == sk::Activation::relu) return x < 0.f ? 0.f : x;
  if constexpr (A == sk::Activation::relu6) return x < 0.f ? 0.f : (x > 6.f ? 6.f : x);
  if constexpr (A == sk::Activation::silu) return x / (1.f + std::exp(-x));
  if constexpr (A == sk::Activation::hardswish) {
    const float t = x + 3.f;
    return x * (t < 0.f ? 0.f : (t > 6.f ? 6.f : t)) / 6.f;
  }
  return x;
}

template <sk::Activation A>
void finish(float* row, std::int64_t n, float scale, float shift, const float* residual) {
  if (residual) {
    for (std::int64_t i = 0; i < n; ++i) row[i] = activate<A>(row[i] * scale + shift + residual[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) row[i] = activate<A>(row[i] * scale + shift);
  }
}

void finish_row(float* row, std::int64_t n, float scale, float shift, const float* residual, sk::Activation act) {
  switch (act) {
    case sk::Activation::none: return finish<sk::Activation::none>(row, n, scale, shift, residual);
    case sk::Activation::relu: return finish<sk::Activation::relu>(row, n, scale, shift, residual);
    case sk::Activation::relu6: return finish<sk::Activation::relu6>(row, n, scale, shift, residual);
    case sk::Activation::silu: return finish<sk::Activation::silu>(row, n, scale, shift, residual);
    case sk::Activation::hardswish: return finish<sk::Activation::hardswish>(row, n, scale, shift, residual);
  }
}

}  // namespace
