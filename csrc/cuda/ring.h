// A place in a ring of stages, and the parity of its current round (mbarrier.h).
#pragma once
#include "cuda/instructions.h"

namespace sk::cuda {

struct Cursor {
  int stage = 0, parity = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace sk::cuda
