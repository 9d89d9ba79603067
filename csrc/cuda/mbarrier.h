// Barriers in shared memory that threads and asynchronous copies arrive at (sm_90). A phase is over when all
// arrivals and all announced bytes are in; waiting names the parity of the phase: 0, 1, 0, ...
#pragma once
#include "cuda/instructions.h"

namespace sk::cuda {

using Mbarrier = std::uint64_t;

__device__ inline void mbarrier_init(Mbarrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; other threads see them after a block barrier.
__device__ inline void mbarriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes this thread's stores to shared memory visible to the copy engine and the tensor cores, after a block barrier.
__device__ inline void stores_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void mbarrier_arrive(Mbarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

// Arrives, and announces bytes that copies will complete.
__device__ inline void mbarrier_expect(Mbarrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity is over; the phase before the first one counts as over.
__device__ inline void mbarrier_wait(Mbarrier* b, int parity) {
  std::uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
  } while (!over);
}

}  // namespace sk::cuda
