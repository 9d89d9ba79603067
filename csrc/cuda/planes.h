// The patch of the float32 kernels in shared memory: planes[c][row], any strides in global memory.
#pragma once
#include "cuda/walk.h"

namespace sk::cuda {

// Copies `chunk` (a power of two, 32 at most) channels from `channel` on; channels past the group's and
// pixels outside the image become zero. Lanes follow whatever is contiguous in memory: channels, or the
// pixels of a row.
template <int Threads>
__device__ inline void load_planes(const Layout& l, const PatchRow* rows, const float* in, const Strides& s,
                                   const Step& step, int chunk, float* planes) {
  const int count = patch_rows(l.walk), channels = l.group_in - step.channel;
  const bool along_channels = s.c == 1;
  const int lanes = along_channels ? chunk : 32;
  const int lane = threadIdx.x & (lanes - 1), first = threadIdx.x / lanes, stride = Threads / lanes;
  if (along_channels) {
    for (int row = first; row < count; row += stride) {
      const PatchRow r = rows[row];
      const bool valid = lane < channels && inside(l.walk, r, step.origin_h, step.origin_w);
      const float* from =
          valid ? in + offset_of(s, r, step.origin_h, step.origin_w) + step.channel + lane : in;
      copy_async<4>(planes + lane * l.pitch + row, from, valid);
    }
    return;
  }
  for (int row = lane; row < count; row += lanes) {
    const PatchRow r = rows[row];
    const bool pixel = inside(l.walk, r, step.origin_h, step.origin_w);
    const float* from = pixel ? in + offset_of(s, r, step.origin_h, step.origin_w) + step.channel * s.c : in;
    for (int c = first; c < chunk; c += stride) {
      const bool valid = pixel && c < channels;
      copy_async<4>(planes + c * l.pitch + row, valid ? from + c * s.c : in, valid);
    }
  }
}

__device__ inline float dot4(const float4& a, const float (&b)[4], float sum) {
  sum = fmaf(a.x, b[0], sum), sum = fmaf(a.y, b[1], sum);
  return fmaf(a.w, b[3], fmaf(a.z, b[2], sum));
}

// Copies `count` floats, a multiple of 4, both ends 16-byte aligned.
template <int Threads>
__device__ inline void load_linear(const float* from, int count, float* to) {
  for (int i = 4 * threadIdx.x; i < count; i += 4 * Threads) copy_async<16>(to + i, from + i, true);
}

}  // namespace sk::cuda
