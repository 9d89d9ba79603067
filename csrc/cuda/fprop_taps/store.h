// The epilogue of fprop_taps_sm90.cu: from a warp's sums in registers, eight pixels and 64 filters at a time, to y.
#pragma once
#include <utility>

#include "cuda/epilogue.h"
#include "cuda/fprop_taps/shared.h"
#include "cuda/pairs.h"

namespace sk::cuda::fprop_taps {

// Where 16-byte piece p of eight rows of 64 sums lies: four rows in different banks.
__device__ inline int place_of(int row, int piece) { return row * 256 + ((piece ^ (row & 3) << 1) << 4); }

// Eight rows of a warp's 16 to shared memory: row g, columns 8 j + 2 q and the next from lane 4 g + q.
__device__ __forceinline__ void put_sums(const float* y, unsigned char* sums) {
  const int lane = fresh_thread() % 32, row = lane / 4, q = lane % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    *reinterpret_cast<float2*>(sums + place_of(row, 2 * j + q / 2) + q % 2 * 8) = {y[4 * j], y[4 * j + 1]};
}

// y = activation(sum * scale + shift + residual) of 64 filters of eight pixels, from what put_sums left: eight filters of a
// pixel a lane, twice. aligned: eight filters of every pixel begin at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void finish_sums(const Call& call, int channel, int count,
                                            const long long* offsets, bool aligned,
                                            const unsigned char* sums) {
  const Finish& f = call.finish;
  const int lane = fresh_thread() % 32, first = lane % 8 * 8, mine = min(8, count - first);
  if (mine <= 0) return;
  channel += first;
  const bool whole = aligned && mine == 8;
#pragma unroll 1
  for (int row = lane / 8; row < 8; row += 4) {
    const long long offset = offsets[row];
    if (offset < 0) continue;
    float y[1][8];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float4*>(y[0] + 4 * half) =
          *reinterpret_cast<const float4*>(sums + place_of(row, lane % 8 * 2 + half));
    const auto each = [&](const auto& change) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < mine) change(k, y[0][k]);
    };
    if (f.scale) each([scale = f.scale + channel](int k, float& value) { value *= scale[k]; });
    if (f.shift) each([shift = f.shift + channel](int k, float& value) { value += shift[k]; });
    if (f.residual) {
      const T* residual = static_cast<const T*>(f.residual) + offset + channel;
      if (whole) {
        const uint4 values = *reinterpret_cast<const uint4*>(residual);
        const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) y[0][k] += widen(value_of<T>(pairs, k));
      } else {
        each([&](int k, float& value) { value += widen(residual[k]); });
      }
    }
    activate(y, f.activation);
    const std::uint32_t pairs[4] = {pack<T>(y[0][0], y[0][1]), pack<T>(y[0][2], y[0][3]),
                                    pack<T>(y[0][4], y[0][5]), pack<T>(y[0][6], y[0][7])};
    T* to = static_cast<T*>(call.out) + offset + channel;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    } else {
      store_values(to, pairs, mine);
    }
  }
}

// What is in registers is put away in turns; all else is the same code, which is fetched once. The header is a copy: behind
// the last barrier of the warp the next tile's may take its place.
template <class T, class S, int... B>
__device__ __forceinline__ void store(const Call& call, Header header, const long long* offsets, bool aligned,
                                      unsigned char* sums, const float (&y)[S::Bundles][S::Serve / 2],
                                      std::integer_sequence<int, B...>) {
#pragma unroll 1
  for (int b = 0; b < 2 * S::Filters / 64; ++b) {
    if (b / 2 * 64 >= header.count) break;
    (...,
     (b == B ? put_sums(&y[B / 2 * 64 / S::Serve][B / 2 * 64 % S::Serve / 2 + B % 2 * 2], sums) : void()));
    warp_barrier();
    finish_sums<T>(call, header.channel + b / 2 * 64, header.count - b / 2 * 64, offsets + b % 2 * 8, aligned,
                   sums);
    warp_barrier();
  }
}

}  // namespace sk::cuda::fprop_taps
