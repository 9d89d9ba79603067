// The launchers: a CUDA error code comes back, 0 when the kernel was started. `stream` is a cudaStream_t.
#pragma once
#include "cuda/params.h"

namespace sk::cuda {

using Launcher = int (*)(const Params&, void* stream);

// Strict float32, exact at one filter (fprop) or one stripe (dgrad, wgrad), any strides.
int fprop_ffma(const Params&, void* stream);
int dgrad_ffma(const Params&, void* stream);
int wgrad_ffma(const Params&, void* stream);

// Tensor cores by mma.sync: bfloat16, float16, and float32 rounded to tf32; channels last.
int fprop_mma(const Params&, void* stream);
int dgrad_mma(const Params&, void* stream);
int wgrad_mma(const Params&, void* stream);

// Hopper alone (sm_90a): wgmma and its copy engine; bfloat16, float16; channels last.
int fprop_sm90(const Params&, void* stream);
int fprop_taps_sm90(const Params&, void* stream);
int fprop_whole_sm90(const Params&, void* stream);
int dgrad_sm90(const Params&, void* stream);
int wgrad_sm90(const Params&, void* stream);

// Shared memory of a block in bytes, so that Python can choose layouts that fit.
int fprop_ffma_bytes(const Layout&);
int dgrad_ffma_bytes(const Layout&);
int wgrad_ffma_bytes(const Layout&);
int fprop_mma_bytes(const Layout&);
int dgrad_mma_bytes(const Layout&);
int wgrad_mma_bytes(const Layout&);
int fprop_sm90_bytes(const Layout&);
int fprop_taps_sm90_bytes(const Layout&);
int fprop_whole_sm90_bytes(const Layout&);
int dgrad_sm90_bytes(const Layout&);
int wgrad_sm90_bytes(const Layout&);

// out[i] = finish(partial[0][i] + partial[1][i] + ...), in this order; channel of i: i / channel_stride %
// channels.
struct Reduction {
  const float* partial;
  void* out;
  long long count, channel_stride;
  int splits, channels;
  DType dtype;
  Finish finish;
};
int reduce(const Reduction&, void* stream);

// out[i] = values[row[i]], zeros where row[i] < 0; a row has `pieces` of 16 bytes.
struct RowCopy {
  const void* values;
  const int* row;
  void* out;
  long long count, pieces;
};
int copy_rows(const RowCopy&, void* stream);

// A tap's shift.
struct Shift {
  short i, j;
};

// y[n,k,p,q] = finish(sum over the rows a of filter k: z[a][(n, p + i, q + j)]): a row of z has `pitch` values, pixel after
// pixel of a map. Of the tables, ints: the first row of every `width` filters and the end, then sections of four ints,
// rows (row of z, tap, jump, slot) and maps (shift, rows and columns of the map); see stripe_sum.cu.
struct StripeSum {
  const void* z;
  void* out;
  const int* tables;
  int pitch;
  Strides out_strides;
  Finish finish;
  int rows, maps;  // where the sections begin
  int images, out_h, out_w;
  int map_h, map_w;  // of all rows, or negative
  int filters, width;
  int shift_count;  // of rows with one map
  Shift shifts[32];
  DType dtype;
};
int stripe_sum(const StripeSum&, void* stream);

// p[m][a] = dy[pixel m - tap of a][filter of a] in rows of `pitch` values, `pieces` times 16 bytes of each. Of the tables:
// ranges (first pixel of dy and count, a tile of m), places (16 bits a value: a filter of the group, or as many as it has
// where there is no stripe), tap_of (a piece); see stripe_spread.cu.
struct StripeSpread {
  const void* dy;
  void* p;
  const int* tables;
  long long pitch;                    // values
  long long pixel_bytes, first_byte;  // of dy: from pixel to pixel, and of the group's first filter
  int row_bytes;                      // of the group's filters
  int ranges, places, tap_of;         // where the sections begin
  int images, rows, columns;          // of m
  int out_h, out_w;                   // of dy
  int pieces, tile, most_rows, splits;
  int tap_count;
  Shift taps[64];
  DType dtype;
};
int stripe_spread(const StripeSpread&, void* stream);

}  // namespace sk::cuda
