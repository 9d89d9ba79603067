// A step of dgrad_sm90.cu: the piece of P that a thread gathers, and its products with 64 stripes' weights.
#pragma once
#include "cuda/dgrad_gather/shared.h"
#include "cuda/gathered.h"
#include "cuda/pairs.h"

namespace sk::cuda::dgrad_gather {

// Of the two pixels a thread gathers for.
struct Gatherer {
  int base[2], zeros;
  unsigned met[2];
};

// The piece of P of one step: of pixels g and g + 8 of a warp's 16, what thread t of four holds of four products.
__device__ inline void gather(const Shared& s, const Gatherer& pixels, const StripeStep& step, Gathered& a) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int4 at = step.at[k][threadIdx.x % 4];
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const Tap tap = step.taps[2 * k + eight];
      const int first = eight ? at.z : at.x, second = eight ? at.w : at.y;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = pixels.met[half] & tap.bit ? pixels.base[half] + tap.offset : pixels.zeros;
        const int swizzle = row >> 3 & 0x70;
        a[k][2 * eight + half] =
            load_pair(s.patch + ((row + first) ^ swizzle), s.patch + ((row + second) ^ swizzle));
      }
    }
  }
}

// Starts the products of a step; a belongs to them until they are waited for.
template <class T, int N>
__device__ __forceinline__ void multiply(const unsigned char* weights, int accumulate, const Gathered& a,
                                         float (&acc)[N / 2]) {
  multiply_gathered<T, N>(a, column_descriptor(shared_address(weights), kStripes), accumulate, acc);
}

}  // namespace sk::cuda::dgrad_gather
