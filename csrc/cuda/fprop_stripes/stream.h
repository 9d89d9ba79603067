// The order of the work of fprop_sm90.cu, which those who load and those who compute follow alike.
#pragma once
#include "cuda/fprop_stripes/tables.h"

namespace sk::cuda::fprop_stripes {

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

}  // namespace sk::cuda::fprop_stripes
