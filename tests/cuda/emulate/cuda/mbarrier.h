// What csrc/cuda/mbarrier.h is on a GPU, on a CPU.
#pragma once
#include "cuda/instructions.h"

namespace sk::cuda {

using Mbarrier = std::uint64_t;

struct MbarrierState {
  std::uint16_t pending, arrivals;
  std::int32_t bytes : 31;
  std::uint32_t parity : 1;
};

template <class Change>
void mbarrier_change(Mbarrier* b, const Change& change) {
  static_assert(sizeof(MbarrierState) == 8);
  MbarrierState s;
  std::memcpy(&s, b, 8);
  if (s.arrivals == 0 || s.arrivals == 0xffff) emulate::fail("an mbarrier is used before it is initialised");
  change(s);
  if (s.pending == 0 && s.bytes == 0) s.pending = s.arrivals, s.parity ^= 1;
  std::memcpy(b, &s, 8);
  emulate::block.progress = true;
}

inline void mbarrier_init(Mbarrier* b, int arrivals) {
  if (emulate::address_of(b) % 8) emulate::fail("an mbarrier is not aligned to 8 bytes");
  MbarrierState s = {};
  s.pending = s.arrivals = static_cast<std::uint16_t>(arrivals);
  std::memcpy(b, &s, 8);
}

inline void mbarriers_ready() {}
inline void stores_ready() {}

inline void mbarrier_arrive(Mbarrier* b) {
  mbarrier_change(b, [](MbarrierState& s) {
    if (s.pending-- == 0) emulate::fail("more arrivals than an mbarrier expects");
  });
}

inline void mbarrier_expect(Mbarrier* b, int bytes) {
  mbarrier_change(b, [&](MbarrierState& s) {
    if (s.pending-- == 0) emulate::fail("more arrivals than an mbarrier expects");
    s.bytes += bytes;
  });
}

inline void mbarrier_complete(Mbarrier* b, int bytes) {
  mbarrier_change(b, [&](MbarrierState& s) { s.bytes -= bytes; });
}

inline void mbarrier_wait(Mbarrier* b, int parity) {
  for (;;) {
    MbarrierState s;
    std::memcpy(&s, b, 8);
    if (static_cast<int>(s.parity) != parity) return;
    emulate::yield();
  }
}

}  // namespace sk::cuda
