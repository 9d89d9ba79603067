// What the phases of fprop_sm90.cu share: its tables, its shared memory, and the order of its work.
#pragma once
#include "cuda/epilogue.h"
#include "cuda/mbarrier.h"
#include "cuda/ring.h"
#include "cuda/walk.h"
#include "cuda/warpgroup.h"

namespace sk::cuda {

constexpr int kChunk = 64;  // channels, or filters, of a row of shared memory: 128 bytes
constexpr int kRowBytes = 128;
constexpr int kMaxPhases = 4;  // of the stride: a tensor map each
constexpr int kComputers = 2;  // warpgroups that compute; another one loads
constexpr int kThreads = (kComputers + 1) * kWarpgroup;

// The tables. A tile of filters has segments, one for each patch of x it reads; a segment has blocks of N columns, each
// column a stripe. A bundle is a run of at most 64 filters and the blocks that hold all of their stripes.
struct FilterTile {
  int segments, segments_end;
  int group, pad;
};
struct Segment {
  int origin_h, origin_w;  // of the patch, from the tile's first pixel
  int phase;
  int blocks, blocks_end;
  int taps, tap_count;  // in the lists: pixel (p, q) of y reads pixel (p, q) + tap of the phase
  int pad;
};
struct alignas(16) Block {
  int first, last;     // of its bundle
  int channel, count;  // filters of the bundle, in y
  int pad[4];
};
// Eight columns of one tap.
struct alignas(8) Octet {
  unsigned bit;  // of the tap, in a pixel's `met`; none where the columns are not used
  int row;       // of the patch, from the pixel's own to the one that the tap reads
};
// An entry of the tables.
template <int N>
struct alignas(16) Record {
  Block block;
  Octet octets[N / 8];
};

// x: `patches_of` times [chunk][row][64 channels]. ring: [column][64 channels] of weights, or what they add to,
// [plane][64 filters][64 columns] or [column][64 filters], with the block's record. Rows of both are swizzled (wgmma.h). products: [plane][row][64 columns], swizzled
// too, and a row of zeros behind each plane. offsets: of the pixels of y. tables: a copy of what is read of them, where it
// is small: a GPU's caches are cold when a kernel begins.
struct Memory {
  int x, ring, records, products, offsets, tables, barriers, end;
};

__host__ __device__ inline int chunks_of(const Layout& l) { return (l.group_in + kChunk - 1) / kChunk; }
__host__ __device__ inline int patches_of(const Layout& l) { return l.chunk; }

// Of filter tiles and segments, and of the lists.
constexpr int kMostTables = 2048;
__host__ __device__ inline int table_bytes(const Layout& l) {
  const int bytes = (l.entries - l.items + l.classes - l.lists) * 4;
  return bytes <= kMostTables ? round_up(bytes, 16) : 0;
}

// Rows of a patch, and pixels of y, of the whole block: each warpgroup has Tiles times 64.
template <int Tiles>
constexpr int kRows = kComputers * Tiles * 64;
template <int Tiles>
constexpr int kPlaneBytes = (kRows<Tiles> + 1) * kRowBytes;
template <int N>
constexpr int kPlanes = (N + kChunk - 1) / kChunk;  // of 64 columns
template <int N>
constexpr int kStageBytes = N * kRowBytes;

template <int Tiles, int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.x = 0;
  m.ring = patches_of(l) * chunks_of(l) * kRows<Tiles> * kRowBytes;
  m.records = m.ring + l.slab * kStageBytes<N>;
  m.products = m.records + round_up(l.slab * static_cast<int>(sizeof(Record<N>)), kRowBytes);
  m.offsets = m.products + kPlanes<N> * kPlaneBytes<Tiles>;
  m.tables = m.offsets + kRows<Tiles> * 8;
  m.barriers = m.tables + table_bytes(l);
  m.end =
      m.barriers + 2 * (patches_of(l) * chunks_of(l) + l.slab) * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// A chunk of a patch, a stage of the ring: full when its copies are in, empty when it is read.
template <int N>
struct Shared {
  unsigned char *x, *ring, *products;
  Record<N>* records;
  long long* offsets;
  int* tables;
  Mbarrier *x_full, *x_empty, *full, *empty;
};

template <int Tiles, int N>
__device__ inline Shared<N> shared_of(const Layout& l) {
  const Memory m = memory_of<Tiles, N>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  const int chunks = patches_of(l) * chunks_of(l);
  return {base + m.x,
          base + m.ring,
          base + m.products,
          reinterpret_cast<Record<N>*>(base + m.records),
          reinterpret_cast<long long*>(base + m.offsets),
          reinterpret_cast<int*>(base + m.tables),
          barriers,
          barriers + chunks,
          barriers + 2 * chunks,
          barriers + 2 * chunks + l.slab};
}

// Where the tables are read: in shared memory, if they have room there.
struct Tables {
  const FilterTile* filters;
  const Segment* segments;
  const int* lists;
};

__device__ inline Tables tables_of(const Layout& l, const int* global, const int* shared) {
  const bool copied = table_bytes(l) > 0;
  const int* from = copied ? shared : global + l.items;
  return {reinterpret_cast<const FilterTile*>(from),
          reinterpret_cast<const Segment*>(from + l.steps - l.items),
          copied ? from + l.entries - l.items : global + l.lists};
}

__device__ inline void copy_tables(const Layout& l, const int* global, int* shared) {
  if (table_bytes(l) == 0) return;
  const int first = l.entries - l.items, all = first + l.classes - l.lists;
  for (int i = threadIdx.x; i < all; i += kThreads)
    shared[i] = global[i < first ? l.items + i : l.lists + i - first];
}

// The blocks of columns that a block of threads multiplies, one after the other: filter tiles with most work come first in
// the tables, and their pixel tiles go around the grid.
struct Stream {
  const Layout& l;
  const Tables tables;
  const int pixels;  // tiles
  int item, items;
  int g, g_end, group;
  Segment segment;
  Tile tile;
  int block;
  bool fresh = true;  // a patch begins

  __device__ Stream(const Layout& layout, const Tables& t)
      : l(layout),
        tables(t),
        pixels(tiles(layout.walk)),
        item(static_cast<int>(blockIdx.x)),
        items(layout.groups * layout.tiles_out * pixels) {
    begin();
  }
  __device__ bool more() const { return item < items; }
  __device__ bool last() const { return block + 1 == segment.blocks_end; }  // of the patch
  __device__ void next() {
    fresh = false;
    if (++block < segment.blocks_end) return;
    fresh = true;
    if (++g < g_end) return enter();
    item += static_cast<int>(gridDim.x);
    begin();
  }

 private:
  __device__ void begin() {
    if (!more()) return;
    const FilterTile filters = tables.filters[item / pixels];
    g = filters.segments, g_end = filters.segments_end, group = filters.group;
    tile = tile_of(l.walk, item % pixels);
    enter();
  }
  __device__ void enter() {
    segment = tables.segments[g];
    block = segment.blocks;
  }
};

}  // namespace sk::cuda
