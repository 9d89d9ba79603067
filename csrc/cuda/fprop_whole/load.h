// What one thread of fprop_whole_sm90.cu loads: weights once, patches through their ring.
#pragma once
#include "cuda/fprop_whole/shared.h"
#include "cuda/ring.h"

namespace sk::cuda::fprop_whole {

template <int N>
__device__ inline void load(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Walk& w = l.walk;
  const Shared s = shared_of<N>(l);
  const FilterTile filters = filter_tile_of(l, call.tables);
  const Origin origin = *reinterpret_cast<const Origin*>(call.tables + l.steps);
  const int chunks = chunks_of(l), group = static_cast<int>(blockIdx.x) % filter_tiles_of(l) / l.tiles_out;
  const int bytes = chunks * N * kRowBytes;  // of weights of a tap
  int weights = filters.taps;                // to be loaded behind the first patch
  Cursor ring;
  for_each_tile(l, [&](const PositionTile& tile) {
    for (int c = 0; c < chunks; ++c) {
      mbarrier_wait(s.read + ring.stage, ring.parity ^ 1);
      mbarrier_expect(s.ready + ring.stage, w.patch_h * w.patch_w * kRowBytes);
      copy_box(s.patches + ring.stage * l.pitch, &launch.x,
               {{c * 64, group, tile.column + origin.w, tile.row + origin.h, tile.n}}, s.ready + ring.stage);
      ring.advance(buffers_of(l));
      for (; weights < filters.taps_end; ++weights) {
        const int tap = weights - filters.taps;
        mbarrier_expect(s.kept + tap, bytes);
        copy_bulk(s.weights + tap * bytes,
                  static_cast<const unsigned char*>(call.weights) + static_cast<long long>(weights) * bytes,
                  bytes, s.kept + tap);
      }
    }
  });
}

}  // namespace sk::cuda::fprop_whole
