// Two filters at once through all their taps, 2 * V accumulators in registers: for few channels, where a tap alone has too few
// multiply-adds to pay for loading and storing y.
#pragma once
#include "cpu/isa/tile.h"

namespace {

constexpr int kPairVectors = kBudget / 2;

// C: channels known when this was compiled, or 0.
template <int V, int C>
void shared_taps(std::int64_t stripes, std::int64_t channels, const float* a, const std::int32_t* offsets,
                 const float* b, std::int64_t c_stride, float* y0, float* y1, bool first) {
  Accumulators<2, V> acc;
  acc.zero();
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < stripes; ++i) {
    const float* x = b + offsets[i];
#pragma GCC unroll 3
    for (std::int64_t c = 0; c < (C ? C : channels); ++c, x += c_stride, a += 2) {
      const vf w0 = splat(a[0]), w1 = splat(a[1]);
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) {
        const vf lanes = load(x + j * W);
        acc.v[0][j] += w0 * lanes;
        acc.v[1][j] += w1 * lanes;
      }
    }
  }
  const auto row = [=](int f) { return f ? y1 - y0 : 0; };
  first ? acc.store_rows(y0, row) : acc.add_rows(y0, row);
}

template <int V, int C>
void own_taps(std::int64_t stripes, std::int64_t channels, const float* a, const std::int32_t* offsets,
              const float* b, std::int64_t c_stride, float* y0, float* y1, bool first) {
  Accumulators<2, V> acc;
  acc.zero();
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < stripes; ++i) {
    const float *x0 = b + offsets[2 * i], *x1 = b + offsets[2 * i + 1];
#pragma GCC unroll 3
    for (std::int64_t c = 0; c < (C ? C : channels); ++c, x0 += c_stride, x1 += c_stride, a += 2) {
      const vf w0 = splat(a[0]), w1 = splat(a[1]);
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) acc.v[0][j] += w0 * load(x0 + j * W);
#pragma GCC unroll 12
      for (int j = 0; j < V; ++j) acc.v[1][j] += w1 * load(x1 + j * W);
    }
  }
  const auto row = [=](int f) { return f ? y1 - y0 : 0; };
  first ? acc.store_rows(y0, row) : acc.add_rows(y0, row);
}

template <int V>
void fill_pairs(sk::IsaKernels& k) {
  if constexpr (V >= 1) {
    k.shared_taps[0][V] = shared_taps<V, 0>, k.own_taps[0][V] = own_taps<V, 0>;
    k.shared_taps[1][V] = shared_taps<V, 1>, k.own_taps[1][V] = own_taps<V, 1>;
    k.shared_taps[2][V] = shared_taps<V, 2>, k.own_taps[2][V] = own_taps<V, 2>;
    k.shared_taps[3][V] = shared_taps<V, 3>, k.own_taps[3][V] = own_taps<V, 3>;
    fill_pairs<V - 1>(k);
  }
}

void fill_taps(sk::IsaKernels& k) {
  static_assert(kPairVectors <= sk::kMaxTileVectors && sk::kTapChannels == 3, "the table has room for all");
  k.pair_vectors = kPairVectors;
  fill_pairs<kPairVectors>(k);
}

}  // namespace
