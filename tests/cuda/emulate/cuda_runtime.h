// Enough of CUDA to run a kernel on a CPU, for tests: every thread of a block is a fiber, blocks run one
// after another.
//
// A fiber runs until it waits: at a barrier for its block, in a warp instruction for its warp. Fibers run in
// the order of their numbers or, when `backwards` is set, against it: a read of shared memory that no barrier
// separates from its write differs between the two. Shared memory is allocated anew for every block, to the
// byte, and poisoned with NaN. It cannot judge timing, or races inside one warp instruction.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return e ? "invalid value" : "no error"; }

inline dim3 threadIdx, blockIdx, gridDim, blockDim;
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int min(int a, int b) { return a < b ? a : b; }

namespace emulate {

inline bool backwards = false;
inline constexpr std::size_t kStack = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  std::vector<Copy> copies;  // asynchronous copies arrive when they are waited for, not before
};

struct Meeting {
  int arrived = 0;
  long long generation = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) unsigned char operand[32][64], result[32][64];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting meeting;
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  int running = 0;
  bool progress = false;
  std::function<void()> kernel;
};
inline Block block;

inline void yield() { swapcontext(&block.fibers[block.running].context, &block.scheduler); }

// Waits until `count` fibers are here; the last one runs `act` for all.
template <class Act>
void meet(Meeting& m, int count, const Act& act) {
  const long long generation = m.generation;
  block.progress = true;
  if (++m.arrived == count) {
    act();
    m.arrived = 0, ++m.generation;
    return;
  }
  while (m.generation == generation) yield();
}

// Every lane brings an In and leaves with its Out; combine(in[32], out[32]) is the warp instruction.
template <class In, class Out, class Combine>
Out warp_instruction(const In& in, const Combine& combine) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  Warp& warp = block.warps[block.running / 32];
  const int lane = block.running % 32;
  std::memcpy(warp.operand[lane], &in, sizeof in);
  meet(warp.meeting, 32, [&] {
    In all[32];
    Out out[32];
    for (int l = 0; l < 32; ++l) std::memcpy(&all[l], warp.operand[l], sizeof(In));
    combine(all, out);
    for (int l = 0; l < 32; ++l) std::memcpy(warp.result[l], &out[l], sizeof(Out));
  });
  Out out;
  std::memcpy(&out, warp.result[lane], sizeof out);
  return out;
}

inline void enter() {
  block.kernel();
  block.fibers[block.running].done = true;
  block.progress = true;
  yield();
}

inline void run_block(int threads, std::size_t shared_bytes) {
  block.shared.assign(shared_bytes, 0xff);
  block.shared.shrink_to_fit();
  if (static_cast<int>(block.fibers.size()) < threads) block.fibers.resize(threads);
  block.warps = std::vector<Warp>(threads / 32);
  block.meeting = {};
  for (int t = 0; t < threads; ++t) {
    Fiber& f = block.fibers[t];
    f.done = false;
    f.copies.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (int alive = threads; alive > 0;) {
    block.progress = false;
    for (int i = 0; i < threads; ++i) {
      const int t = backwards ? threads - 1 - i : i;
      if (block.fibers[t].done) continue;
      block.running = t;
      threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibers[t].context);
      alive -= block.fibers[t].done;
    }
    if (!block.progress && alive > 0) {
      std::fprintf(stderr, "emulate: %d threads wait for others that never come\n", alive);
      std::abort();
    }
  }
}

}  // namespace emulate

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Params), const Params& params) {
  gridDim = c->gridDim, blockDim = c->blockDim;
  emulate::block.kernel = [=] { kernel(params); };
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulate::run_block(static_cast<int>(blockDim.x), c->dynamicSmemBytes);
      }
  return cudaSuccess;
}
