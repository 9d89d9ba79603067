// The micro-kernels: F scalars broadcast against V vectors of lanes, F * V accumulators in registers.
#pragma once
#include "cpu/isa/isa.h"
#include "cpu/isa/vec.h"

namespace {

// Accumulators after V lane vectors and one broadcast: 8x3, 6x4, 4x6 of 32 registers; 4x3, 3x4, 6x2 of 16. Lane vectors that find
// no register are loaded for every filter that meets them: 2x6 of 16 ran at 80 %, 3x4 with its one at 96 %. With one filter
// each is used once anyway.
constexpr int kBudget = SK_REGISTERS == 32 ? 24 : 12;
constexpr int kTileFilters = SK_REGISTERS == 32 ? 8 : 6;
constexpr int tile_vectors(int F) {
  const int most = F == 1 ? kBudget : SK_REGISTERS / (F + 1), v = kBudget / F < most ? kBudget / F : most;
  return v < 1 ? 1 : (v > sk::kMaxTileVectors ? sk::kMaxTileVectors : v);
}

template <int F, int V>
struct Accumulators {
  vf v[F][V];

  void zero() {
#pragma GCC unroll 24
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) v[f][j] = vf{};
  }
  template <class Row>
  void store_rows(float* y, Row row) const {
#pragma GCC unroll 24
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) store(y + row(f) + j * W, v[f][j]);
  }
  template <class Row>
  void add_rows(float* y, Row row) const {
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) store(y + row(f) + j * W, load(y + row(f) + j * W) + v[f][j]);
  }
  template <class Scalar>
  __attribute__((always_inline)) void step(Scalar a, const float* b) {
    vf x[V];
#pragma GCC unroll 12
    for (int j = 0; j < V; ++j) x[j] = load(b + j * W);
#pragma GCC unroll 24
    for (int f = 0; f < F; ++f) {
      const vf w = splat(a(f));
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) v[f][j] += w * x[j];
    }
  }
};

// Unrolled where it pays (AVX2, a core shared with another thread, where instructions count): 4 to 10 % here, 5 to 8 % in
// indexed_tile; the other two became slower. Four steps written out by hand lost 7 %.
template <int F, int V>
void strided_tile(std::int64_t n, const float* a, const float* b, std::int64_t b_step, float* y,
                  std::int64_t ldy, const std::int32_t* rows) {
  Accumulators<F, V> acc;
  acc.zero();
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < n; ++i, a += F, b += b_step) acc.step([=](int f) { return a[f]; }, b);
  acc.add_rows(y, [=](int f) { return rows[f] * ldy; });
}

// y = the sum of n steps, stretch by stretch; sum(first, last) adds those to acc.
template <class Acc, class Sum>
__attribute__((always_inline)) inline void in_stretches(std::int64_t n, std::int64_t stretch, float* y,
                                                        std::int64_t ldy, Acc& acc, Sum sum) {
  const auto row = [=](int f) { return f * ldy; };
  for (std::int64_t first = 0; first == 0 || first < n; first += stretch) {
    const std::int64_t last = n - first < stretch ? n : first + stretch;
    acc.zero();
    sum(first, last);
    if (first == 0)
      acc.store_rows(y, row);
    else
      acc.add_rows(y, row);
  }
}

template <int F, int V>
void stream_tile(std::int64_t n, std::int64_t stretch, const float* a, std::int64_t a_step,
                 const std::int32_t* f_off, const float* b, float* y, std::int64_t ldy, sk::Fetch fetch) {
  constexpr std::int64_t kLine = 64;
  Accumulators<F, V> acc;
  const float* scalar[F];
  for (int f = 0; f < F; ++f) scalar[f] = a + f_off[f];
  // Evenly spread: fetches in one go would be waited for.
  const std::int64_t steps = fetch.bytes ? 8 : n, pace = fetch.bytes * steps / n;
  const char* next = fetch.ahead;
  std::int64_t at = 0;
  in_stretches(n, stretch, y, ldy, acc, [&](std::int64_t i, std::int64_t end) {
    while (i < end) {
      fetch.ahead += pace;
      for (; next < fetch.ahead; next += kLine) __builtin_prefetch(next);
      const std::int64_t last = i + steps < end ? i + steps : end;
      for (; i < last; ++i, at += a_step, b += V * W) acc.step([&](int f) { return scalar[f][at]; }, b);
    }
  });
}

