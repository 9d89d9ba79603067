// What the warps of fprop_whole_sm90.cu share: its tables, its shared memory, and the order of its work.
#pragma once
#include "cuda/mbarrier.h"
#include "cuda/swizzle.h"
#include "cuda/tma.h"
#include "cuda/walk.h"
#include "cuda/warpgroup.h"

namespace sk::cuda::fprop_whole {

constexpr int kGroups = 3;  // warpgroups that compute: most blocks of a tile
constexpr int kWarps = 4 * kGroups, kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kLoader = 56, kComputer = 152;  // registers a thread
static_assert(kLoader + kGroups * kComputer <= 4 * 128);
constexpr int kBlock = 64;                  // positions
constexpr int kSumsBytes = 16 * kRowBytes;  // of a warp: 64 filters of its positions, on their way to y

struct Launch {
  CUtensorMap x;
  Params params;
};

// Where patch rows begin: what position (0, 0) reads through the first tap in either direction.
struct Origin {
  int h, w, pad[2];
};
struct FilterTile {
  int taps, taps_end;  // in the entries: rows of the patch from a position to what it reads
  int channel, count;  // of y
};

// Positions [shift, shift + count) of a patch that begins at (row, column) of y.
struct PositionTile {
  int n, row, column, shift, count;
};

struct Memory {
  int weights, patches, sums, scale, shift, taps, barriers, end;
};

__host__ __device__ inline int chunks_of(const Layout& l) { return (l.group_in + 63) / kRowChannels; }
__host__ __device__ inline int buffers_of(const Layout& l) { return l.walk.load_h; }

template <int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.weights = 0;
  m.patches = l.slab * chunks_of(l) * N * kRowBytes;
  m.sums = m.patches + buffers_of(l) * l.pitch;
  m.scale = m.sums + kWarps * kSumsBytes;
  m.shift = m.scale + N * 4;
  m.taps = m.shift + N * 4;
  m.barriers = m.taps + (l.slab + 1) / 2 * 8;
  m.end = m.barriers + (l.slab + 2 * buffers_of(l) + kGroups) * 8 + kSwizzleBytes;
  return m;
}

// kept: weights of a tap are there; ready, read: of the ring of patches; turn: of a warpgroup's blocks.
struct Shared {
  unsigned char *weights, *patches, *sums;
  float *scale, *shift;
  int* taps;
  Mbarrier *kept, *ready, *read, *turn;
};

template <int N>
__device__ inline Shared shared_of(const Layout& l) {
  const Memory m = memory_of<N>(l);
  unsigned char* base = shared_memory();
  base += swizzle_padding(base);
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  return {base + m.weights,
          base + m.patches,
          base + m.sums,
          reinterpret_cast<float*>(base + m.scale),
          reinterpret_cast<float*>(base + m.shift),
          reinterpret_cast<int*>(base + m.taps),
          barriers,
          barriers + l.slab,
          barriers + l.slab + buffers_of(l),
          barriers + l.slab + 2 * buffers_of(l)};
}

__host__ __device__ inline int filter_tiles_of(const Layout& l) { return l.groups * l.tiles_out; }
__host__ __device__ inline int tiles_of(const Walk& w) { return w.tiles_n * w.tiles_h * w.tiles_w; }

__device__ inline FilterTile filter_tile_of(const Layout& l, const int* tables) {
  return reinterpret_cast<const FilterTile*>(tables + l.items)[blockIdx.x % filter_tiles_of(l)];
}

// Calls item(tile) for every tile of positions of this block.
template <class Item>
__device__ inline void for_each_tile(const Layout& l, const Item& item) {
  const Walk& w = l.walk;
  const int shares = static_cast<int>(gridDim.x) / filter_tiles_of(l), tiles = tiles_of(w);
  for (int i = static_cast<int>(blockIdx.x) / filter_tiles_of(l); i < tiles; i += shares) {
    const int band = i % w.tiles_w, image = i / w.tiles_w;
    const int first = image % w.tiles_h * w.row_h, row = first / w.patch_w;
    const int left = (w.out_h - 1) * w.patch_w + w.tile_w - first;
    item(PositionTile{image / w.tiles_h, row, band * w.tile_w, first - row * w.patch_w,
                      min(left, min(w.row_h, w.load_w * kBlock))});
  }
}

}  // namespace sk::cuda::fprop_whole
