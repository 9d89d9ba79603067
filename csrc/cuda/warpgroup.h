// What warps of sm_90 do in fours: trade registers, and meet without the rest of the block.
#pragma once
#include "cuda/instructions.h"

namespace sk::cuda {

constexpr int kWarpgroup = 128;

// What three warpgroups that start with 168 registers a thread have to share: who asks for more waits for ever.
constexpr int kTradedRegisters = 3 * 168;

// Registers a thread of this warpgroup has from here on; all four warps call it.
template <int Registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Warpgroups 0 and 1 together, without the one that loads.
__device__ inline void computers_barrier() {
  asm volatile("bar.sync 3, %0;" ::"n"(2 * kWarpgroup) : "memory");
}

__device__ inline void warp_barrier() { __syncwarp(); }

}  // namespace sk::cuda
