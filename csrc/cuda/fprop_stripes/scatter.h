// The second product of fprop_sm90.cu: columns to their filters and their pixels.
#pragma once
#include "cuda/fprop_stripes/pixels.h"
#include "cuda/pairs.h"
#include "cuda/wgmma.h"

namespace sk::cuda::fprop_stripes {

// products[row][column] = acc, rounded to T: the rows of this warp.
template <class T, int Tiles, int N>
__device__ inline void put_products(const float (&acc)[Tiles][N / 2], unsigned char* products) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const int row = named_row<Tiles>(t);
#pragma unroll
    for (int c = 0; c < N / 16; ++c) {
      const int place = place_of_piece(row, c % 4 * 2 + threadIdx.x % 32 / 16);
      store_sums<T>(products + c / 4 * kPlaneBytes<Tiles> + place, acc[t] + 8 * c);
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
      load_matrices(a[t][c], products + c / 4 * kPlaneBytes<Tiles> + place_of_piece(row, c % 4 * 2 + half));
    }
}

// Starts y (+)= what was gathered, each column added to its filter.
template <class T, int Tiles, int N>
__device__ __forceinline__ void scatter(const std::uint32_t (&a)[Tiles][N / 16][4],
                                        const unsigned char* columns, int accumulate, float (&y)[Tiles][32]) {
  // Columns in 64s are the rows of a transposed matrix: wgmma reads it faster.
  constexpr bool kAlongColumns = N % kRowChannels != 0;
  const std::uint64_t b = kAlongColumns ? column_descriptor(shared_address(columns), N)
                                        : matrix_descriptor(shared_address(columns));
  wgmma_fence();
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int c = 0; c < N / 16; ++c) {
      constexpr int kPlane = kRowChannels * kRowBytes / 16,
                    kSixteen = 16 * kRowBytes / 16;  // in units of 16 bytes
      const int further = kAlongColumns ? c * kSixteen : c / 4 * kPlane + c % 4 * 2;
      wgmma_registers<T, 64, kAlongColumns>(y[t], a[t][c], b + further, accumulate + c);
    }
  wgmma_commit();
}

}  // namespace sk::cuda::fprop_stripes
