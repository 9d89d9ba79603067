// Rows of 128 bytes in shared memory as tensor maps write and wgmma reads them: 16-byte piece p of row r lies at place
// p ^ (r % 8), so that one piece of eight rows in a row lies in all banks.
#pragma once
#include "cuda/instructions.h"

namespace sk::cuda {

constexpr int kRowBytes = 128;
constexpr int kRowChannels = 64;              // of 16 bits
constexpr int kSwizzleBytes = 8 * kRowBytes;  // after so many the pattern repeats: rows begin at a multiple

// Bytes from `base` to where such rows may begin; a launch asks for kSwizzleBytes of shared memory more for this.
__device__ inline std::uint32_t swizzle_padding(const unsigned char* base) {
  return -shared_address(base) & (kSwizzleBytes - 1);
}

// Where a piece lies, in bytes from its row, and from row 0.
__device__ inline int place_in_row(int row, int piece) { return (piece ^ (row & 7)) << 4; }
__device__ inline int place_of_piece(int row, int piece) {
  return row * kRowBytes + place_in_row(row, piece);
}

}  // namespace sk::cuda