// Each vector of b comes from far away and is used once: what pays is to have all scalars that meet it here.
template <int F>
void span_tile(std::int64_t n, std::int64_t stretch, const float* a, std::int64_t a_step, const float* b,
               float* y) {
  Accumulators<F, 1> acc;
  in_stretches(n, stretch, y, W, acc, [&](std::int64_t i, std::int64_t last) {
    for (; i < last; ++i, a += a_step, b += W) acc.step([=](int f) { return a[f]; }, b);
  });
}

#if defined(__AVX512BF16__)
template <int F, int V>
void paired_tile(std::int64_t n, const float* a, const float* b, std::int64_t b_step, float* y,
                 std::int64_t ldy, const std::int32_t* rows) {
  Accumulators<F, V> acc;
  acc.zero();
  for (std::int64_t i = 0; i < n; ++i, a += F, b += b_step) {
    __m512bh x[V];
#pragma GCC unroll 12
    for (int j = 0; j < V; ++j) x[j] = (__m512bh)load(b + j * W);
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const __m512bh w = (__m512bh)splat(a[f]);
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) acc.v[f][j] = (vf)_mm512_dpbf16_ps((__m512)acc.v[f][j], w, x[j]);
    }
  }
  acc.add_rows(y, [=](int f) { return rows[f] * ldy; });
}
#endif

template <int F, int V>
void indexed_tile(std::int64_t n, const float* a, const float* b, const sk::IndexedStep* steps, float* y,
                  std::int64_t ldy) {
  Accumulators<F, V> acc;
  in_stretches(n, sk::kStretch, y, ldy, acc, [&](std::int64_t first, std::int64_t last) {
#pragma GCC unroll 8
    for (std::int64_t i = first; i < last; ++i) {
      const float* scalars = a + static_cast<std::int64_t>(steps[i].scalar) * F;
      acc.step([=](int f) { return scalars[f]; }, b + steps[i].lanes);
    }
  });
}

template <int F, int V>
void listed_tile(std::int64_t n, std::int64_t stretch, const float* a, const std::int32_t* f_off,
                 const float* b, const sk::IndexedStep* steps, float* y, std::int64_t ldy) {
  Accumulators<F, V> acc;
  const float* scalar[F];
  for (int f = 0; f < F; ++f) scalar[f] = a + f_off[f];
  in_stretches(n, stretch, y, ldy, acc, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t at = steps[i].scalar;
      acc.step([&](int f) { return scalar[f][at]; }, b + steps[i].lanes);
    }
  });
}

template <int F, int V>
struct FillVectors {
  static void run(sk::IsaKernels& k) {
    if constexpr (V >= 1) {
      k.strided[F][V] = strided_tile<F, V>;
#if defined(__AVX512BF16__)
      k.paired[F][V] = paired_tile<F, V>;
#endif
      k.indexed[F][V] = indexed_tile<F, V>;
      k.stream[F][V] = stream_tile<F, V>;
      k.listed[F][V] = listed_tile<F, V>;
      FillVectors<F, V - 1>::run(k);
    }
  }
};

template <int F>
void fill_spans(sk::IsaKernels& k) {
  if constexpr (F >= 1) {
    k.span[F] = span_tile<F>;
    fill_spans<F - 1>(k);
  }
}

template <int F>
void fill_tiles(sk::IsaKernels& k) {
  if constexpr (F >= 1) {
    k.tile_vectors[F] = tile_vectors(F);
    FillVectors<F, tile_vectors(F)>::run(k);
    fill_tiles<F - 1>(k);
  }
}

}  // namespace
