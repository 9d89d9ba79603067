// Products whose left operand a thread gathers itself, as dgrad_sm90.cu and wgrad_sm90.cu do.
#pragma once
#include "cuda/swizzle.h"
#include "cuda/wgmma.h"

namespace sk::cuda {

constexpr int kGathered = 64;  // values of K: four products' worth

using Gathered = std::uint32_t[kGathered / 16][4];

// Starts acc (+)= a b. b: rows along K (column_descriptor); a belongs to the products until they are waited for.
template <class T, int N>
__device__ __forceinline__ void multiply_gathered(const Gathered& a, std::uint64_t b, int accumulate,
                                                  float (&acc)[N / 2]) {
  constexpr int kNext = 16 * kRowBytes / 16;  // 16 rows further in units of 16 bytes
  wgmma_fence();
  wgmma_registers<T, N, true>(acc, a[0], b, accumulate);
  wgmma_registers<T, N, true>(acc, a[1], b + kNext, 1);
  wgmma_registers<T, N, true>(acc, a[2], b + 2 * kNext, 1);
  wgmma_registers<T, N, true>(acc, a[3], b + 3 * kNext, 1);
  wgmma_commit();
}

}  // namespace sk::cuda
