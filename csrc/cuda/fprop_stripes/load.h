// What one thread of fprop_sm90.cu loads.
#pragma once
#include "cuda/fprop_stripes/shared.h"
#include "cuda/fprop_stripes/stream.h"
#include "cuda/ring.h"
#include "cuda/tma.h"

namespace sk::cuda::fprop_stripes {

struct Launch {
  CUtensorMap phase[kMaxPhases];
  Params params;
};

// One thread loads everything, in the order in which it is multiplied: a block's weights, then what the columns of the block
// before add to.
template <int Tiles, int N>
__device__ inline void load(const Launch& launch, const Shared<N>& s, const Tables& tables) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const auto* records = reinterpret_cast<const Record<N>*>(call.tables + l.entries);
  const auto* weights = static_cast<const unsigned char*>(call.weights);
  constexpr int kBytes = kStageBytes<N>, kRecord = sizeof(Record<N>);
  const int chunks = chunks_of(l), patch_bytes = patch_rows(l.walk) * kRowBytes;
  Cursor ring, patch;
  const auto load_piece = [&](int block, int piece) {
    const bool last = piece == chunks;
    Mbarrier* full = s.full + ring.stage;
    mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);
    mbarrier_expect(full, kBytes + (last ? kRecord : 0));
    copy_bulk(s.ring + ring.stage * kBytes,
              weights + (static_cast<long long>(block) * (chunks + 1) + piece) * kBytes, kBytes, full);
    if (last) copy_bulk(s.records + ring.stage, records + block, kRecord, full);
    ring.advance(l.slab);
  };
  int before = -1;
  for (Stream at(l, tables); at.more(); at.next()) {
    for (int c = 0; c < chunks; ++c) {
      if (at.fresh) {
        const int chunk = patch.stage * chunks + c;
        mbarrier_wait(s.x_empty + chunk, patch.parity ^ 1);
        mbarrier_expect(s.x_full + chunk, patch_bytes);
        copy_box(s.x + chunk * kRows<Tiles> * kRowBytes, &launch.phase[at.segment.phase],
                 {{c * kRowChannels, at.group, at.tile.j + at.segment.origin_w,
                   at.tile.i + at.segment.origin_h, at.tile.n}},
                 s.x_full + chunk);
      }
      load_piece(at.block, c);
    }
    if (at.last()) patch.advance(patches_of(l));
    if (before >= 0) load_piece(before, chunks);
    before = at.block;
  }
  if (before >= 0) load_piece(before, chunks);
}

}  // namespace sk::cuda::fprop_stripes
