// What fprop_taps_sm90.cu, dgrad_sm90.cu and wgrad_sm90.cu share: tiles of consecutive pixels, of all images, and how three
// warps load the patch that a tile reads, halo included, and list its pixels while the tile before is computed. Said of
// dgrad, which reads dy and writes dx; fprop's taps are listed with their signs turned, and wgrad reads x where dgrad writes
// dx. backends/cuda_tiles.py lays them out.
#pragma once
#include "cuda/mbarrier.h"
#include "cuda/swizzle.h"
#include "cuda/tma.h"
#include "cuda/walk.h"
#include "cuda/warpgroup.h"

namespace sk::cuda {

constexpr int kFetchers = 96;  // threads that load patches

struct PixelTile {
  int phase;
  int first;      // pixel, of all images of the phase
  int low, rows;  // of the patch: pixels of dy, of all images
  int n, i, j;    // of the first pixel
  int pad;
};
struct Phase {
  int group, h0, w0;  // the phase's pixels of dx: (h0 + i * step, w0 + j * step)
  int rows, columns;
  int taps, tap_count;   // in the lists: i and j of pixel (p, q) = (i, j) - tap of dy
  int steps, steps_end;  // wgrad: first stripe
  int channel, count;    // fprop: of y; wgrad: first filter of dy, and stripes
  int pad;
};

__host__ __device__ inline int patch_chunks(const Layout& l) {
  return (l.group_in + kRowChannels - 1) / kRowChannels;
}
// Where the row of zeros lies: behind the rows that boxes fill.
__host__ __device__ inline int zeros_of(const Layout& l) {
  const int box = l.walk.load_w;
  return (l.chunk + box - 1) / box * box * kRowBytes;
}
__host__ __device__ inline int most_steps(const Layout& l) { return l.walk.patch_w; }
__host__ __device__ inline int buffers_of(const Layout& l) { return l.walk.load_h; }  // of tiles: 1 or 2

// A tile's patch is [64 channels][pixel][128 bytes, swizzled], l.pitch bytes from 64 channels to the next. What it takes of a
// barrier's bytes, and its copies, for one thread: from `channel` on.
__device__ inline int patch_bytes(const Layout& l, int chunks) { return chunks * zeros_of(l); }
__device__ inline void copy_patch(const Layout& l, int chunks, const CUtensorMap* map, const PixelTile& tile,
                                  int channel, unsigned char* patch, Mbarrier* ready) {
  const int box = l.walk.load_w, boxes = (l.chunk + box - 1) / box;
  for (int c = 0; c < chunks; ++c)
    for (int b = 0; b < boxes; ++b)
      copy_box(patch + c * l.pitch + b * box * kRowBytes, map,
               {{channel + c * kRowChannels, tile.low + b * box, 0, 0, 0}}, ready);
}

// Loads a patch of a group's channels (one thread), and zeros to the row behind the pixels of each 64.
__device__ inline void load_patch(const Layout& l, int chunks, const CUtensorMap* map, const PixelTile& tile,
                                  int group, unsigned char* patch, Mbarrier* ready, int thread) {
  if (thread == 0) {
    stores_ready();  // what was done here before comes before what the copy engine does
    mbarrier_expect(ready, patch_bytes(l, chunks));
    copy_patch(l, chunks, map, tile, group * l.group_in, patch, ready);
  }
  for (int i = thread; i < chunks * 8; i += kFetchers)
    *reinterpret_cast<uint4*>(patch + i / 8 * l.pitch + zeros_of(l) + i % 8 * 16) = {0, 0, 0, 0};
}

// x / d of small numbers: exact below 2^20, since a quotient lies half a divisor's share from the next.
__device__ inline int divide(int x, float reciprocal) { return static_cast<int>((x + 0.5f) * reciprocal); }

// Number `mine` of a tile, as (image, row, column) of its phase; the image may not exist.
__device__ inline Tile pixel_of(const PixelTile& tile, const Phase& phase, int mine) {
  const int down = divide(tile.j + mine, 1.f / phase.columns);
  const int images = divide(tile.i + down, 1.f / phase.rows);
  return {tile.n + images, tile.i + down - images * phase.rows, tile.j + mine - down * phase.columns};
}

// Where its dx is.
__device__ inline long long offset_of_pixel(const Walk& w, const Phase& phase, const Strides& o,
                                            const Tile& p) {
  return p.n < w.images
             ? p.n * o.n + (phase.h0 + p.i * w.out_step_h) * o.h + (phase.w0 + p.j * w.out_step_w) * o.w
             : -1;
}

__device__ inline bool meets(const Walk& w, int p, int q) {
  return static_cast<unsigned>(p) < static_cast<unsigned>(w.in_h) &&
         static_cast<unsigned>(q) < static_cast<unsigned>(w.in_w);
}

}  // namespace sk::cuda
