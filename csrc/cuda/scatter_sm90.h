// The second product of fprop_sm90.cu, and its epilogue: from products of pixels and stripes to pixels of y.
#pragma once
#include "cuda/fprop_sm90.h"
#include "cuda/wgmma.h"

namespace sk::cuda {

// Where row r's 16-byte piece lies in a plane of products: eight rows in a row begin in different banks.
__device__ inline int place_in_plane(int r, int piece) { return r * kRowBytes + ((piece ^ (r & 7)) << 4); }

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

// products[row][column] = acc, rounded to T: the rows of this warp.
template <class T, int Tiles, int N>
__device__ inline void put_products(const float (&acc)[Tiles][N / 2], unsigned char* products) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const int row = named_row<Tiles>(t);
#pragma unroll
    for (int c = 0; c < N / 16; ++c) {
      const float* a = acc[t] + 8 * c;
      const std::uint32_t pairs[4] = {pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(a[4], a[5]),
                                      pack<T>(a[6], a[7])};
      store_matrices(
          products + c / 4 * kPlaneBytes<Tiles> + place_in_plane(row, c % 4 * 2 + threadIdx.x % 32 / 16),
          pairs);
    }
  }
}

// The products of a block, each from where a pixel's tap reads it: what wgmma takes from a thread's registers.
template <int Tiles, int N>
__device__ __forceinline__ void gather(const unsigned char* products, const Pixels<Tiles>& pixels,
                                       const Record<N>& record, std::uint32_t (&a)[Tiles][N / 16][4]) {
  const int half = threadIdx.x % 32 / 16;
  Octet octet[N / 16];
#pragma unroll
  for (int c = 0; c < N / 16; ++c) octet[c] = record.octets[2 * c + half];
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int c = 0; c < N / 16; ++c) {
      const int row = pixels.met[t] & octet[c].bit ? pixels.base[t] + octet[c].row : kRows<Tiles>;
      load_matrices(a[t][c], products + c / 4 * kPlaneBytes<Tiles> + place_in_plane(row, c % 4 * 2 + half));
    }
}

// Starts y (+)= what was gathered, each column added to its filter.
template <class T, int Tiles, int N>
__device__ __forceinline__ void scatter(const std::uint32_t (&a)[Tiles][N / 16][4],
                                        const unsigned char* columns, int accumulate, float (&y)[Tiles][32]) {
  // Columns in 64s are the rows of a transposed matrix: wgmma reads it faster.
  constexpr bool kAlongColumns = N % kChunk != 0;
  const std::uint64_t b = kAlongColumns ? column_descriptor(shared_address(columns), N)
                                        : matrix_descriptor(shared_address(columns));
  wgmma_fence();
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int c = 0; c < N / 16; ++c) {
      constexpr int kPlane = kChunk * kRowBytes / 16, kSixteen = 16 * kRowBytes / 16;  // in units of 16 bytes
      const int further = kAlongColumns ? c * kSixteen : c / 4 * kPlane + c % 4 * 2;
      wgmma_registers<T, 64, kAlongColumns>(y[t], a[t][c], b + further, accumulate + c);
    }
  wgmma_commit();
}

// y = activation(y * scale + shift + residual): of the rows g and g + 8 of a warp's 16 and columns 8 j + 2 q, 8 j + 2 q + 1
// in lane 4 g + q.
template <class T, int Tiles>
__device__ inline void finish_sums(const Finish& f, const Block& b, const long long* offsets,
                                   float (&y)[Tiles][32]) {
  const int lane = threadIdx.x % 32, first = lane % 4 * 2;
  const auto each = [&](const auto& change) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * j + first + e < b.count) change(8 * j + first + e, 4 * j + e);
  };
  if (f.scale)
    each([&](int k, int at) {
      const float scale = f.scale[b.channel + k];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) y[t][at] *= scale, y[t][at + 2] *= scale;
    });
  if (f.shift)
    each([&](int k, int at) {
      const float shift = f.shift[b.channel + k];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) y[t][at] += shift, y[t][at + 2] += shift;
    });
  if (f.residual) {
    const T* residual = static_cast<const T*>(f.residual) + b.channel;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const int row = named_row<Tiles>(t) - lane % 16 + lane / 4;
      const long long near = offsets[row], far = offsets[row + 8];
      each([&](int k, int at) {
        if (near >= 0) y[t][at] += widen(residual[near + k]);
        if (far >= 0) y[t][at + 2] += widen(residual[far + k]);
      });
    }
  }
  activate(y, f.activation);
}

// Stores a bundle's filters of the pixels of this warp, by way of its own rows of the products. aligned: eight filters of
// every pixel begin at a multiple of 16 bytes.
template <class T, int Tiles>
__device__ inline void store(const Call& call, const Block& b, const long long* offsets, bool aligned,
                             unsigned char* products, const float (&y)[Tiles][32]) {
  put_products<T, Tiles, 64>(y, products);
  warp_barrier();
  const int lane = threadIdx.x % 32, piece = lane % 8, count = min(8, b.count - piece * 8);
  T* to = static_cast<T*>(call.out) + b.channel + piece * 8;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    long long offset[4];
    uint4 values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = named_row<Tiles>(t) - lane % 16 + i * 4 + lane / 8;
      offset[i] = offsets[row];
      values[i] = *reinterpret_cast<const uint4*>(products + place_in_plane(row, piece));
    }
    if (aligned) {
      if (count == 8)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (offset[i] >= 0) *reinterpret_cast<uint4*>(to + offset[i]) = values[i];
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t pairs[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (offset[i] >= 0 && k < count)
          to[offset[i] + k] = T{static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2))};
    }
  }
  warp_barrier();  // the rows are free again
}

}  // namespace sk::cuda
