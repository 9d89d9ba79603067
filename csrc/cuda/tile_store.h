// From a tile of sums in shared memory, sums[pixel][column], to the output, channels last: a channel is the
// sum of up to four columns. Lanes follow channels, two each.
#pragma once
#include "cuda/epilogue.h"
#include "cuda/walk.h"

namespace sk::cuda {

constexpr int kMaxParts = 4;

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// The two channels a thread stores: their columns and what the epilogue needs of them.
struct Channels {
  int first, count;  // within the tile; 0, 1 or 2 of them exist
  int column[2][kMaxParts];
  float scale[2], shift[2];
};

// columns: [parts, then kMaxParts a channel], or null where channel and column are the same.
__device__ inline Channels channels_of(const Finish& f, int first, int count, int channel,
                                       const int* columns) {
  Channels c;
  c.first = first, c.count = max(0, min(2, count - first));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool exists = i < c.count;
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part)
      c.column[i][part] = exists && columns ? columns[4 + (first + i) * kMaxParts + part] : first + i;
    c.scale[i] = exists ? scale_of(f, channel + first + i) : 0.f;
    c.shift[i] = exists ? shift_of(f, channel + first + i) : 0.f;
  }
  return c;
}

template <class T>
__device__ inline void store_pair(const Call& call, int split, const Channels& c, long long offset,
                                  const float (&sum)[2]) {
  const bool whole = c.count == 2 && call.out_strides.w % 2 == 0 && offset % 2 == 0;
  if (call.partial) {
    float* to = call.partial + split * call.out_count + offset;
    if (whole && call.out_count % 2 == 0)
      *reinterpret_cast<Pair<float>*>(to) = {sum[0], sum[1]};
    else
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (i < c.count) to[i] = sum[i];
    return;
  }
  T* to = static_cast<T*>(call.out) + offset;
  if (!whole) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i < c.count) to[i] = finish<T>(call.finish, sum[i], c.scale[i], c.shift[i], offset + i);
    return;
  }
  Pair<T> residual = {}, y;
  if (call.finish.residual)
    residual = *reinterpret_cast<const Pair<T>*>(static_cast<const T*>(call.finish.residual) + offset);
  narrow(activate(sum[0] * c.scale[0] + c.shift[0] + widen(residual.first), call.finish.activation), y.first);
  narrow(activate(sum[1] * c.scale[1] + c.shift[1] + widen(residual.second), call.finish.activation),
         y.second);
  *reinterpret_cast<Pair<T>*>(to) = y;
}

// Stores channels [channel, channel + count) of the tile's pixels; offsets[m] is where pixel m begins, or
// negative.
template <class T, int Threads>
__device__ inline void store_tile(const Call& call, int split, const float* sums, int pitch, int pixels,
                                  const long long* offsets, int channel, int count, const int* columns) {
  const int pairs = (count + 1) / 2, parts = columns ? columns[0] : 1;
  int lanes = 1;
  while (lanes < pairs && lanes < Threads) lanes *= 2;
  for (int pair = threadIdx.x % lanes; pair < pairs; pair += lanes) {
    const Channels c = channels_of(call.finish, 2 * pair, count, channel, columns);
    for (int m = threadIdx.x / lanes; m < pixels; m += Threads / lanes) {
      if (offsets[m] < 0) continue;
      const float* row = sums + m * pitch;
      float sum[2] = {row[c.column[0][0]], row[c.column[1][0]]};
#pragma unroll
      for (int part = 1; part < kMaxParts; ++part)
        if (part < parts) sum[0] += row[c.column[0][part]], sum[1] += row[c.column[1][part]];
      store_pair<T>(call, split, c, offsets[m] + channel + c.first, sum);
    }
  }
}

}  // namespace sk::cuda
