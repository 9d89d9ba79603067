// The shift-add epilogue of fprop_sm90.cu, by itself so that bench/gpu_check/probes.cu times the very same code.
#pragma once
#include "cuda/fprop_sm90.h"

namespace sk::cuda {

// sums[place - tap's offset][filter] += acc, a round of columns at a time. shifts[column] = offset * pitch - filter.
// The loads of a step come before its stores: the compiler cannot know that all its places differ.
template <int Tiles, int N>
__device__ inline void merge(const Layout& l, const float (&acc)[Tiles][N / 2], const int* shifts, int rounds,
                             float* sums, int group) {
  const int thread = threadIdx.x % kWarpgroup, t = thread % 4;
  const int row = thread / 32 * 16 + thread % 32 / 4, end = places_of(l.walk) * l.pitch,
            nowhere = end + thread;
#pragma unroll
  for (int r = 0; r < N / kRound; ++r) {
    if (r >= rounds) break;
    int2 shift[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      shift[j] = *reinterpret_cast<const int2*>(shifts + r * kRound + 8 * j + 2 * t);
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      int at[16];
      float sum[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int to = (row + 64 * m + 8 * (i / 2 % 2)) * l.pitch - (i % 2 ? shift[i / 4].y : shift[i / 4].x);
        at[i] = static_cast<unsigned>(to) < static_cast<unsigned>(end) ? to : nowhere;
        sum[i] = sums[at[i]] + acc[m][16 * r + i];
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[at[i]] = sum[i];
    }
    warpgroup_barrier(group);
  }
}

}  // namespace sk::cuda
