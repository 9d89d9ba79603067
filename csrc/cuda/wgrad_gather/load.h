// What the last warpgroup of wgrad_sm90.cu does: a thread loads tiles, three warps list where taps find their pixels.
#pragma once
#include "cuda/ring.h"
#include "cuda/tma.h"
#include "cuda/wgrad_gather/shared.h"

namespace sk::cuda::wgrad_gather {

// Calls load(tile, memory of its stage) for every tile, once its stage is free.
template <class S, class Load>
__device__ inline void for_each_tile(const Layout& l, const Call& call, const Load& load) {
  const auto* tiles = reinterpret_cast<const PixelTile*>(call.tables + l.items);
  const Share share(l);
  Cursor ring;
  PixelTile next = tiles[share.begin];
  for (int i = share.begin; i < share.end; ++i) {
    const PixelTile tile = next;
    next = tiles[min(i + 1, share.end - 1)];
    const Shared s = shared_of<S>(l, ring.stage);
    if (threadIdx.x % 32 == 0)
      mbarrier_wait(s.read, ring.parity ^ 1);  // one lane: who waits takes turns from who computes
    load(tile, s);
    ring.advance(l.slab);
  }
}

template <class S>
__device__ inline void load_tiles(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Phase phase = phase_of(l, launch.params.call);
  const int chunks = filter_chunks(l), channel = phase.group * l.group_in + blockIdx.x * S::N;
  for_each_tile<S>(l, launch.params.call, [&](const PixelTile& tile, const Shared& s) {
    mbarrier_expect(s.ready, S::Pixels * S::N * 2 + patch_bytes(l, chunks));
    copy_patch(l, chunks, &launch.dy, tile, phase.channel, s.patch, s.ready);
#pragma unroll
    for (int c = 0; c < S::N; c += kRowChannels)
      copy_box(s.x + c * S::Pixels * 2, &launch.x, {{channel + c, tile.first, 0, 0, 0}}, s.ready);
  });
}

// A pixel of x: the row of the patch where it would lie itself. One that does not exist meets nothing.
struct Pixel {
  int i, j, row;

  __device__ Pixel(const Walk& w, const PixelTile& tile, const Phase& phase, int mine) {
    const Tile p = pixel_of(tile, phase, mine);
    i = p.n < w.images ? p.i : -(1 << 30), j = p.j;
    row = (p.n * w.in_h + p.i) * w.in_w + p.j - tile.low;
  }

  // Where a tap finds it, in bytes and with the swizzle of its row.
  __device__ std::uint32_t place(const Walk& w, const Tap& tap, int zeros) const {
    const int met = row + tap.rows, own = met & 7;
    return (meets(w, i - tap.i, j - tap.j) ? met : zeros + own) * kRowBytes | own << 4;
  }
};

// The places of every tap, as threads gather them: of 16 pixels thread t of four takes 2t, 2t + 1, 2t + 8 and 2t + 9. A lane
// lists two neighbours, a warp every third tap.
template <class S>
__device__ inline void list_places(const Layout& l, const PixelTile& tile, const Phase& phase,
                                   const Shared& s, int thread) {
  const int zeros = first_zeros(l);
#pragma unroll 1
  for (int pair = thread % 32; pair < S::Pixels / 2; pair += 32) {
    const Pixel first(l.walk, tile, phase, 2 * pair), second(l.walk, tile, phase, 2 * pair + 1);
    unsigned char* to = s.lists + (pair / 8 * 8 + pair % 4 * 2 + pair % 8 / 4) * 4;
#pragma unroll 1
    for (int t = thread / 32; t < phase.tap_count; t += kFetchers / 32) {
      const Tap tap = s.taps[t];
      *reinterpret_cast<std::uint32_t*>(to + t * S::ListPitch) =
          first.place(l.walk, tap, zeros) | second.place(l.walk, tap, zeros) << 16;
    }
  }
}

template <class S>
__device__ inline void list_tiles(const Launch& launch, int thread) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Phase phase = phase_of(l, call);
  for_each_tile<S>(l, call, [&](const PixelTile& tile, const Shared& s) {
    warp_barrier();
    list_places<S>(l, tile, phase, s, thread);
    mbarrier_arrive(s.ready);
  });
}

}  // namespace sk::cuda::wgrad_gather
