// The epilogue of fprop_whole_sm90.cu: from a block's sums in registers to y.
#pragma once
#include <utility>

#include "cuda/epilogue.h"
#include "cuda/fprop_whole/shared.h"
#include "cuda/pairs.h"

namespace sk::cuda::fprop_whole {

// Where position `at` of the patch lies in y; negative where it does not.
__device__ inline long long offset_of(const Walk& w, const Strides& o, const PositionTile& tile, int at,
                                      float reciprocal) {
  const int down = static_cast<int>((at + 0.5f) * reciprocal), across = at - down * w.patch_w;
  const bool exists = at < tile.shift + tile.count && across < w.tile_w && tile.column + across < w.out_w;
  return exists ? tile.n * o.n + (tile.row + down) * o.h + (tile.column + across) * o.w : -1;
}

// 64 filters of a warp's 16 positions to shared memory; 16-byte piece p of row r lies at place p ^ (r % 8). No loop:
// wgmma_keep() says why.
template <class T, int... J>
__device__ __forceinline__ void put_rows(const float* y, unsigned char* row, int place,
                                         std::integer_sequence<int, J...>) {
  (..., store_sums<T>(row + (place ^ J * 32), y + 8 * J));
}

// aligned: two values are one word; all are on their way before the first is added. What does not exist, and is not stored,
// gets those of what does.
template <class T, int N>
__device__ __forceinline__ void add_residual(const Layout& l, const Call& call, const PositionTile& tile,
                                             int channel, int count, int first, bool aligned,
                                             float (&y)[N / 2]) {
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const float reciprocal = 1.f / static_cast<float>(l.walk.patch_w);
  const T* residual[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const long long offset =
        offset_of(l.walk, call.out_strides, tile, first + lane / 4 + 8 * half, reciprocal);
    residual[half] = static_cast<const T*>(call.finish.residual) + (offset < 0 ? 0 : offset) + channel;
  }
  if (aligned) {
    std::uint32_t two[N / 8][2];
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        two[j][half] =
            *reinterpret_cast<const std::uint32_t*>(residual[half] + pair + (8 * j < count ? 8 * j : 0));
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        y[4 * j + 2 * half] += widen(T{static_cast<std::uint16_t>(two[j][half])});
        y[4 * j + 2 * half + 1] += widen(T{static_cast<std::uint16_t>(two[j][half] >> 16)});
      }
  } else {
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          y[4 * j + 2 * half + k] += widen(residual[half][min(8 * j + pair + k, count - 1)]);
  }
}

// y of a block: finished where it is, then in whole rows by way of shared memory. first: of the patch, the warp's.
template <class T, int N>
__device__ __forceinline__ void store(const Layout& l, const Call& call, const Shared& s,
                                      const PositionTile& tile, int channel, int count, int first,
                                      bool aligned, float (&y)[1][N / 2]) {
  const Finish& f = call.finish;
  const Strides& strides = call.out_strides;
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const float reciprocal = 1.f / static_cast<float>(l.walk.patch_w);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(s.scale + 8 * j + pair);
    const float2 shift = *reinterpret_cast<const float2*>(s.shift + 8 * j + pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* d = y[0] + 4 * j + 2 * half;
      d[0] = d[0] * scale.x + shift.x, d[1] = d[1] * scale.y + shift.y;
    }
  }
  if (f.residual) add_residual<T, N>(l, call, tile, channel, count, first, aligned, y[0]);
  activate(y, f.activation);
  unsigned char* sums = s.sums + threadIdx.x / 32 * kSumsBytes;
  const int row = lane % 16, piece = lane % 8;
#pragma unroll
  for (int part = 0; part < N / 64; ++part) {
    put_rows<T>(y[0] + 32 * part, sums + row * kRowBytes, (lane / 16 ^ row & 7) << 4,
                std::make_integer_sequence<int, 4>());
    warp_barrier();
    const int mine = min(8, count - part * 64 - piece * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 4 * i + lane / 8;
      const long long offset = offset_of(l.walk, strides, tile, first + from, reciprocal);
      const uint4 values =
          *reinterpret_cast<const uint4*>(sums + from * kRowBytes + place_in_row(from, piece));
      if (offset < 0 || mine <= 0) continue;
      T* to = static_cast<T*>(call.out) + offset + channel + part * 64 + piece * 8;
      if (aligned) {
        *reinterpret_cast<uint4*>(to) = values;
      } else {
        const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
        store_values(to, pairs, mine);
      }
    }
    warp_barrier();
  }
}

}  // namespace sk::cuda::fprop_whole
