// How wgmma finds an operand in shared memory. Plain C++: the emulation decodes what this encodes.
#pragma once
#include <cstdint>

#include "cuda/instructions.h"

namespace sk::cuda {

constexpr std::uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;

// A matrix whose rows are 128 bytes apart and swizzled by 128 bytes: 16-byte piece p of row r lies at place
// p ^ (r % 8). `address` is that of row 0 (a multiple of 1024 bytes), or 32 bytes further for each 16 values of K. It may be
// that of any later row: the chip swizzles by the bits of an address (measured on an H200 for rows 0 to 15, base offset 0).
__device__ inline std::uint64_t matrix_descriptor(std::uint32_t address) {
  return (address & 0x3ffff) >> 4 | std::uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// A matrix whose rows run along K: of `rows` rows and 64 columns each (128 bytes, swizzled as above) one part after the
// other. 16 rows further are 2048 bytes further.
__device__ inline std::uint64_t column_descriptor(std::uint32_t address, int rows) {
  return (address & 0x3ffff) >> 4 | static_cast<std::uint64_t>(rows * 128 >> 4) << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

// A matrix of 16 values of K a row, without a swizzle: [eight rows][eight values of K][row] of 16 bytes each, one after the
// other; a multiple of 16 bytes.
__device__ inline std::uint64_t sixteens_descriptor(std::uint32_t address) {
  return (address & 0x3ffff) >> 4 | std::uint64_t{128 >> 4} << 16 | std::uint64_t{256 >> 4} << 32;
}

}  // namespace sk::cuda
