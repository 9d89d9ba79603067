// The first product of fprop_sm90.cu: a patch times a block of columns.
#pragma once
#include "cuda/fprop_stripes/shared.h"
#include "cuda/ring.h"
#include "cuda/wgmma.h"

namespace sk::cuda::fprop_stripes {

// acc = the patch times one block of columns; `chunks` is 0 where there is none. A stage is given back when the products that
// read it are done, and so is x where this is the last that is wanted of it; the last chunk stays under way, its stage is
// `ring` afterwards.
// Always whole chunks: behind the last channel both operands are zeros, and a branch between these instructions has the
// assembler run them one by one (its remark C7520, which a test looks for).
template <class T, int Tiles, int N>
__device__ __forceinline__ void multiply(const Layout& l, const Shared<N>& s, int chunks, const Cursor& patch,
                                         bool last, Cursor& ring, float (&acc)[Tiles][N / 2]) {
  // Between a chunk's products rather than behind them: 7 to 11 % of the time with two tiles; with one it loses as much.
  constexpr bool kAhead = Tiles > 1;
  const int lane = threadIdx.x % 32;
  const unsigned char* rows = s.x + uniform(threadIdx.x / kWarpgroup) * Tiles * 64 * kRowBytes;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  const auto arrived = [&](int chunk) {
    mbarrier_wait(s.x_full + chunk, patch.parity);
    mbarrier_wait(s.full + ring.stage, ring.parity);
  };
  if (chunks > 0) arrived(patch.stage * chunks);
  for (int c = 0; c < chunks; ++c) {
    const int chunk = patch.stage * chunks + c, stage = ring.stage;
    const std::uint64_t x = matrix_descriptor(shared_address(rows + chunk * kRows<Tiles> * kRowBytes));
    const std::uint64_t w = matrix_descriptor(shared_address(s.ring + stage * kStageBytes<N>));
    const auto start = [&](int k) {
#pragma unroll
      for (int t = 0; t < Tiles; ++t)  // 64 rows, or 16 channels, further in units of 16 bytes
        wgmma<T, N>(acc[t], x + t * (64 * kRowBytes / 16) + 2 * k, w + 2 * k, c + k);
    };
    // Gives the last chunk back and awaits the next one.
    const auto turn = [&] {
      if (c > 0) {
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(s.empty + (stage > 0 ? stage : l.slab) - 1);
        if (lane == 0 && last) mbarrier_arrive(s.x_empty + chunk - 1);
      }
      if (c + 1 < chunks) ring.advance(l.slab);
      arrived(patch.stage * chunks + min(c + 1, chunks - 1));
    };
    wgmma_fence();
    start(0), start(1), start(2);
    if constexpr (kAhead) wgmma_commit(), turn(), wgmma_fence();
    start(3);
    wgmma_commit();
    if constexpr (!kAhead) turn();
  }
}

}  // namespace sk::cuda::fprop_stripes
