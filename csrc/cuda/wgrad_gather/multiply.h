// A step of wgrad_sm90.cu: the piece of P that a thread gathers, and its products with 64 pixels of x.
#pragma once
#include "cuda/gathered.h"
#include "cuda/wgrad_gather/shared.h"

namespace sk::cuda::wgrad_gather {

// Of one of the two stripes that a thread gathers: its chunk of the patch and its filter's place in a row, once for each of
// a pair of pixels, and where the list of its tap begins for this thread.
struct Gatherer {
  std::uint32_t chunk, filter;
  int list;

  template <class S>
  static __device__ Gatherer of(const Stripe& stripe) {
    const std::uint32_t filter = stripe.at & (kRowBytes - 1), chunk = stripe.at - filter;
    return {chunk << 16 | chunk, filter << 16 | filter,
            stripe.tap * S::ListPitch + static_cast<int>(threadIdx.x) % 4 * 8};
  }
};

// The piece of P of 64 pixels: of stripes g and g + 8 of a warp's 16, what thread t of four holds of four products.
__device__ __forceinline__ void gather(const unsigned char* patch, const unsigned char* lists,
                                       const Gatherer& near, const Gatherer& far, Gathered& a) {
#pragma unroll
  for (int k = 0; k < kGathered / 16; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Gatherer& stripe = half ? far : near;
      const uint2 places = *reinterpret_cast<const uint2*>(lists + stripe.list + k * 32);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const std::uint32_t pair = ((eight ? places.y : places.x) + stripe.chunk) ^ stripe.filter;
        const std::uint32_t low = *reinterpret_cast<const std::uint16_t*>(patch + (pair & 0xffff));
        const std::uint32_t high = *reinterpret_cast<const std::uint16_t*>(patch + (pair >> 16));
        a[k][2 * eight + half] = low | high << 16;
      }
    }
}

// Starts the products of a step; a belongs to them until they are waited for.
template <class T, class S>
__device__ __forceinline__ void multiply(const unsigned char* x, int accumulate, Gathered& a,
                                         float (&acc)[S::N / 2]) {
  const std::uint64_t b = column_descriptor(shared_address(x), S::Pixels);
  // All of it is in registers before the fence: the assembler would gather on between the products.
#pragma unroll
  for (int k = 0; k < kGathered / 16; ++k)
#pragma unroll
    for (std::uint32_t& pair : a[k]) asm volatile("" : "+r"(pair)::"memory");
  multiply_gathered<T, S::N>(a, b, accumulate, acc);
}

}  // namespace sk::cuda::wgrad_gather
