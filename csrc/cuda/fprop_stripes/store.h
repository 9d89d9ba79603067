// The epilogue of fprop_sm90.cu: from a bundle's sums in registers to y.
#pragma once
#include "cuda/epilogue.h"
#include "cuda/fprop_stripes/scatter.h"

namespace sk::cuda::fprop_stripes {

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
      values[i] = *reinterpret_cast<const uint4*>(products + place_of_piece(row, piece));
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
        if (offset[i] >= 0 && k < count) to[offset[i] + k] = value_of<T>(pairs, k);
    }
  }
  warp_barrier();  // the rows are free again
}

}  // namespace sk::cuda::fprop_stripes
