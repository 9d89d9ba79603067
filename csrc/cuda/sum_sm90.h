// The epilogue of fprop_sm90.cu: products of pixels and stripes to pixels of y.
#pragma once
#include "cuda/fprop_sm90.h"

namespace sk::cuda {

// products[column][row] = acc, rounded to T.
template <class T, int Tiles, int N>
__device__ inline void put_products(const float (&acc)[Tiles][N / 2], T* products) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  // This lane names the eight rows that begin at `row` of column `column`, of every pair of eight columns.
  const int column = lane / 16 * 8 + lane % 8, row = warp * 16 + lane / 8 % 2 * 8;
  T* to = products + column * kProductPitch<Tiles> + row;
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      const float* a = acc[t] + 8 * j;
      const std::uint32_t pairs[4] = {pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(a[4], a[5]),
                                      pack<T>(a[6], a[7])};
      store_matrices_transposed(to + 16 * j * kProductPitch<Tiles> + 64 * t, pairs);
    }
}

// Where a thread's pixels lie in the tile: it lists the offsets of `Count` places of the patch's grid in y, channel 0, or
// -1 where there is no output pixel. Divides once, not for every tile.
template <int Tiles>
struct Places {
  static constexpr int kCount = (Tiles + 1) / 2;
  int n[kCount], i[kCount], j[kCount];

  __device__ explicit Places(const Walk& w) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int m = threadIdx.x % kWarpgroup + c * kWarpgroup;
      n[c] = m / (w.patch_h * w.patch_w), i[c] = m / w.patch_w % w.patch_h, j[c] = m % w.patch_w;
      if (n[c] >= w.tile_n || i[c] >= w.tile_h || j[c] >= w.tile_w) n[c] = w.images;
    }
  }

  __device__ void list(const Walk& w, const Tile& tile, const Strides& s, long long* offsets) const {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int m = threadIdx.x % kWarpgroup + c * kWarpgroup;
      const bool exists = n[c] < w.images - tile.n && i[c] < w.out_h - tile.i && j[c] < w.out_w - tile.j;
      if (m < Tiles * 64)
        offsets[m] = exists ? (tile.n + n[c]) * s.n + (tile.i + i[c]) * s.h + (tile.j + j[c]) * s.w : -1;
    }
  }
};

// Zeros for what no product is written to: the rows of x behind the patch, and what lies between columns.
template <int Tiles>
__device__ inline void clear(const Layout& l, unsigned char* x, unsigned char* products) {
  const int behind = patch_rows(l.walk) * kRowBytes, rows = Tiles * 64 * kRowBytes;
  for (int c = 0; c < chunks_of(l); ++c)
    for (int i = behind + threadIdx.x * 16; i < rows; i += kThreads * 16)
      *reinterpret_cast<uint4*>(x + c * rows + i) = {0, 0, 0, 0};
  for (int i = threadIdx.x * 16; i < 2 * product_bytes<Tiles>(l); i += kThreads * 16)
    *reinterpret_cast<uint4*>(products + i) = {0, 0, 0, 0};
}

// All loads before the first store: the compiler cannot know that they do not meet.
__device__ inline void load_table(const Layout& l, const Call& call, const Block& b, BundleTable& table) {
  const int thread = threadIdx.x % kWarpgroup;
  const int* lists = call.tables + l.lists;
  const auto* places = reinterpret_cast<const Place*>(lists) + b.places;
  int start[2] = {};
  Place place = {};
  float scale = 1.f, shift = 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (thread + i * kWarpgroup <= b.count) start[i] = lists[b.starts + thread + i * kWarpgroup];
  if (thread < b.stripes) place = places[thread];
  if (thread < b.count)
    scale = scale_of(call.finish, b.channel + thread), shift = shift_of(call.finish, b.channel + thread);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (thread + i * kWarpgroup < kMostFilters + 2)
      table.starts[thread + i * kWarpgroup] = start[i] - b.places;
  table.scale[thread] = scale, table.shift[thread] = shift;
  if (thread < b.stripes) table.places[thread] = place;
  for (int i = thread + kWarpgroup; i < b.stripes; i += kWarpgroup) table.places[i] = places[i];
}

