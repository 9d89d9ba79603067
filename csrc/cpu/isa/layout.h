// Moving activations between a tensor's own memory format and rows of float lanes. Types convert on the way, so every
// kernel above computes in float32.
#pragma once
#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

template <class Fn>
void with_type(sk::DType type, Fn fn) {
  if (type == sk::DType::f32) fn(static_cast<float*>(nullptr));
  if (type == sk::DType::bf16) fn(static_cast<bf16*>(nullptr));
  if (type == sk::DType::f16) fn(static_cast<f16*>(nullptr));
}

// Copies n contiguous elements in vectors; the last one overlaps its neighbour, so that rows of 7 or 14 need no scalars.
template <class Src, class Dst>
void convert_row(Dst* dst, const Src* src, std::int64_t n) {
  if (n >= W) {
    std::int64_t i = 0;
    for (; i + W <= n; i += W) store_from_float(dst + i, load_as_float(src + i));
    if (i < n) store_from_float(dst + n - W, load_as_float(src + n - W));
  } else if constexpr (sizeof(Src) == 4 && sizeof(Dst) == 4) {
    typedef float quad __attribute__((vector_size(16), aligned(4)));
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) *reinterpret_cast<quad*>(dst + i) = *reinterpret_cast<const quad*>(src + i);
    for (; i < n; ++i) dst[i] = src[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) dst[i] = from_float<Dst>(to_float(src[i]));
  }
}

void load_row(float* dst, const void* src, sk::DType type, std::int64_t step, std::int64_t n) {
  with_type(type, [=](auto* t) {
    const auto* s = static_cast<decltype(t)>(const_cast<void*>(src));
    if (step == 1) return convert_row(dst, s, n);
    for (std::int64_t i = 0; i < n; ++i) dst[i] = to_float(s[i * step]);
  });
}

template <class T>
T narrow(T*, float x) {
  return from_float<T>(x);
}

void store_row(void* dst, sk::DType type, std::int64_t step, const float* src, std::int64_t n) {
  with_type(type, [=](auto* t) {
    auto* d = static_cast<decltype(t)>(dst);
    if (step == 1) return convert_row(d, src, n);
    for (std::int64_t i = 0; i < n; ++i) d[i * step] = narrow(t, src[i]);
  });
}

// Transposes W vectors in log2(W) rounds of interleaving row i with row i + W/2.
inline vf interleave_lo(vf a, vf b) {
  vi m;
  for (int i = 0; i < W; ++i) m[i] = (i >> 1) + (i & 1) * W;
  return __builtin_shuffle(a, b, m);
}
inline vf interleave_hi(vf a, vf b) {
  vi m;
  for (int i = 0; i < W; ++i) m[i] = W / 2 + (i >> 1) + (i & 1) * W;
  return __builtin_shuffle(a, b, m);
}

template <int Round>
inline __attribute__((always_inline)) void transpose_round(vf (&v)[W]) {
  if constexpr ((1 << Round) < W) {
    vf t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = interleave_lo(v[i], v[i + W / 2]);
      t[2 * i + 1] = interleave_hi(v[i], v[i + W / 2]);
    }
    transpose_round<Round + 1>(t);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = t[i];
  }
}

// One W x W block at a time; an edge of at least W columns is done again, overlapping, rather than by scalars.
template <class Src, class Dst>
void transpose(Dst* dst, std::int64_t dst_ld, const Src* src, std::int64_t src_ld, std::int64_t rows,
               std::int64_t cols) {
  std::int64_t i = 0;
  for (; i + W <= rows; i += W) {
    std::int64_t j = 0;
    while (j < cols && cols >= W) {
      if (j + W > cols) j = cols - W;
      vf v[W];
#pragma GCC unroll 16
      for (int a = 0; a < W; ++a) v[a] = load_as_float(src + (i + a) * src_ld + j);
      transpose_round<0>(v);
#pragma GCC unroll 16
      for (int a = 0; a < W; ++a) store_from_float(dst + (j + a) * dst_ld + i, v[a]);
      j += W;
    }
    for (; j < cols; ++j)
      for (int a = 0; a < W; ++a) dst[j * dst_ld + i + a] = from_float<Dst>(to_float(src[(i + a) * src_ld + j]));
  }
  for (; i < rows; ++i)
    for (std::int64_t j = 0; j < cols; ++j) dst[j * dst_ld + i] = from_float<Dst>(to_float(src[i * src_ld + j]));
}

void load_transposed(float* dst, std::int64_t dst_ld, const void* src, sk::DType type, std::int64_t src_ld,
                     std::int64_t rows, std::int64_t cols) {
  with_type(type, [=](auto* t) {
    transpose(dst, dst_ld, static_cast<decltype(t)>(const_cast<void*>(src)), src_ld, rows, cols);
  });
}

void store_transposed(void* dst, sk::DType type, std::int64_t dst_ld, const float* src, std::int64_t src_ld,
                      std::int64_t rows, std::int64_t cols) {
  with_type(type, [=](auto* t) { transpose(static_cast<decltype(t)>(dst), dst_ld, src, src_ld, rows, cols); });
}

}  // namespace
