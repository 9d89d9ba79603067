// d[64 x N] (+)= a[64 x 16] b[16 x N] by one warpgroup, both operands in shared memory, rows of K (sm_90a).
//
// Asynchronous: d belongs to the tensor cores between wgmma_fence() and the wait for its group. Thread 32w + 4g + t
// of the warpgroup holds of d, for every j: d[4j + {0, 1}] = row 16w + g, columns 8j + 2t + {0, 1}, and
// d[4j + {2, 3}] = the same of row 16w + g + 8.
#pragma once
#include <utility>

#include "cuda/instructions.h"
#include "cuda/matrix_descriptor.h"

namespace sk::cuda {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most Pending of the committed groups are unfinished.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving what reads or writes these registers across this point. No loop: an array that one
// indexes lies in memory where the compiler unrolls it too late.
template <int... I>
__device__ __forceinline__ void wgmma_keep_each(float* d, std::integer_sequence<int, I...>) {
  (..., [](float& value) { asm volatile("" : "+f"(value)::"memory"); }(d[I]));
}
template <int Count>
__device__ __forceinline__ void wgmma_keep(float (&d)[Count]) {
  wgmma_keep_each(d, std::make_integer_sequence<int, Count>());
}

// accumulate = 0 overwrites d.
template <class T, int N>
__device__ inline void wgmma(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int accumulate);

// The same with a in registers, as mma() has it; it belongs to the tensor cores as long as d does. Columns: rows of b run
// along K (column_descriptor).
template <class T, int N, bool Columns>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const std::uint32_t (&a)[4],
                                                std::uint64_t b, int accumulate);

// clang-format off
#define SK_N0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SK_N1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define SK_N2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define SK_N3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define SK_N4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define SK_N5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define SK_N6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define SK_N7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define SK_N8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define SK_N9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define SK_N10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define SK_N11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define SK_N12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define SK_N13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define SK_N14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define SK_N15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define SK_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SK_D8(i) SK_D(i), SK_D(i + 4)
#define SK_D32(i) SK_D8(i), SK_D8(i + 8), SK_D8(i + 16), SK_D8(i + 24)
#define SK_WGMMA(T, NAME, N, LIST, A, B, P, ...)                                                        \
  template <>                                                                                             \
  __device__ inline void wgmma<T, N>(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, %" A ", %" B  \
                 ", p, 1, 1, 0, 0;\n}"                                                                     \
                 : __VA_ARGS__                                                                            \
                 : "l"(a), "l"(b), "r"(accumulate));                                                      \
  }
#define SK_WGMMA_BOTH(N, LIST, A, B, P, ...)                    \
  SK_WGMMA(bf16, "bf16", N, LIST, A, B, P, __VA_ARGS__)         \
  SK_WGMMA(f16, "f16", N, LIST, A, B, P, __VA_ARGS__)
SK_WGMMA_BOTH(8, "%0, %1, %2, %3", "4", "5", "6", SK_D(0))
SK_WGMMA_BOTH(16, SK_N0, "8", "9", "10", SK_D8(0))
SK_WGMMA_BOTH(32, SK_N0 ", " SK_N1, "16", "17", "18", SK_D8(0), SK_D8(8))
SK_WGMMA_BOTH(64, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3, "32", "33", "34", SK_D32(0))
SK_WGMMA_BOTH(96, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5, "48", "49", "50", SK_D32(0), SK_D8(32), SK_D8(40))
SK_WGMMA_BOTH(128, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5 ", " SK_N6 ", " SK_N7, "64", "65", "66", SK_D32(0), SK_D32(32))
SK_WGMMA_BOTH(192, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5 ", " SK_N6 ", " SK_N7 ", " SK_N8 ", " SK_N9 ", " SK_N10 ", " SK_N11, "96", "97", "98", SK_D32(0), SK_D32(32), SK_D32(64))
SK_WGMMA_BOTH(256, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5 ", " SK_N6 ", " SK_N7 ", " SK_N8 ", " SK_N9 ", " SK_N10 ", " SK_N11 ", " SK_N12 ", " SK_N13 ", " SK_N14 ", " SK_N15, "128", "129", "130", SK_D32(0), SK_D32(32), SK_D32(64), SK_D32(96))
#define SK_WGMMA_REGISTERS(T, NAME, COLUMNS, N, LIST, A0, A1, A2, A3, B, P, ...)                                   \
  template <>                                                                                             \
  __device__ __forceinline__ void wgmma_registers<T, N, COLUMNS>(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B  \
                 ", p, 1, 1, " #COLUMNS ";\n}"                                                                        \
                 : __VA_ARGS__                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                   \
  }
#define SK_WGMMA_REGISTERS_BOTH(...) SK_WGMMA_REGISTERS(bf16, "bf16", 1, __VA_ARGS__) SK_WGMMA_REGISTERS(f16, "f16", 1, __VA_ARGS__)
#define SK_WGMMA_REGISTERS_ROWS(...) SK_WGMMA_REGISTERS(bf16, "bf16", 0, __VA_ARGS__) SK_WGMMA_REGISTERS(f16, "f16", 0, __VA_ARGS__)
SK_WGMMA_REGISTERS_ROWS(32, SK_N0 ", " SK_N1, "16", "17", "18", "19", "20", "21", SK_D8(0), SK_D8(8))
SK_WGMMA_REGISTERS_ROWS(48, SK_N0 ", " SK_N1 ", " SK_N2, "24", "25", "26", "27", "28", "29", SK_D8(0), SK_D8(8), SK_D8(16))
SK_WGMMA_REGISTERS_ROWS(64, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3, "32", "33", "34", "35", "36", "37", SK_D32(0))
SK_WGMMA_REGISTERS_ROWS(128, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5 ", " SK_N6 ", " SK_N7, "64", "65", "66", "67", "68", "69", SK_D32(0), SK_D32(32))
SK_WGMMA_REGISTERS_BOTH(64, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3, "32", "33", "34", "35", "36", "37", SK_D32(0))
SK_WGMMA_REGISTERS_BOTH(128, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5 ", " SK_N6 ", " SK_N7, "64", "65", "66", "67", "68", "69", SK_D32(0), SK_D32(32))
SK_WGMMA_REGISTERS_BOTH(256, SK_N0 ", " SK_N1 ", " SK_N2 ", " SK_N3 ", " SK_N4 ", " SK_N5 ", " SK_N6 ", " SK_N7 ", " SK_N8 ", " SK_N9 ", " SK_N10 ", " SK_N11 ", " SK_N12 ", " SK_N13 ", " SK_N14 ", " SK_N15, "128", "129", "130", "131", "132", "133", SK_D32(0), SK_D32(32), SK_D32(64), SK_D32(96))
#undef SK_WGMMA_REGISTERS
#undef SK_WGMMA_REGISTERS_BOTH
#undef SK_WGMMA_REGISTERS_ROWS
#undef SK_N0
#undef SK_N1
#undef SK_N2
#undef SK_N3
#undef SK_N4
#undef SK_N5
#undef SK_N6
#undef SK_N7
#undef SK_N8
#undef SK_N9
#undef SK_N10
#undef SK_N11
#undef SK_N12
#undef SK_N13
#undef SK_N14
#undef SK_N15
#undef SK_D
#undef SK_D8
#undef SK_D32
#undef SK_WGMMA
#undef SK_WGMMA_BOTH
// clang-format on

}  // namespace sk::cuda
