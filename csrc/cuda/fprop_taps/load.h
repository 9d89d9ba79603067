// What the last warpgroup of fprop_taps_sm90.cu does: a thread loads weights, three warps the next tile.
#pragma once
#include "cuda/fprop_taps/shared.h"
#include "cuda/ring.h"
#include "cuda/tma.h"

namespace sk::cuda::fprop_taps {

// What the tables are read for first.
__device__ inline void prefetch_tables(const Layout& l, const int* tables, int thread) {
  const int bytes = (l.lists - l.steps) * 4;
  const char* from = reinterpret_cast<const char*>(tables + l.steps);
  for (int i = thread * 128; i < bytes; i += kFetchers * 128) prefetch(from + i);
}

template <class S>
__device__ inline void load_tiles(const Launch& launch, int thread) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Walk& w = l.walk;
  const int zeros = zeros_of(l) / kRowBytes;
  for_each_item(l, call.tables, [&](const PixelTile& tile, const Phase& phase, int buffer, int parity) {
    const Shared s = shared_of<S>(l, buffer);
    if (thread % 32 == 0)
      mbarrier_wait(s.read, parity ^ 1);  // one lane: who waits takes turns from who computes
    warp_barrier();
    load_patch(l, stages_of<S>(l) * S::Chunks, &launch.x, tile, phase.group, s.patch, s.ready, thread);
    const auto* taps = reinterpret_cast<const int2*>(call.tables + l.entries) + phase.steps;
    const int steps = phase.steps_end - phase.steps;
#pragma unroll 1
    for (int mine = thread; mine < kPixels; mine += kFetchers) {
      const Tile p = pixel_of(tile, phase, mine);
      s.offsets[mine] = offset_of_pixel(w, phase, call.out_strides, p);
      const int first = (p.n * w.in_h + p.i) * w.in_w + p.j - tile.low;
      const bool exists = p.n < w.images;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int2 tap = taps[step];
        const bool met = exists && meets(w, p.i + tap.x, p.j + tap.y);
        s.rows[step * kPixels + mine] =
            static_cast<std::uint16_t>(met ? first + tap.x * w.in_w + tap.y : zeros);
      }
    }
    if (thread == 0) *s.header = {steps, phase.channel, phase.count, 0};
    mbarrier_arrive(s.ready);
  });
}

template <class S>
__device__ inline void load_weights(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Shared s = shared_of<S>(l, 0);
  const int stages = stages_of<S>(l) + 1, kept = kept_stages<S>(l, call.tables);
  Cursor ring;
  bool first = true;
  for_each_item(l, call.tables, [&](const PixelTile&, const Phase& phase, int, int) {
    if (kept && !first) return;
    first = false;
    const auto* from = static_cast<const unsigned char*>(call.weights) +
                       static_cast<long long>(phase.steps) * stages * S::Stage;
    for (int step = phase.steps; step < phase.steps_end; ++step)
      for (int stage = 0; stage < stages; ++stage, from += S::Stage) {
        const int bytes = stage + 1 < stages ? S::Chunks * S::Piece : 2 * S::Bundles * S::Ones;
        mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);
        mbarrier_expect(s.full + ring.stage, bytes);
        copy_bulk(s.ring + ring.stage * S::Stage, from, bytes, s.full + ring.stage);
        ring.advance(l.slab);
      }
  });
}

}  // namespace sk::cuda::fprop_taps
