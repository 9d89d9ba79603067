// Enough of CUDA to run a kernel on a CPU, for tests: every thread of a block is a fiber, blocks run one
// after another.
//
// A fiber runs until it waits: at a barrier for its block, in a warp instruction for its warp. Fibers run in
// the order of their numbers or, when `backwards` is set, against it: a read of shared memory that no barrier
// separates from its write differs between the two. When `greedy` is set, a
// warp goes on as long as it can before the next one runs: some get ahead as far as the barriers let them. Shared memory is allocated anew for every block, to the
// byte, and poisoned with NaN. What is asynchronous on sm_90 happens at once or, when `late` is set, as late as
// it may: copies when every thread waits, products when their group is waited for. It cannot judge timing, or
// races inside one warp instruction.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulate {

inline std::string failing;  // the call of the runtime that fails, as calls do that ask for too much

inline cudaError_t outcome(const char* call) {
  return failing == call ? cudaErrorLaunchOutOfResources : cudaSuccess;
}

// Of every grid only the block of the highest numbers runs, and a persistent grid has a block for every item: tensors of
// more than 2^31 values are read and written at their end alone.
inline bool last_block = false;

}  // namespace emulate

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return emulate::outcome("cudaFuncSetAttribute");
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, emulate::outcome("cudaGetDevice"); }
// Few, so that a block of a persistent grid has several items.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulate::last_block ? 1 << 30 : 2, emulate::outcome("cudaDeviceGetAttribute");
}
inline cudaError_t cudaGetLastError() { return emulate::outcome("cudaGetLastError"); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  return *count = 1, emulate::outcome("cudaGetDeviceCount");
}
inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

inline dim3 threadIdx, blockIdx, gridDim, blockDim;
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int min(int a, int b) { return a < b ? a : b; }

namespace emulate {

inline bool backwards = false, late = false, greedy = false;
inline constexpr std::size_t kStack = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// One asynchronous product of a warpgroup, as one thread sees it; run(all lanes' d and registers, product, warp) does a
// warp's. registers: null where a descriptor names a.
struct Product {
  float* d;
  const std::uint32_t* registers;
  std::uint64_t a, b;
  bool accumulate;
  int group;
  void (*run)(float* const*, const std::uint32_t* const*, const Product&, int);
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  std::vector<Copy> copies;  // asynchronous copies arrive when they are waited for, not before
  std::vector<Product> products;
  int groups = 0;  // committed
};

struct Meeting {
  int arrived = 0;
  long long generation = 0;
};

struct Warp {
  Meeting meeting;
  std::uint64_t products = 0;  // a digest: the four warps of a warpgroup issue the same
  alignas(16) unsigned char operand[32][64], result[32][64];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting meeting, named[16];
  std::vector<std::function<void()>> copies;  // of the copy engine, on their way
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  int running = 0;
  bool progress = false;
  std::function<void()> kernel;
};
inline Block block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulate: %s\n", what);
  std::abort();
}

// Shared memory as instructions address it: it begins somewhere, at a multiple of 128 and no more.
constexpr std::uint32_t kSharedBase = 0x480;
inline std::uint32_t address_of(const void* p) {
  return kSharedBase + static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - block.shared.data());
}
inline unsigned char* at_address(std::uint32_t address, std::size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > block.shared.size())
    fail("an address lies outside shared memory");
  return block.shared.data() + (address - kSharedBase);
}

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
  for (Meeting& m : block.named) m = {};
  for (int t = 0; t < threads; ++t) {
    Fiber& f = block.fibers[t];
    f.done = false;
    f.copies.clear();
    f.products.clear();
    f.groups = 0;
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
      if (!block.fibers[t].done) {
        block.running = t;
        threadIdx.x = t;
        swapcontext(&block.scheduler, &block.fibers[t].context);
        alive -= block.fibers[t].done;
      }
      if (greedy && i % 32 == 31 && block.progress) break;  // the first warps again, as far as they come
    }
    if (!block.progress && alive > 0) {
      if (block.copies.empty()) {
        std::fprintf(stderr, "emulate: %d threads wait for others that never come\n", alive);
        std::abort();
      }
      const auto one = backwards ? block.copies.end() - 1 : block.copies.begin();
      const std::function<void()> copy = *one;
      block.copies.erase(one);
      copy();
    }
  }
  if (!block.copies.empty()) fail("a block ends while copies are on their way");
  for (int t = 0; t < threads; ++t)
    if (!block.fibers[t].products.empty()) fail("a thread ends with products nobody waited for");
  for (int w = 0; w < threads / 32; ++w)
    if (block.warps[w].products != block.warps[w / 4 * 4].products)
      fail("the warps of a warpgroup issue different products");
}

}  // namespace emulate

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Params), const Params& params) {
  if (const cudaError_t e = emulate::outcome("cudaLaunchKernelEx")) return e;
  gridDim = c->gridDim, blockDim = c->blockDim;
  emulate::block.kernel = [=] { kernel(params); };
  const dim3 first = emulate::last_block ? dim3(gridDim.x - 1, gridDim.y - 1, gridDim.z - 1) : dim3(0, 0, 0);
  for (unsigned z = first.z; z < gridDim.z; ++z)
    for (unsigned y = first.y; y < gridDim.y; ++y)
      for (unsigned x = first.x; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulate::run_block(static_cast<int>(blockDim.x), c->dynamicSmemBytes);
      }
  return cudaSuccess;
}