// stage[pixel][filter - first] = finished sums of the bundle's filters [first, first + 16). A warp has four filters, a
// lane every 32nd pixel: neighbours in the products. Adds stripe by stripe, so that bits repeat.
template <class T, int Tiles, bool Checked>
__device__ inline void sum_filters(const Layout& l, const Call& call, const Block& b, const Shared& s,
                                   int first) {
  constexpr int kPixels = 2 * Tiles, kOwn = kFilters / 4;
  const int lane = threadIdx.x % 32, rows = patch_rows(l.walk);
  const BundleTable& table = *s.table;
  const T* products = reinterpret_cast<const T*>(s.products) + lane;
  const int mine = threadIdx.x % kWarpgroup / 32 * kOwn, f0 = first + mine;
  int starts[kOwn + 1];
#pragma unroll
  for (int f = 0; f <= kOwn; ++f) starts[f] = table.starts[min(max(f0 + f, 0), b.count)];
  float sum[kOwn][kPixels] = {};
  Place place = table.places[starts[0]];
#pragma unroll
  for (int f = 0; f < kOwn; ++f) {
#pragma unroll 1
    for (int i = starts[f]; i < starts[f + 1]; ++i) {
      const T* column = products + place.column;
      const int row = lane + place.away;
      place = table.places[i + 1];
#pragma unroll
      for (int p = 0; p < kPixels; ++p)
        if (!Checked || static_cast<unsigned>(row + 32 * p) < static_cast<unsigned>(rows))
          sum[f][p] += widen(column[32 * p]);
    }
  }
  const T* residual = static_cast<const T*>(call.finish.residual);
  if (residual) residual += b.channel + f0;
#pragma unroll
  for (int f = 0; f < kOwn; ++f) {
    const int k = min(max(f0 + f, 0), kMostFilters - 1);
    const float scale = table.scale[k], shift = table.shift[k];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) sum[f][p] = sum[f][p] * scale + shift;
    if (residual && f0 + f >= 0 && f0 + f < b.count) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const long long offset = s.offsets[lane + 32 * p];
        if (offset >= 0) sum[f][p] += widen(residual[offset + f]);
      }
    }
  }
  activate(sum, call.finish.activation);
  T* stage = reinterpret_cast<T*>(s.stage) + lane * kStagePitch + mine;
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
#pragma unroll
    for (int f = 0; f < kOwn; f += 2)
      *reinterpret_cast<unsigned*>(stage + 32 * p * kStagePitch + f) = pack<T>(sum[f][p], sum[f + 1][p]);
}

// y = the stage. Two threads store the 32 bytes of a pixel. aligned: eight filters of every pixel begin at a multiple of
// 16 bytes where their number does at one of eight.
template <class T, int Tiles>
__device__ inline void store_filters(const Call& call, const Block& b, const Shared& s, int first,
                                     bool aligned) {
  const int from = first + threadIdx.x % 2 * 8, begin = max(0, -from), end = min(8, b.count - from);
  if (begin >= end) return;
  constexpr int kStep = kWarpgroup / 2;
  const int m = threadIdx.x % kWarpgroup / 2;
  T* y = static_cast<T*>(call.out) + b.channel + from;
  const T* stage = reinterpret_cast<const T*>(s.stage) + m * kStagePitch + threadIdx.x % 2 * 8;
  if (aligned && begin % 4 == 0 && end % 4 == 0) {
    const bool low = begin == 0, high = end == 8;
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      const long long offset = s.offsets[m + i * kStep];
      const auto* words = reinterpret_cast<const unsigned*>(stage + i * kStep * kStagePitch);
      if (offset < 0) continue;
      if (low && high)
        *reinterpret_cast<uint4*>(y + offset) = {words[0], words[1], words[2], words[3]};
      else if (low)
        *reinterpret_cast<uint2*>(y + offset) = {words[0], words[1]};
      else
        *reinterpret_cast<uint2*>(y + offset + 4) = {words[2], words[3]};
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < Tiles; ++i) {
    const long long offset = s.offsets[m + i * kStep];
    if (offset < 0) continue;
#pragma unroll
    for (int f = 0; f < 8; ++f)
      if (f >= begin && f < end) y[offset + f] = stage[i * kStep * kStagePitch + f];
  }
}

}  // namespace sk::cuda
