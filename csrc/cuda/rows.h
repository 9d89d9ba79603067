// The patch of the tensor-core kernels in shared memory: rows[row][c], 16 bytes of padding between rows so
// that eight rows of a matrix lie in different banks. x and dy are dense, channels last.
#pragma once
#include "cuda/walk.h"

namespace sk::cuda {

// Copies `channels` channels (a power of two of 16-byte pieces) of `count` pixels into rows `pitch` bytes
// apart. place(row) is where the first of them lies in memory, or null for a pixel outside the image; what is
// missing there, and past `exist` channels (a whole number of pieces), becomes zero.
template <class T, int Threads, class Place>
__device__ inline void load_rows(int count, int channels, int exist, int pitch, const T* any,
                                 const Place& place, unsigned char* to) {
  constexpr int kPiece = 16 / sizeof(T);
  const int pieces = channels / kPiece, shift = __ffs(pieces) - 1;
  for (int i = threadIdx.x; i < count * pieces; i += Threads) {
    const int row = i >> shift, piece = i & (pieces - 1);
    const T* from = place(row);
    const bool valid = from && piece * kPiece < exist;
    copy_async<16>(to + row * pitch + piece * 16, valid ? from + piece * kPiece : any, valid);
  }
}

// The patch of a step.
template <class T, int Threads>
__device__ inline void load_patch(const Layout& l, const PatchRow* rows, const T* in, const Strides& s,
                                  const Step& step, unsigned char* to) {
  const auto place = [&](int row) -> const T* {
    const PatchRow r = rows[row];
    if (!inside(l.walk, r, step.origin_h, step.origin_w)) return nullptr;
    return in + offset_of(s, r, step.origin_h, step.origin_w) + step.channel;
  };
  load_rows<T, Threads>(patch_rows(l.walk), l.chunk, l.group_in - step.channel, l.pitch, in, place, to);
}

// Copies `count` units of Bytes.
template <int Bytes, int Threads>
__device__ inline void load_units(const void* from, int count, unsigned char* to) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (int i = 16 * threadIdx.x; i < count * Bytes; i += 16 * Threads)
    copy_async<16>(to + i, bytes + i, true);
}

}  // namespace sk::cuda
