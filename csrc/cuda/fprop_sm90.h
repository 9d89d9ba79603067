// What the phases of fprop_sm90.cu share: its tables, its shared memory, and the order of its work.
#pragma once
#include "cuda/mbarrier.h"
#include "cuda/tile_store.h"
#include "cuda/warpgroup.h"

namespace sk::cuda {

constexpr int kChunk = 64;  // channels of a row of shared memory: 128 bytes
constexpr int kRowBytes = 128;
constexpr int kRound = 32;                // columns merged between two barriers: no filter twice among them
constexpr int kMaxPhases = 4;             // of the stride: a tensor map each
constexpr int kThreads = 3 * kWarpgroup;  // two warpgroups that compute, then the one that loads

// The tables. A tile of filters has segments, one a phase of the stride; a segment has blocks of N columns, each
// column a stripe.
struct FilterTile {
  int channel, count;  // first of y, and how many
  int segments, segments_end;
  int blocks;  // of all segments
  int group, pad[2];
};
struct Segment {
  int origin_h, origin_w;  // of the patch, from the tile's first pixel
  int phase;
  int blocks, blocks_end;
  int pad[3];
};

// x: [chunk][row][64 channels] of one patch. weights: a ring of [column][64 channels]. sums: [place][filter]
// with a word for each thread behind them, for values that belong to no output. Channels in 128-byte rows are
// swizzled (wgmma.h).
struct Memory {
  int x, weights, sums, barriers, end;
};

__host__ __device__ inline int chunks_of(const Layout& l) { return (l.group_in + kChunk - 1) / kChunk; }

// A place is a pixel of the patch's grid that may be an output pixel: (n * patch_h + i) * patch_w + j.
__host__ __device__ inline int places_of(const Walk& w) {
  return ((w.tile_n - 1) * w.patch_h + w.tile_h - 1) * w.patch_w + w.tile_w;
}

template <int Tiles, int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.x = 0;
  m.weights = chunks_of(l) * Tiles * 64 * kRowBytes;
  m.sums = m.weights + l.slab * N * kRowBytes;
  m.barriers = round_up(m.sums + (places_of(l.walk) * l.pitch + kWarpgroup) * 4, 8);
  m.end = m.barriers + (2 * (chunks_of(l) + l.slab) + 4) * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// A chunk of x, a stage of the ring: full when its copies are in, empty when it is read. start[g], turn[g]: warpgroup g
// may multiply, may merge.
struct Shared {
  unsigned char *x, *weights;
  float* sums;
  Mbarrier *x_full, *x_empty, *full, *empty, *start, *turn;
};

template <int Tiles, int N>
__device__ inline Shared shared_of(const Layout& l) {
  const Memory m = memory_of<Tiles, N>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  const int chunks = chunks_of(l);
  return {base + m.x,
          base + m.weights,
          reinterpret_cast<float*>(base + m.sums),
          barriers,
          barriers + chunks,
          barriers + 2 * chunks,
          barriers + 2 * chunks + l.slab,
          barriers + 2 * (chunks + l.slab),
          barriers + 2 * (chunks + l.slab) + 2};
}

// A place in the ring, and the parity of its current round.
struct Cursor {
  int stage = 0, parity = 0;

  __device__ void advance(int by, int stages) {
    stage += by;
    while (stage >= stages) stage -= stages, parity ^= 1;
  }
};

// The two warpgroups alternate: each takes its turn when the other has passed it on. Warpgroup 0 begins.
struct Turns {
  Mbarrier* barriers;  // of the two
  int group, taken = 0;

  __device__ void take() { mbarrier_wait(barriers + group, (taken++ & 1) ^ (group == 0)); }
  __device__ void pass() {
    warp_barrier();  // what the warp did before comes before its arrival
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers + (group ^ 1));
  }
};

// Calls item(filters, tile) for every item of this block: the filter tiles with most work come first in the tables,
// and their pixel tiles go around the grid.
template <class Item>
__device__ inline void for_each_item(const Layout& l, const int* tables, const Item& item) {
  const int pixels = tiles(l.walk);
  const long long total = static_cast<long long>(l.groups) * l.tiles_out * pixels;
  const auto* filters = reinterpret_cast<const FilterTile*>(tables + l.items);
  for (int i = blockIdx.x; i < total; i += gridDim.x) item(filters[i / pixels], tile_of(l.walk, i % pixels));
}

}  // namespace sk::cuda
