// What fprop_sm90.cu is told by its tables. backends/cuda_stripes.py lays them out.
#pragma once
#include "cuda/walk.h"

namespace sk::cuda::fprop_stripes {

constexpr int kMaxPhases = 4;  // of the stride: a tensor map each

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

// Of filter tiles and segments, and of the lists.
constexpr int kMostTables = 2048;
__host__ __device__ inline int table_bytes(const Layout& l) {
  const int bytes = (l.entries - l.items + l.classes - l.lists) * 4;
  return bytes <= kMostTables ? round_up(bytes, 16) : 0;
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

}  // namespace sk::cuda::fprop_stripes
