// How fast this core multiplies and adds, which no name of an instruction set tells: with AVX-512, Zen 4 begins one vector a
// cycle and server cores of Intel's two; pairs of bfloat16 take as long as one float there and half of it here.
#pragma once
#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/isa/isa.h"

namespace sk {

// Vector instructions of the inner loop, multiply-adds of floats or of pairs, that a core begins in a cycle; a product of
// matrices counts for as many as it stands for. The clock is a chain of multiply-adds, each of which waits 4 cycles for the
// one before it (Zen 2 to 5, Skylake and later, Neoverse).
inline double multiply_adds_a_cycle(const IsaKernels& isa) {
  constexpr int kSteps = 512, kTries = 9;
  constexpr double kLatency = 4;
  const bool matrix = isa.matrix.add;
  const int filters = matrix ? kMatrixHeight : isa.tile_filters,
            vectors = matrix ? 4 : isa.tile_vectors[filters];
  struct alignas(64) Line {  // that no load straddles two
    float of[16] = {};
  };
  const auto lines = [](int floats) { return static_cast<std::size_t>(floats / 16 + 1); };
  const std::vector<Line> a(lines(kSteps * filters)), b(lines(vectors * isa.lanes));
  std::vector<Line> y(b.size() * filters);
  std::vector<std::int32_t> rows(filters);
  for (int f = 0; f < filters; ++f) rows[f] = f;
  const auto seconds = [&](const auto& run) {
    double least = 1;
    for (int i = 0; i < kTries; ++i) {
      const auto start = std::chrono::steady_clock::now();
      run();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      least = std::min(least, taken.count());
    }
    return least;
  };
  const auto ldy = static_cast<std::int64_t>(b.size()) * 16;
  const auto strided = [&](StridedTile tile) {
    return seconds([&] { tile(kSteps, a[0].of, b[0].of, 0, y[0].of, ldy, rows.data()); });
  };
  const double chain = filters * vectors / kLatency * strided(isa.strided[1][1]);
  if (!matrix) return chain / strided((isa.paired[1][1] ? isa.paired : isa.strided)[filters][vectors]);
  return chain / seconds([&] {
           MatrixWork work;
           isa.matrix.begin(work, kSteps / 16, filters);
           isa.matrix.add(work, {a[0].of, b[0].of, 0, y[0].of, ldy, rows.data(), filters, vectors});
           isa.matrix.end(work);
         });
}

}  // namespace sk
