// What csrc/cuda/warpgroup.h is on a GPU, on a CPU.
#pragma once
#include "cuda/instructions.h"

namespace sk::cuda {

constexpr int kWarpgroup = 128;
constexpr int kTradedRegisters = 3 * 168;

template <int Registers>
void give_registers() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}
template <int Registers>
void take_registers() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}

inline void computers_barrier() {
  if (emulate::block.running / kWarpgroup > 1) emulate::fail("a thread waits with other warpgroups");
  emulate::meet(emulate::block.named[3], 2 * kWarpgroup, [] {});
}

inline void warp_barrier() {
  emulate::meet(emulate::block.warps[emulate::block.running / 32].meeting, 32, [] {});
}

}  // namespace sk::cuda
