// The two products of a step of fprop_taps_sm90.cu, both with their left operand in registers.
#pragma once
#include <utility>

#include "cuda/fprop_taps/shared.h"
#include "cuda/wgmma.h"

namespace sk::cuda::fprop_taps {

// Channels of a warpgroup's pixels, 64 or 32 at once, as wgmma takes them from registers.
template <class S>
using Operand = std::uint32_t[4 / S::Parts][4];

// z as wgmma takes it from registers.
template <class S>
using Rounded = std::uint32_t[S::Columns / 16][4];

// at: of the pixel that a lane names, the address of its first 16 bytes (lanes 16 on: second).
template <class S>
__device__ __forceinline__ void load_pixels(const unsigned char* patch, int at, int part, Operand<S>& a) {
#pragma unroll
  for (int k = 0; k < 4 / S::Parts; ++k) load_matrices(a[k], patch + (at ^ (part * (4 / S::Parts) + k) * 32));
}

// z (+)= a times those channels of weights.
template <class T, class S>
__device__ __forceinline__ void multiply(const Operand<S>& a, std::uint64_t w, int accumulate,
                                         float (&z)[S::Columns / 2]) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4 / S::Parts; ++k)
    wgmma_registers<T, S::Columns, false>(z, a[k], w + 2 * k, accumulate + k);
  wgmma_commit();
}

// z as the next product's left operand.
template <class T, class S>
__device__ __forceinline__ void round(const float (&z)[S::Columns / 2], Rounded<S>& to) {
#pragma unroll
  for (int c = 0; c < S::Columns / 16; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) to[c][e] = pack<T>(z[8 * c + 2 * e], z[8 * c + 2 * e + 1]);
}

// y (+)= z times ones: of every bundle its own columns', then those of what is left over.
template <class T, class S, int... B>
__device__ __forceinline__ void add_columns(const Rounded<S>& z, std::uint64_t ones, int accumulate,
                                            float (&y)[S::Bundles][S::Serve / 2],
                                            std::integer_sequence<int, B...>) {
  constexpr int kNext = S::Ones >> 4;
  wgmma_fence();
  (..., (wgmma_registers<T, S::Serve, false>(y[B], z[B], ones + 2 * B * kNext, accumulate),
         wgmma_registers<T, S::Serve, false>(y[B], z[S::Bundles], ones + (2 * B + 1) * kNext, 1)));
  wgmma_commit();
}

}  // namespace sk::cuda::fprop_taps
