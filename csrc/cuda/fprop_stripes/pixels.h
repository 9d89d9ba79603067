// Which pixels of y a thread of fprop_sm90.cu has to do with.
#pragma once
#include "cuda/fprop_stripes/shared.h"

namespace sk::cuda::fprop_stripes {

// A thread names, for ldmatrix and stmatrix, row lane % 16 and half lane / 16 of 16 columns of the 16 rows of its warp;
// of every 64 rows of its warpgroup.
template <int Tiles>
__device__ inline int named_row(int t) {
  const int warp = threadIdx.x / 32;
  return (warp / 4 * Tiles + t) * 64 + warp % 4 * 16 + threadIdx.x % 16;
}

// The pixels of y that a thread names: where they would lie in the patch themselves, and which taps meet x.
template <int Tiles>
struct Pixels {
  int at[Tiles];  // image, row and column within the tile, ten bits each; divides once, not for every tile
  int base[Tiles];
  unsigned met[Tiles] = {};

  __device__ explicit Pixels(const Walk& w) {
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const int m = named_row<Tiles>(t), area = w.tile_h * w.tile_w;
      const int n = m / area, i = m % area / w.tile_w, j = m % w.tile_w;
      at[t] = n << 20 | i << 10 | j;
      base[t] = (n * w.patch_h + i) * w.patch_w + j;
    }
  }

  __device__ void meet(const Walk& w, const Tile& tile, const Segment& segment, const int2* taps) {
    const int rows = (w.in_h - segment.phase / w.in_step_w + w.in_step_h - 1) / w.in_step_h;
    const int columns = (w.in_w - segment.phase % w.in_step_w + w.in_step_w - 1) / w.in_step_w;
    constexpr int kAtOnce = 4;  // loads before the first is used
#pragma unroll
    for (int t = 0; t < Tiles; ++t) met[t] = 0;
    for (int first = 0; first < segment.tap_count; first += kAtOnce)
#pragma unroll
      for (int k = first; k < first + kAtOnce; ++k) {
        const int2 tap = taps[min(k, segment.tap_count - 1)];
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          const Tile p = pixel(tile, t);
          const bool inside = static_cast<unsigned>(p.i + tap.x) < static_cast<unsigned>(rows) &&
                              static_cast<unsigned>(p.j + tap.y) < static_cast<unsigned>(columns);
          if (k < segment.tap_count) met[t] |= static_cast<unsigned>(inside) << k;
        }
      }
#pragma unroll
    for (int t = 0; t < Tiles; ++t)
      if (!exists(w, pixel(tile, t), t)) met[t] = 0;
  }

  // Their offsets in y, channel 0, or -1.
  __device__ void list(const Walk& w, const Tile& tile, const Strides& s, long long* offsets) const {
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const Tile p = pixel(tile, t);
      if (threadIdx.x % 32 < 16)
        offsets[named_row<Tiles>(t)] = exists(w, p, t) ? p.n * s.n + p.i * s.h + p.j * s.w : -1;
    }
    warp_barrier();
  }

 private:
  __device__ Tile pixel(const Tile& tile, int t) const {
    return {tile.n + (at[t] >> 20), tile.i + (at[t] >> 10 & 1023), tile.j + (at[t] & 1023)};
  }
  __device__ bool exists(const Walk& w, const Tile& p, int t) const {
    return at[t] >> 20 < w.tile_n && p.n < w.images && p.i < w.out_h && p.j < w.out_w;
  }
};

}  // namespace sk::cuda::fprop_stripes
