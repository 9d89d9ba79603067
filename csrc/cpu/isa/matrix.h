// Products of bfloat16 in AMX's matrix registers. Written in assembler: the compilers' intrinsics want literal register
// numbers, and GCC's do not say what memory they read.
//
// Measured, one core of a Xeon of 2024: a product of 16 rows takes 16 cycles, of 8 rows 10; a load 8 where its rows are cache
// lines and 53 where they straddle two, so lanes must be aligned. Saving takes 16 and no product runs beside it. Sums are
// therefore added to y while the next products run, after the last of them was begun: spread between the steps, or before
// them, 5 to 15 % were lost. Prefetching either operand lost up to 20 %.
#pragma once
#include <utility>

#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

#if defined(__AMX_BF16__)
namespace {

// Registers: sums in 0 to 3, filters in 4 and 5, lanes in 6 and 7.
constexpr int kFilters = 4, kLanes = 6;

template <int T>
inline void load_matrix(const float* p, std::int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(4 * step), "i"(T) : "memory");
}
template <int T>
inline void save_matrix(float* p, std::int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(4 * step), "i"(T) : "memory");
}
template <int T>
inline void zero_matrix() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int Sum, int A, int B>
inline void multiply_matrices() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

template <int V>
inline void add_sums(const sk::MatrixSums& s) {
  const float* from = s.from;
  for (int f = 0; f < s.filters; ++f, from += V * W) {
    float* const y = s.y + s.rows[f] * s.ldy;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(y + v * W, load(y + v * W) + load(from + v * W));
  }
}
inline void add_sums(const sk::MatrixSums& s) {
  if (s.vectors == 4) return add_sums<4>(s);
  if (s.vectors == 3) return add_sums<3>(s);
  s.vectors == 2 ? add_sums<2>(s) : add_sums<1>(s);
}

template <int V, int F, int J>
inline __attribute__((always_inline)) void one_product(const float* a, const float* b, std::int64_t b_step) {
  if constexpr (J == 0) load_matrix<kFilters + F % 2>(a, W);
  if constexpr (F == 0) load_matrix<kLanes + J % 2>(b + J * W, b_step);
  multiply_matrices<F * V + J, kFilters + F % 2, kLanes + J % 2>();
}

// T tiles of filters by V vectors, all channels; one of them is 1, or both are 2.
template <int T, int V, int... I>
inline __attribute__((always_inline)) void products(sk::MatrixWork& w, const float* a, const float* b,
                                                    std::int64_t b_step, float* sums,
                                                    std::integer_sequence<int, I...>) {
  static_assert(T * V <= 4 && (V <= 2 || T == 1));
  const std::int64_t a_step = w.height * W, tile = w.steps * a_step, rows = w.height * V * W;
  (zero_matrix<I>(), ...);
  for (int i = 0; i < w.steps; ++i, a += a_step, b += W * b_step)
    (one_product<V, I / V, I % V>(a + I / V * tile, b, b_step), ...);
  add_sums(w.before);
  (save_matrix<I>(sums + I / V * rows + I % V * W, V * W), ...);
}

template <int T, int V>
void add_product(sk::MatrixWork& w, const sk::MatrixRun& r, int tile, int vector) {
  float* const sums = w.sums[w.turn];
  w.turn ^= 1;
  products<T, V>(w, r.a + static_cast<std::int64_t>(tile) * w.steps * w.height * W, r.b + vector * W,
                 r.b_step, sums, std::make_integer_sequence<int, T * V>{});
  const int first = tile * w.height, left = r.filters - first, most = T * w.height;
  w.before = {sums, r.y + vector * W, r.ldy, r.rows + first, left < most ? left : most, V};
}

template <int T>
void add_products(sk::MatrixWork& w, const sk::MatrixRun& r, int tile, int vector, int vectors) {
  if constexpr (T == 1) {
    if (vectors == 4) return add_product<1, 4>(w, r, tile, vector);
    if (vectors == 3) return add_product<1, 3>(w, r, tile, vector);
  }
  for (; vectors >= 2; vectors -= 2, vector += 2) add_product<T, 2>(w, r, tile, vector);
  if (vectors) add_product<T, 1>(w, r, tile, vector);
}

void matrix_begin(sk::MatrixWork& w, int steps, int height) {
  struct alignas(64) {
    std::uint8_t palette = 1, rest[15] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } shape;
  for (int t = 0; t < 8; ++t) {
    shape.bytes[t] = 64;
    shape.rows[t] = static_cast<std::uint8_t>(t < kLanes ? height : W);
  }
  asm volatile("ldtilecfg %0" ::"m"(shape));
  w.steps = steps, w.height = height, w.turn = 0;
  w.before = {w.sums[0], nullptr, 0, nullptr, 0, 1};
}

// Pairs of tiles by pairs of vectors load the least; a tile alone takes as many vectors as there are sums.
void matrix_add(sk::MatrixWork& w, const sk::MatrixRun& r) {
  const int tiles = (r.filters + w.height - 1) / w.height;
  for (int v = 0, strips = (r.vectors + 3) / 4; strips > 0; --strips) {
    const int here = (r.vectors - v + strips - 1) / strips;
    int t = 0;
    for (; t + 4 <= tiles && here == 1; t += 4) add_product<4, 1>(w, r, t, v);
    for (; t + 2 <= tiles; t += 2) add_products<2>(w, r, t, v, here);
    if (t < tiles) add_products<1>(w, r, t, v, here);
    v += here;
  }
}

// Leaves the registers as torch's kernels expect them: not configured.
void matrix_end(sk::MatrixWork& w) {
  add_sums(w.before);
  asm volatile("tilerelease" ::: "memory");
}

}  // namespace
#endif
