// What the last warpgroup of dgrad_sm90.cu does: a thread loads weights, three warps the next tile.
#pragma once
#include "cuda/dgrad_gather/shared.h"
#include "cuda/tma.h"

namespace sk::cuda::dgrad_gather {

__device__ inline void list_pixels(const Layout& l, const Call& call, const PixelTile& tile,
                                   const Phase& phase, Pixel* pixels, int thread) {
  const Walk& w = l.walk;
  const auto* taps = reinterpret_cast<const int2*>(call.tables + l.lists + phase.taps);
  for (int mine = thread; mine < kPixels; mine += kFetchers) {
    const Tile p = pixel_of(tile, phase, mine);
    Pixel pixel = {((p.n * w.in_h + p.i) * w.in_w + p.j - tile.low) * kRowBytes, 0,
                   offset_of_pixel(w, phase, call.out_strides, p)};
    if (p.n < w.images)
      for (int t = 0; t < phase.tap_count; ++t)
        pixel.met |= static_cast<unsigned>(meets(w, p.i - taps[t].x, p.j - taps[t].y)) << t;
    pixels[mine] = pixel;
  }
}

template <int N>
__device__ inline void load_tiles(const Launch& launch, int thread) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  int first = -1, second = -1;  // phases whose steps the buffers hold
  for_each_item(
      l, call.tables, [&](const PixelTile& tile, const Phase& phase, int channels, int buffer, int parity) {
        const Shared s = shared_of<N>(l, buffer);
        mbarrier_wait(s.read, parity ^ 1);
        load_patch(l, patch_chunks(l), &launch.dy, tile, phase.group, s.patch, s.ready, thread);
        if ((buffer ? second : first) != tile.phase) {
          constexpr int kPieces = sizeof(StripeStep) / 16;
          const auto* steps = reinterpret_cast<const uint4*>(call.tables + l.entries) + phase.steps * kPieces;
          for (int i = thread; i < (phase.steps_end - phase.steps) * kPieces; i += kFetchers)
            reinterpret_cast<uint4*>(s.steps)[i] = steps[i];
        }
        if (buffer)
          second = tile.phase;
        else
          first = tile.phase;
        list_pixels(l, call, tile, phase, s.pixels, thread);
        if (thread == 0)
          *s.header = {phase.steps_end - phase.steps, phase.group * l.group_out + channels * N};
        mbarrier_arrive(s.ready);
      });
}

template <int N>
__device__ inline void load_weights(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Shared s = shared_of<N>(l, 0);
  int stage = 0, parity = 0;
  for_each_item(l, launch.params.call.tables,
                [&](const PixelTile&, const Phase& phase, int channels, int, int) {
                  for (int step = phase.steps; step < phase.steps_end; ++step) {
                    mbarrier_wait(s.empty + stage, parity ^ 1);
                    mbarrier_expect(s.full + stage, kStripes * N * 2);
#pragma unroll
                    for (int c = 0; c < N; c += kRowChannels)
                      copy_box(s.weights + (stage * N + c) * kStripes * 2, &launch.weights,
                               {{channels * N + c, step * kStripes, 0, 0, 0}}, s.full + stage);
                    if (++stage == l.slab) stage = 0, parity ^= 1;
                  }
                });
}

}  // namespace sk::cuda::dgrad_gather
