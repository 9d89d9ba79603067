// What a launch is told. Layout is chosen in Python once per problem, in this order (backends/cuda_walk.py);
// Call differs from call to call. One pair of structs serves every kernel; plain C++, so that the binding can
// read it.
//
//   output pixel (n, i, j) of class q lies at (i, j) * out_step + offset[q]
//   and reads input pixels                 at (i, j) * in_step + origin + a * load      (a: a pixel of the
//   patch)
//
// A block owns a tile of tile_n x tile_h x tile_w output pixels. The input pixels that a step of it reads
// form a patch, its rows numbered (n, a_h, a_w); pixel (n, i, j) of the tile finds tap t in row (n, i *
// row_h, j * row_w) + row_of[t]. A class is what shares a list of taps: all of fprop, a phase of a strided
// dgrad, one position of a small map.
#pragma once
#include "core/tensor.h"

namespace sk::cuda {

struct Walk {
  int images;
  int tile_n, tile_h, tile_w;
  int tiles_n, tiles_h, tiles_w;
  int out_h, out_w, out_step_h, out_step_w;
  int in_h, in_w, in_step_h, in_step_w;
  int patch_h, patch_w, load_h, load_w;
  int row_h, row_w;
  int classes;
};

struct Layout {
  Walk walk;
  int groups;
  int group_in, group_out;  // channels a group reads and writes
  int tile_out, tiles_out;  // channels a block writes, and such blocks in a group
  int chunk;                // channels of a patch
  int pitch;   // of the patch in shared memory: words between channels (ffma) or bytes between rows (mma)
  int slab;    // most weight units of a step
  int splits;  // blocks that share one sum
  int width;   // which instance of a kernel template: see the kernel
  int items, steps, entries, lists, classes;  // where the sections of the tables start
  DType dtype;
};

// One step of a block; the tables hold them as eight ints.
struct Step {
  int origin_h, origin_w;     // of the patch
  int channel;                // first channel of the chunk, within its group
  int fresh;                  // 1: a new patch; 0: the step goes on with the patch of the step before
  int entries, entries_end;   // what to execute
  int weights, weight_units;  // where in the packed weights, and how many
};

struct Strides {
  long long n, c, h, w;
};

// y = activation(sum * scale[k] + shift[k] + residual)
struct Finish {
  const float* scale;    // [K] or null
  const float* shift;    // [K] or null
  const void* residual;  // laid out as y, or null
  Activation activation;
};

struct Call {
  const int* tables;
  const void* in;  // fprop, wgrad: x; dgrad: dy
  Strides in_strides;
  const void* weights;  // packed; wgrad: dy
  void* out;            // fprop: y; dgrad: dx; wgrad: dw [A, C/groups]
  Strides out_strides;  // wgrad: of dy
  float* partial;       // [splits][out_count] when splits > 1, else null
  long long out_count;
  Finish finish;
};

struct Params {
  Layout layout;
  Call call;
};

}  // namespace sk::cuda
