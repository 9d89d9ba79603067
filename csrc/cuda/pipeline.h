// The steps of a block, two deep: while one is executed the next is on its way. Patches and weights have two
// halves of shared memory each; a patch that is not fresh stays where it is.
#pragma once
#include "cuda/walk.h"

namespace sk::cuda {

// load(step, patch_half, weight_half) issues asynchronous copies; execute(step, patch_half, weight_half) uses
// what arrived.
template <class Load, class Execute>
__device__ inline void run_steps(const Step* step, const Step* end, const Load& load,
                                 const Execute& execute) {
  int filling = 1, reading = 1, half = 0;
  const auto fetch = [&](const Step& s, int to) {
    filling ^= s.fresh;
    load(s, filling, to);
    copies_commit();
  };
  if (step < end) fetch(*step, 0);
  for (; step < end; ++step, half ^= 1) {
    copies_wait();
    barrier();  // the copies of every thread have landed, and nobody reads the halves filled next
    if (step + 1 < end) fetch(step[1], half ^ 1);
    reading ^= step->fresh;
    execute(*step, reading, half);
  }
}

}  // namespace sk::cuda
