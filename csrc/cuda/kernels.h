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
int dgrad_sm90(const Params&, void* stream);

// Shared memory of a block in bytes, so that Python can choose layouts that fit.
int fprop_ffma_bytes(const Layout&);
int dgrad_ffma_bytes(const Layout&);
int wgrad_ffma_bytes(const Layout&);
int fprop_mma_bytes(const Layout&);
int dgrad_mma_bytes(const Layout&);
int wgrad_mma_bytes(const Layout&);
int fprop_sm90_bytes(const Layout&);
int fprop_taps_sm90_bytes(const Layout&);
int dgrad_sm90_bytes(const Layout&);

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

}  // namespace sk::cuda
