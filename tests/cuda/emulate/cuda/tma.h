// What csrc/cuda/tma.h is on a GPU, on a CPU: copies happen at once, or when every thread waits.
#pragma once
#include <cuda.h>

#include "cuda/mbarrier.h"

namespace sk::cuda {

template <class Act>
void copy_sometime(const Act& act) {
  emulate::block.progress = true;
  if (emulate::late)
    emulate::block.copies.push_back(act);
  else
    act();
}

inline void copy_bulk(void* to, const void* from, int bytes, Mbarrier* done) {
  const std::uint32_t address = emulate::address_of(to);
  if (address % 16 || reinterpret_cast<std::uintptr_t>(from) % 16 || bytes % 16)
    emulate::fail("a bulk copy is not aligned to 16 bytes");
  copy_sometime([=] {
    std::memcpy(emulate::at_address(address, bytes), from, bytes);
    mbarrier_complete(done, bytes);
  });
}

struct Corner {
  int at[5];
};

// The 16-byte piece at this address, swizzled by 128 bytes: bits 4 to 6 take bits 7 to 9.
inline std::uint32_t swizzle_128(std::uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void fill_box(std::uint32_t address, const CUtensorMap& map, const Corner& corner) {
  const int pieces = static_cast<int>(map.box[0]) * 2 / 16;
  int row = 0;
  for (unsigned n = 0; n < map.box[4]; ++n)
    for (unsigned h = 0; h < map.box[3]; ++h)
      for (unsigned w = 0; w < map.box[2]; ++w)
        for (unsigned g = 0; g < map.box[1]; ++g, ++row) {
          const long long at[5] = {corner.at[0], corner.at[1] + (long long)g, corner.at[2] + (long long)w,
                                   corner.at[3] + (long long)h, corner.at[4] + (long long)n};
          bool inside = true;
          long long offset = 0;
          for (int d = 1; d < 5; ++d) {
            inside = inside && at[d] >= 0 && at[d] < static_cast<long long>(map.extent[d]);
            offset += at[d] * static_cast<long long>(map.stride[d - 1]);
          }
          for (int p = 0; p < pieces; ++p)
            for (int v = 0; v < 8; ++v) {  // values one by one: the last channel may lie inside a piece
              const std::uint32_t linear = address + row * map.box[0] * 2 + p * 16;
              unsigned char* to = emulate::at_address(swizzle_128(linear), 16) + 2 * v;
              const long long c = at[0] + 8 * p + v;
              if (inside && c >= 0 && c < static_cast<long long>(map.extent[0]))
                std::memcpy(to, map.base + offset + 2 * c, 2);
              else
                std::memset(to, 0, 2);
            }
        }
}

inline void copy_box(void* to, const CUtensorMap* map, const Corner& corner, Mbarrier* done) {
  const std::uint32_t address = emulate::address_of(to);
  if (address % 128) emulate::fail("a box does not begin at a multiple of 128 bytes");
  // An H200 ended a kernel whose boxes began in between with an illegal instruction; nothing else told it from others.
  if (corner.at[0] % 8) emulate::fail("a box does not begin at a multiple of 16 bytes of a row");
  if (!map->base) emulate::fail("a box of a tensor map that was not encoded");
  const CUtensorMap copy = *map;
  copy_sometime([=] {
    fill_box(address, copy, corner);
    mbarrier_complete(
        done, static_cast<int>(copy.box[0] * copy.box[1] * copy.box[2] * copy.box[3] * copy.box[4] * 2));
  });
}

}  // namespace sk::cuda
