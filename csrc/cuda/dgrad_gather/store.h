// From a tile's sums in registers to dx.
#pragma once
#include <utility>

#include "cuda/dgrad_gather/shared.h"
#include "cuda/pairs.h"

namespace sk::cuda::dgrad_gather {

// 16 columns of a warp's 16 pixels at a time to shared memory (no loop: wgmma_keep() says why).
template <class T, int... J>
__device__ __forceinline__ void put_rows(const float* acc, unsigned char* row,
                                         std::integer_sequence<int, J...>) {
  (..., store_sums<T>(row + 32 * J, acc + 8 * J));
}

// dx of a warp's 16 pixels, by way of the patch, in whole rows.
template <class T, int N>
__device__ __forceinline__ void store(const Layout& l, const Call& call, const Shared& s,
                                      const float (&acc)[N / 2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* rows = s.patch + warp * 16 * kStagePitch<N>;
  put_rows<T>(acc, rows + lane % 16 * kStagePitch<N> + lane / 16 * 16,
              std::make_integer_sequence<int, N / 16>());
  warp_barrier();
  constexpr int kPieces = N / 8;  // of a pixel, 16 bytes each
  const int channel = s.header->channel, end = (channel / l.group_out + 1) * l.group_out;
  T* dx = static_cast<T*>(call.out) + channel;
#pragma unroll 4
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int pixel = i / kPieces, c = i % kPieces * 8;
    const long long offset = s.pixels[warp * 16 + pixel].offset;
    const uint4 piece = *reinterpret_cast<const uint4*>(rows + pixel * kStagePitch<N> + c * 2);
    if (offset >= 0 && channel + c < end) *reinterpret_cast<uint4*>(dx + offset + c) = piece;
  }
}

}  // namespace sk::cuda::dgrad_gather
