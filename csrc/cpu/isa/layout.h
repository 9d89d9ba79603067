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

// How elements are read: as float, or as cells of two bfloat16.
struct AsFloat {
  template <class T>
  vf whole(const T* p) const {
    return load_as_float(p);
  }
  template <class T>
  vf first(const T* p, std::int64_t n) const {
    return load_first(p, n);
  }
  template <class T>
  float one(const T* p) const {
    return to_float(*p);
  }
};
struct AsCell {
  std::int64_t pair;

  vf whole(const bf16* p) const {
    const vu low = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
    return (vf)(low | __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p + pair), vu) << 16);
  }
  vf first(const bf16* p, std::int64_t n) const {
    bf16 both[2][W] = {};
    copy_first(both[0], p, n);
    copy_first(both[1], p + pair, n);
    return AsCell{W}.whole(both[0]);
  }
  float one(const bf16* p) const {
    const std::uint32_t u = p[0].bits | static_cast<std::uint32_t>(p[pair].bits) << 16;
    float cell;
    std::memcpy(&cell, &u, 4);
    return cell;
  }
};

template <class Fn>
void with_reader(sk::DType type, std::int64_t pair, Fn fn) {
  if (pair != sk::kUnpaired) return fn(static_cast<bf16*>(nullptr), AsCell{pair});
  with_type(type, [=](auto* t) { fn(t, AsFloat{}); });
}

template <class Src, class Dst, class Read>
inline void convert_row(Dst* dst, const Src* src, std::int64_t n, Read read) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store_from_float(dst + i, read.whole(src + i));
  if (i == n) return;
  if (n > W)  // once more over values that are there already
    store_from_float(dst + n - W, read.whole(src + n - W));
  else if constexpr (std::is_same_v<Read, AsFloat> && std::is_same_v<Src, Dst>)
    copy_first(dst, src, n);
  else
    store_first(dst, read.first(src, n), n);
}

// Every second of 2n - 1 elements.
inline vf even_lanes(vf a, vf b) {
  vi m;
  for (int i = 0; i < W; ++i) m[i] = 2 * i;
  return __builtin_shuffle(a, b, m);
}
template <class Src, class Read>
inline void load_every(float* dst, const Src* src, std::int64_t step, std::int64_t n, Read read) {
  std::int64_t i = 0;
  if (step == 2)
    for (; i + W < n; i += W)  // not the last: its odd neighbour may lie beyond the tensor
      store(dst + i, even_lanes(read.whole(src + 2 * i), read.whole(src + 2 * i + W)));
  for (; i < n; ++i) dst[i] = read.one(src + i * step);
}

inline void clear(float* p, std::int64_t n) {
  static const float zeros[W] = {};
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(p + i, vf{});
  copy_first(p + i, zeros, n - i);
}

// What most rows are: float32, contiguous, at most one zero behind each. The general loops below keep a dozen values alive
// and take 25 cycles a row of two vectors.
__attribute__((noinline)) void copy_rows(float* dst, std::int64_t dst_step, const float* src,
                                         std::int64_t src_step, std::int64_t rows, std::int64_t cols,
                                         bool zero_behind) {
  for (std::int64_t r = 0; r < rows; ++r, dst += dst_step, src += src_step) {
    convert_row(dst, src, cols, AsFloat{});
    if (zero_behind) dst[cols] = 0.f;
  }
}

#if defined(__AVX512F__)
// Rows of cells, zeros and all, a vector at a time: a row of 14 cells took 38 cycles in the loops below, here 7.
__attribute__((noinline)) void cell_rows(float* dst, std::int64_t pitch, const bf16* src, std::int64_t pair,
                                         std::int64_t row_step, std::int64_t rows, std::int64_t before,
                                         std::int64_t cols, std::int64_t after) {
  const std::int64_t n = before + cols + after;
  for (std::int64_t i = 0; i < n; i += W) {
    const auto below = [i](std::int64_t end) {
      return first_lanes(end - i < 0 ? 0 : end - i < W ? end - i : W);
    };
    const __mmask16 written = below(n), read = below(before + cols) & ~below(before);
    const bf16* s = src - before + i;
    float* d = dst + i;
    for (std::int64_t r = 0; r < rows; ++r, d += pitch, s += row_step)
      _mm512_mask_storeu_ps(d, written,
                            (__m512)(load_lanes_of(s, read) | load_lanes_of(s + pair, read) << 16));
  }
}
#endif

