// The device's side of a Walk (params.h): tiles, patch rows and output pixels from their numbers.
#pragma once
#include "cuda/instructions.h"
#include "cuda/params.h"

namespace sk::cuda {

struct Tile {
  int n, i, j;
};

__device__ inline Tile tile_of(const Walk& w, int index) {
  return {index / (w.tiles_w * w.tiles_h) * w.tile_n, index / w.tiles_w % w.tiles_h * w.tile_h,
          index % w.tiles_w * w.tile_w};
}

__host__ __device__ inline int tiles(const Walk& w) { return w.tiles_n * w.tiles_h * w.tiles_w; }
__host__ __device__ inline int patch_rows(const Walk& w) { return w.tile_n * w.patch_h * w.patch_w; }
__host__ __device__ inline int round_up(int value, int to) { return (value + to - 1) / to * to; }

// A row of the patch: its input pixel before the step's origin is added; n < 0 where no image is.
struct PatchRow {
  int n, h, w;
};

__device__ inline PatchRow patch_row(const Walk& w, const Tile& t, int row) {
  const int n = t.n + row / (w.patch_w * w.patch_h);
  return {n < w.images ? n : -1, t.i * w.in_step_h + row / w.patch_w % w.patch_h * w.load_h,
          t.j * w.in_step_w + row % w.patch_w * w.load_w};
}

template <int Threads>
__device__ inline void list_patch_rows(const Walk& walk, const Tile& tile, PatchRow* rows) {
  for (int i = threadIdx.x; i < patch_rows(walk); i += Threads) rows[i] = patch_row(walk, tile, i);
}

__device__ inline bool inside(const Walk& w, const PatchRow& row, int origin_h, int origin_w) {
  return row.n >= 0 && static_cast<unsigned>(row.h + origin_h) < static_cast<unsigned>(w.in_h) &&
         static_cast<unsigned>(row.w + origin_w) < static_cast<unsigned>(w.in_w);
}

__device__ inline long long offset_of(const Strides& s, const PatchRow& row, int origin_h, int origin_w) {
  return row.n * s.n + (row.h + origin_h) * s.h + (row.w + origin_w) * s.w;
}

// Row of pixel m of the tile, before a tap's offset; pixels past the tile read row 0 and are never stored.
__device__ inline int row_of_pixel(const Walk& w, int m) {
  const int area = w.tile_h * w.tile_w;
  if (m >= w.tile_n * area) return 0;
  return (m / area * w.patch_h + m % area / w.tile_w * w.row_h) * w.patch_w + m % w.tile_w * w.row_w;
}

// Offset in the output of pixel m of the tile (channel 0), or -1 where there is nothing to store.
__device__ inline long long offset_of_pixel(const Walk& w, const Tile& t, const Strides& s, int m,
                                            const int* offset) {
  const int area = w.tile_h * w.tile_w;
  const int n = t.n + m / area;
  const int h = (t.i + m % area / w.tile_w) * w.out_step_h + offset[0];
  const int v = (t.j + m % w.tile_w) * w.out_step_w + offset[1];
  if (m >= w.tile_n * area || n >= w.images || h >= w.out_h || v >= w.out_w) return -1;
  return n * s.n + h * s.h + v * s.w;
}

// What a block of an fprop or dgrad kernel works on: grid (tiles, groups * tiles_out, classes * splits).
struct Work {
  Tile tile;
  int group, out;  // first channel it writes, within the group
  int split;
  const int* offset;  // of the class
  const Step *step, *end;
};

__device__ inline Work work_of(const Layout& l, const int* tables) {
  Work b;
  b.tile = tile_of(l.walk, blockIdx.x);
  b.group = blockIdx.y / l.tiles_out;
  b.out = blockIdx.y % l.tiles_out * l.tile_out;
  b.split = blockIdx.z % l.splits;
  const int which = blockIdx.z / l.splits;
  b.offset = tables + l.classes + 2 * which;
  const int* item = tables + l.items + 2 * ((blockIdx.y * l.walk.classes + which) * l.splits + b.split);
  const Step* steps = reinterpret_cast<const Step*>(tables + l.steps);
  b.step = steps + item[0], b.end = steps + item[1];
  return b;
}

inline dim3 grid_of(const Layout& l) {
  return dim3(tiles(l.walk), l.groups * l.tiles_out, l.walk.classes * l.splits);
}

}  // namespace sk::cuda
