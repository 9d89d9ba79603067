// The patch of the tensor-core kernels in shared memory: rows[row][c], 16 bytes of padding between rows so that eight
// rows of a matrix lie in different banks. x and dy are dense, channels last.
#pragma once
#include "cuda/walk.h"

namespace sk::cuda {

// Copies `chunk` channels (a power of two of 16-byte pieces) from `channel` on into rows `pitch` bytes apart; channels past the
// group's and pixels outside the image become zero. A group has a whole number of pieces.
template <class T, int Threads>
__device__ inline void load_rows(const Layout& l, const PatchRow* rows, const T* in, const Strides& s, const Step& step,
                                 unsigned char* to) {
  constexpr int kPiece = 16 / sizeof(T);
  const int pieces = l.chunk / kPiece, count = patch_rows(l.walk) * pieces, shift = __ffs(pieces) - 1;
  for (int i = threadIdx.x; i < count; i += Threads) {
    const int row = i >> shift, piece = i & (pieces - 1), channel = step.channel + piece * kPiece;
    const PatchRow r = rows[row];
    const bool valid = channel < l.group_in && inside(l.walk, r, step.origin_h, step.origin_w);
    const T* from = valid ? in + offset_of(s, r, step.origin_h, step.origin_w) + channel : in;
    copy_async<16>(to + row * l.pitch + piece * 16, from, valid);
  }
}

// Copies `count` units of Bytes.
template <int Bytes, int Threads>
__device__ inline void load_units(const void* from, int count, unsigned char* to) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (int i = 16 * threadIdx.x; i < count * Bytes; i += 16 * Threads) copy_async<16>(to + i, bytes + i, true);
}

}  // namespace sk::cuda
