// Moving activations between a tensor's own memory format and rows of float lanes. Types convert on the way,
// so every kernel above computes in float32.
#pragma once
#include <type_traits>

#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

template <class Fn>
void with_type(sk::DType type, Fn fn) {
  if (type == sk::DType::f32) fn(static_cast<float*>(nullptr));
  if (type == sk::DType::bf16) fn(static_cast<bf16*>(nullptr));
  if (type == sk::DType::f16) fn(static_cast<f16*>(nullptr));
}

template <class Src, class Dst>
inline void convert_row(Dst* dst, const Src* src, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store_from_float(dst + i, load_as_float(src + i));
  if (i < n) store_first(dst + i, load_first(src + i, n - i), n - i);
}

// Every second of 2n - 1 elements.
inline vf even_lanes(vf a, vf b) {
  vi m;
  for (int i = 0; i < W; ++i) m[i] = 2 * i;
  return __builtin_shuffle(a, b, m);
}
template <class Src>
inline void load_every(float* dst, const Src* src, std::int64_t step, std::int64_t n) {
  std::int64_t i = 0;
  if (step == 2)
    for (; i + W < n; i += W)  // not the last: its odd neighbour may lie beyond the tensor
      store(dst + i, even_lanes(load_as_float(src + 2 * i), load_as_float(src + 2 * i + W)));
  for (; i < n; ++i) dst[i] = to_float(src[i * step]);
}

inline void clear(float* p, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(p + i, vf{});
  if (i < n) store_first(p + i, vf{}, n - i);
}

void load_rows(float* dst, std::int64_t pitch, const void* src, sk::DType type, std::int64_t row_step,
               std::int64_t step, std::int64_t rows, std::int64_t zeros_before, std::int64_t cols,
               std::int64_t zeros_after) {
  with_type(type, [=](auto* t) {
    const auto* s = static_cast<decltype(t)>(const_cast<void*>(src));
    float* d = dst;
    for (std::int64_t r = 0; r < rows; ++r, d += pitch, s += row_step) {
      clear(d, zeros_before);
      step == 1 ? convert_row(d + zeros_before, s, cols) : load_every(d + zeros_before, s, step, cols);
      clear(d + zeros_before + cols, zeros_after);
    }
  });
}

void store_rows(void* dst, sk::DType type, std::int64_t row_step, std::int64_t step, const float* src,
                std::int64_t pitch, std::int64_t rows, std::int64_t cols) {
  with_type(type, [=](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    auto* d = static_cast<T*>(dst);
    const float* s = src;
    for (std::int64_t r = 0; r < rows; ++r, d += row_step, s += pitch) {
      if (step == 1)
        convert_row(d, s, cols);
      else
        for (std::int64_t i = 0; i < cols; ++i) d[i * step] = from_float<T>(s[i]);
    }
  });
}

void load_row(float* dst, const void* src, sk::DType type, std::int64_t step, std::int64_t n) {
  load_rows(dst, 0, src, type, 0, step, 1, 0, n, 0);
}

void store_row(void* dst, sk::DType type, std::int64_t step, const float* src, std::int64_t n) {
  store_rows(dst, type, 0, step, src, 0, 1, n);
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

// dst[j * dst_ld + i] = src[i * src_ld + j], one block of at most W x W at a time.
template <bool Whole, class Src, class Dst>
__attribute__((noinline)) void transpose_block(Dst* dst, std::int64_t dst_ld, const Src* src,
                                               std::int64_t src_ld, std::int64_t rows, std::int64_t cols) {
  vf v[W];
#pragma GCC unroll 16
  for (int a = 0; a < W; ++a) {
    if constexpr (Whole)
      v[a] = load_as_float(src + a * src_ld);
    else
      v[a] = a >= rows ? vf{}
                       : (cols == W ? load_as_float(src + a * src_ld) : load_first(src + a * src_ld, cols));
  }
  transpose_round<0>(v);
#pragma GCC unroll 16
  for (int a = 0; a < W; ++a) {
    if constexpr (Whole)
      store_from_float(dst + a * dst_ld, v[a]);
    else if (a < cols)
      rows == W ? store_from_float(dst + a * dst_ld, v[a]) : store_first(dst + a * dst_ld, v[a], rows);
  }
}

template <class Src, class Dst>
void transpose(Dst* dst, std::int64_t dst_ld, const Src* src, std::int64_t src_ld, std::int64_t rows,
               std::int64_t cols) {
  for (std::int64_t i = 0; i < rows; i += W)
    for (std::int64_t j = 0; j < cols; j += W) {
      const std::int64_t r = rows - i < W ? rows - i : W, c = cols - j < W ? cols - j : W;
      if (r == W && c == W)
        transpose_block<true>(dst + j * dst_ld + i, dst_ld, src + i * src_ld + j, src_ld, W, W);
      else
        transpose_block<false>(dst + j * dst_ld + i, dst_ld, src + i * src_ld + j, src_ld, r, c);
    }
}

void load_transposed(float* dst, std::int64_t dst_ld, const void* src, sk::DType type, std::int64_t src_ld,
                     std::int64_t rows, std::int64_t cols) {
  with_type(type, [=](auto* t) {
    transpose(dst, dst_ld, static_cast<decltype(t)>(const_cast<void*>(src)), src_ld, rows, cols);
  });
}

void store_transposed(void* dst, sk::DType type, std::int64_t dst_ld, const float* src, std::int64_t src_ld,
                      std::int64_t rows, std::int64_t cols) {
  with_type(type,
            [=](auto* t) { transpose(static_cast<decltype(t)>(dst), dst_ld, src, src_ld, rows, cols); });
}

}  // namespace
