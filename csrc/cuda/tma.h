// Copies from global to shared memory by the copy engine of sm_90, issued by one thread. They arrive at an
// mbarrier with their bytes.
#pragma once
#include <cuda.h>

#include "cuda/mbarrier.h"

namespace sk::cuda {

// `bytes` consecutive bytes: a multiple of 16, as are both addresses.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, Mbarrier* done) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(done))
      : "memory");
}

struct Corner {
  int at[5];  // innermost first
};

// The box of a tensor map at `corner`; elements outside the tensor become zero and count as bytes.
__device__ inline void copy_box(void* to, const CUtensorMap* map, const Corner& corner, Mbarrier* done) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(to)),
      "l"(map), "r"(corner.at[0]), "r"(corner.at[1]), "r"(corner.at[2]), "r"(corner.at[3]), "r"(corner.at[4]),
      "r"(shared_address(done))
      : "memory");
}

}  // namespace sk::cuda
