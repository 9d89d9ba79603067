// What the phases of fprop_sm90.cu share: its tables, its shared memory, and the order of its work.
#pragma once
#include "cuda/epilogue.h"
#include "cuda/mbarrier.h"
#include "cuda/walk.h"
#include "cuda/warpgroup.h"

namespace sk::cuda {

constexpr int kChunk = 64;  // channels of a row of shared memory: 128 bytes
constexpr int kRowBytes = 128;
constexpr int kMaxPhases = 4;              // of the stride: a tensor map each
constexpr int kThreads = 3 * kWarpgroup;   // two warpgroups that compute, then the one that loads
constexpr int kFilters = 16;               // stored at once: 32 bytes of a pixel of y
constexpr int kStagePitch = kFilters + 2;  // values between its pixels: odd in words, so that banks differ
constexpr int kMostFilters = 128;          // of a bundle

// The tables. A tile of filters has segments, one for each patch of x it reads; a segment has blocks of N columns, each
// column a stripe. A bundle is a run of filters and the blocks that hold all of their stripes, one a phase of the
// stride: its last block sums them up.
struct FilterTile {
  int segments, segments_end;
  int group, pad;
};
struct Segment {
  int origin_h, origin_w;  // of the patch, from the tile's first pixel
  int phase;
  int blocks, blocks_end;
  int pad[3];
};
struct Block {
  int first, last;      // of its bundle
  int slot;             // of the products that its columns go to
  int channel, count;   // filters of the bundle, in y
  int starts;           // in the lists: count + 1 numbers of places
  int places, stripes;  // the first of them, and how many
};
// Where a stripe's product with the pixels of y lies, in the lists.
struct alignas(8) Place {
  int column;  // values from pixel 0 of the bundle's first slot to the product that pixel 0 of the patch's grid takes
  int away;  // pixels that a product lies behind the pixel of y that takes it
};

// What a warpgroup knows of its bundle, from the lists and the epilogue, in shared memory: nothing in the sums waits for
// the caches. `places` has one more than stripes, for a load ahead.
struct BundleTable {
  int starts[kMostFilters + 2];
  float scale[kMostFilters], shift[kMostFilters];
  Place places[1];
};

// x: [chunk][row][64 channels] of one patch. weights: a ring of [column][64 channels]. Channels in 128-byte rows are
// swizzled (wgmma.h). Of each computing warpgroup: products, [slot][column][row] of a bundle; stage, [pixel][filter]
// of 16 filters; offsets of the pixels of the patch's grid in y; the bundle's table.
struct Memory {
  int x, weights, products, stage, offsets, table, barriers, end;
};

__host__ __device__ inline int chunks_of(const Layout& l) { return (l.group_in + kChunk - 1) / kChunk; }
__host__ __device__ inline int slots_of(const Layout& l) { return l.pitch; }

__host__ __device__ inline int table_bytes(const Layout& l) {
  return static_cast<int>(sizeof(BundleTable)) + slots_of(l) * l.width * static_cast<int>(sizeof(Place));
}

// Values between columns of the products: eight of them begin in different banks. What lies between two columns stays
// zero, as does kGuard before the first: a tap that reads beside the patch meets zeros (`checked` where it might not).
template <int Tiles>
constexpr int kProductPitch = Tiles * 64 + 8;
constexpr int kGuard = 64;

template <int Tiles>
__host__ __device__ inline int product_bytes(const Layout& l) {
  return (kGuard + slots_of(l) * l.width * kProductPitch<Tiles>)*2;
}
__host__ __device__ inline bool checked(const Layout& l) { return l.chunk > 1; }

template <int Tiles, int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.x = 0;
  m.weights = chunks_of(l) * Tiles * 64 * kRowBytes;
  m.products = m.weights + l.slab * N * kRowBytes;
  m.stage = m.products + 2 * product_bytes<Tiles>(l);
  m.offsets = round_up(m.stage + 2 * Tiles * 64 * kStagePitch * 2, 8);
  m.table = m.offsets + 2 * Tiles * 64 * 8;
  m.barriers = m.table + 2 * table_bytes(l);
  m.end = m.barriers + (2 * (chunks_of(l) + l.slab) + 2) * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// A chunk of x, a stage of the ring: full when its copies are in, empty when it is read. start[g]: warpgroup g may
// multiply.
struct Shared {
  unsigned char *x, *weights, *products, *stage;
  long long* offsets;
  BundleTable* table;
  Mbarrier *x_full, *x_empty, *full, *empty, *start;
};

template <int Tiles, int N>
__device__ inline Shared shared_of(const Layout& l, int group) {
  const Memory m = memory_of<Tiles, N>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  const int chunks = chunks_of(l);
  return {base + m.x,
          base + m.weights,
          base + m.products + group * product_bytes<Tiles>(l) + kGuard * 2,
          base + m.stage + group * Tiles * 64 * kStagePitch * 2,
          reinterpret_cast<long long*>(base + m.offsets) + group * Tiles * 64,
          reinterpret_cast<BundleTable*>(base + m.table + group * table_bytes(l)),
          barriers,
          barriers + chunks,
          barriers + 2 * chunks,
          barriers + 2 * chunks + l.slab,
          barriers + 2 * (chunks + l.slab)};
}

// A place in the ring, and the parity of its current round.
struct Cursor {
  int stage = 0, parity = 0;

  __device__ void advance(int by, int stages) {
    stage += by;
    while (stage >= stages) stage -= stages, parity ^= 1;
  }
  __device__ int before(int stages) const { return stage ? stage - 1 : stages - 1; }
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
