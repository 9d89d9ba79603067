// The instructions that are not C++, one function each. tests/cuda/emulate has a header of the same name that
// does the same on a CPU; nothing else in this folder knows the difference.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sk::cuda {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Round to nearest even, as torch does.
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void narrow(float x, f16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

__device__ inline std::uint32_t to_tf32(std::uint32_t x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

__device__ inline float exponential(float x) { return expf(x); }

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void barrier() { __syncthreads(); }

// What all lanes of a warp have in common: the compiler computes with it once a warp.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Brings the line of an address in global memory to the second-level cache.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// threadIdx.x, read anew: what follows from it is computed where it is needed and keeps no register until then.
__device__ inline int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Copies Bytes (4 or 16) from global to shared memory; zeros arrive instead where `valid` is false, and
// nothing is read.
template <int Bytes>
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(size));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(size));
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;"); }

__device__ inline void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8x8 matrices of 16-bit values: lane l names row l % 8 of matrix l / 8 and receives, of matrix i,
// in r[i] the two values (row l / 4, columns 2 * (l % 4) and the next).
__device__ inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// The same of the transposed matrices: r[i] holds (rows 2 * (l % 4) and the next, column l / 4).
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// The opposite: stores r[i] to row 2 * (l % 4) and the next of matrix i, at l / 4 of each (sm_90).
__device__ inline void store_matrices_transposed(void* row, const std::uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// The same of load_matrices(): r[i] goes to row l / 4 of matrix i, at 2 * (l % 4) and the next.
__device__ inline void store_matrices(void* row, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Two values of 16 bits, rounded to nearest even, the first in the low half.
template <class T>
__device__ inline std::uint32_t pack(float first, float second);
template <>
__device__ inline std::uint32_t pack<bf16>(float first, float second) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <>
__device__ inline std::uint32_t pack<f16>(float first, float second) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// c[16x8] += a[16xk] b[kx8]: 32 bytes of k, that is k = 16 (bf16, f16) or 8 (float as tf32).
// Lane l = 4g + t holds a rows g, g + 8 and b column g; of k the t-th word of either half; of c columns 2t,
// 2t + 1.
#define SK_MMA(TYPES)                                                                                       \
  asm volatile("mma.sync.aligned." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ inline void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
template <>
__device__ inline void mma<bf16>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  SK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ inline void mma<f16>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  SK_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
__device__ inline void mma<float>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  SK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef SK_MMA

}  // namespace sk::cuda
