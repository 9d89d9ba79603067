// How fast this core multiplies and adds, which no name of an instruction set tells: with AVX-512, Zen 4 begins one vector a
// cycle and server cores of Intel's two; pairs of bfloat16 take as long as one float there and half of it here.
#pragma once
#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/isa/isa.h"

namespace sk {

// Vector instructions of the inner loop, multiply-adds of floats or of pairs, that a core begins in a cycle. The clock is a
// chain of multiply-adds, each of which waits 4 cycles for the one before it (Zen 2 to 5, Skylake and later, Neoverse).
inline double multiply_adds_a_cycle(const IsaKernels& isa) {
  constexpr int kSteps = 512, kTries = 9;
  constexpr double kLatency = 4;
  const int filters = isa.tile_filters, vectors = isa.tile_vectors[filters];
  const StridedTile tile = (isa.paired[1][1] ? isa.paired : isa.strided)[filters][vectors];
  const std::vector<float> a(static_cast<std::size_t>(kSteps) * filters),
      b(static_cast<std::size_t>(vectors) * isa.lanes);
  std::vector<float> y(b.size() * filters);
  std::vector<std::int32_t> rows(filters);
  for (int f = 0; f < filters; ++f) rows[f] = f;
  const auto seconds = [&](StridedTile run) {
    double least = 1;
    for (int i = 0; i < kTries; ++i) {
      const auto start = std::chrono::steady_clock::now();
      run(kSteps, a.data(), b.data(), 0, y.data(), static_cast<std::int64_t>(b.size()), rows.data());
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      least = std::min(least, taken.count());
    }
    return least;
  };
  return filters * vectors / kLatency * seconds(isa.strided[1][1]) / seconds(tile);
}

}  // namespace sk
