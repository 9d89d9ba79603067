// Values of 16 bits two by two, the first in the low half, as the tensor cores take them; and eight of them, 16 bytes, as
// they move to and from global memory.
#pragma once
#include "cuda/instructions.h"
#include "cuda/params.h"

namespace sk::cuda {

// A pair of values that lie apart.
__device__ __forceinline__ std::uint32_t load_pair(const unsigned char* first, const unsigned char* second) {
  const std::uint32_t low = *reinterpret_cast<const std::uint16_t*>(first);
  const std::uint32_t high = *reinterpret_cast<const std::uint16_t*>(second);
  return low | high << 16;
}

// Value i of eight.
template <class T>
__device__ __forceinline__ T value_of(const std::uint32_t (&pairs)[4], int i) {
  return T{static_cast<std::uint16_t>(pairs[i / 2] >> 16 * (i % 2))};
}

// The first `count` of eight values, one by one.
template <class T>
__device__ __forceinline__ void store_values(T* to, const std::uint32_t (&pairs)[4], int count) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = value_of<T>(pairs, i);
}

// 16 columns of sums of a warp's 16 rows (wgmma.h: d[0] to d[7] of a thread), rounded, to shared memory. to: of the row and
// the half of the columns that this lane names (store_matrices).
template <class T>
__device__ __forceinline__ void store_sums(unsigned char* to, const float* d) {
  const std::uint32_t pairs[4] = {pack<T>(d[0], d[1]), pack<T>(d[2], d[3]), pack<T>(d[4], d[5]),
                                  pack<T>(d[6], d[7])};
  store_matrices(to, pairs);
}

// Whether eight channels of every pixel of y begin at a multiple of 16 bytes.
__device__ inline bool moves_eights(const Layout& l, const Call& call) {
  const Strides& s = call.out_strides;
  return reinterpret_cast<std::uintptr_t>(call.out) % 16 == 0 && (s.n | s.h | s.w | l.group_out) % 8 == 0;
}

}  // namespace sk::cuda