void load_rows(float* dst, std::int64_t pitch, const void* src, sk::DType type, std::int64_t row_step,
               std::int64_t step, std::int64_t rows, std::int64_t zeros_before, std::int64_t cols,
               std::int64_t zeros_after, std::int64_t pair) {
  if (type == sk::DType::f32 && step == 1 && zeros_before == 0 && zeros_after <= 1)
    return copy_rows(dst, pitch, static_cast<const float*>(src), row_step, rows, cols, zeros_after == 1);
#if defined(__AVX512F__)
  if (pair != sk::kUnpaired && step == 1)
    return cell_rows(dst, pitch, static_cast<const bf16*>(src), pair, row_step, rows, zeros_before, cols,
                     zeros_after);
#endif
  with_reader(type, pair, [=](auto* t, auto read) {
    const auto* s = static_cast<decltype(t)>(const_cast<void*>(src));
    float* d = dst;
    for (std::int64_t r = 0; r < rows; ++r, d += pitch, s += row_step) {
      clear(d, zeros_before);
      step == 1 ? convert_row(d + zeros_before, s, cols, read)
                : load_every(d + zeros_before, s, step, cols, read);
      clear(d + zeros_before + cols, zeros_after);
    }
  });
}

void store_rows(void* dst, sk::DType type, std::int64_t row_step, std::int64_t step, const float* src,
                std::int64_t pitch, std::int64_t rows, std::int64_t cols) {
  if (type == sk::DType::f32 && step == 1)
    return copy_rows(static_cast<float*>(dst), row_step, src, pitch, rows, cols, false);
  with_type(type, [=](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    auto* d = static_cast<T*>(dst);
    const float* s = src;
    for (std::int64_t r = 0; r < rows; ++r, d += row_step, s += pitch) {
      if (step == 1)
        convert_row(d, s, cols, AsFloat{});
      else
        for (std::int64_t i = 0; i < cols; ++i) d[i * step] = from_float<T>(s[i]);
    }
  });
}

void load_row(float* dst, const void* src, sk::DType type, std::int64_t step, std::int64_t n) {
  load_rows(dst, 0, src, type, 0, step, 1, 0, n, 0, sk::kUnpaired);
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
template <bool Whole, class Src, class Dst, class Read>
__attribute__((noinline)) void transpose_block(Dst* dst, std::int64_t dst_ld, const Src* src,
                                               std::int64_t src_ld, std::int64_t rows, std::int64_t cols,
                                               Read read) {
  vf v[W];
#pragma GCC unroll 16
  for (int a = 0; a < W; ++a) {
    if constexpr (Whole)
      v[a] = read.whole(src + a * src_ld);
    else
      v[a] =
          a >= rows ? vf{} : (cols == W ? read.whole(src + a * src_ld) : read.first(src + a * src_ld, cols));
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

template <class Src, class Dst, class Read>
void transpose(Dst* dst, std::int64_t dst_ld, const Src* src, std::int64_t src_ld, std::int64_t rows,
               std::int64_t cols, Read read) {
  for (std::int64_t i = 0; i < rows; i += W)
    for (std::int64_t j = 0; j < cols; j += W) {
      const std::int64_t r = rows - i < W ? rows - i : W, c = cols - j < W ? cols - j : W;
      if (r == W && c == W)
        transpose_block<true>(dst + j * dst_ld + i, dst_ld, src + i * src_ld + j, src_ld, W, W, read);
      else
        transpose_block<false>(dst + j * dst_ld + i, dst_ld, src + i * src_ld + j, src_ld, r, c, read);
    }
}

void load_transposed(float* dst, std::int64_t dst_ld, const void* src, sk::DType type, std::int64_t src_ld,
                     std::int64_t rows, std::int64_t cols, std::int64_t pair) {
  with_reader(type, pair, [=](auto* t, auto read) {
    transpose(dst, dst_ld, static_cast<decltype(t)>(const_cast<void*>(src)), src_ld, rows, cols, read);
  });
}

void store_transposed(void* dst, sk::DType type, std::int64_t dst_ld, const float* src, std::int64_t src_ld,
                      std::int64_t rows, std::int64_t cols) {
  with_type(type, [=](auto* t) {
    transpose(static_cast<decltype(t)>(dst), dst_ld, src, src_ld, rows, cols, AsFloat{});
  });
}

void add_wide(double* sums, const float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(x[i]);
}

}  // namespace
