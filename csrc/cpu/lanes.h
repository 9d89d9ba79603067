// Moves a block of a tensor [N, C, H, W] into rows of float lanes and back:
//
//   lanes[c * c_stride + ((image * rows + row) * pitch + col)]                       batch == 1: lanes run along pixels
//   lanes[c * c_stride + (row * pitch + col) * batch + image]                        batch  > 1: lanes run along images
//   row, col  <->  h = (first_row + row) * step_h + h0,  w = (first_col + col) * step_w + w0
#pragma once
#include <cstdint>

#include "core/tensor.h"
#include "cpu/isa/isa.h"
#include "cpu/lattice.h"

namespace sk {

struct LaneMap {
  int batch = 1;
  int n0 = 0, images = 1;
  int first_row = 0, rows = 0;
  int first_col = 0, cols = 0, pitch = 0;  // cols are moved; the rest of the pitch is zero after a load
  int h0 = 0, w0 = 0, step_h = 1, step_w = 1;
  int tensor_h = 0, tensor_w = 0;
  std::int64_t c_stride = 0;
};

// Channels [c_first, c_first + count) of x; positions outside the tensor become zero when lanes run along pixels and
// are left as they are when lanes run along images (nothing reads them there).
void load_lanes(const IsaKernels& isa, const TensorView& x, const LaneMap& m, int c_first, int count,
                float* lanes);

void store_lanes(const IsaKernels& isa, const TensorView& y, const LaneMap& m, int c_first, int count,
                 const float* lanes);

// dst[((h - rows.lo) * width + w) * ld + c] of image n, for all channels: what reduces over channels or pixels reads this way.
void load_pixel_major(const IsaKernels& isa, const TensorView& t, int n, int channels, Range rows, int width,
                      std::int64_t ld, float* dst);

// In place over channels of a block: activation(lane * scale[c] + shift[c] + residual). A residual passes through `strip`,
// kFinishStrip channels of c_stride floats; without one it may be null.
constexpr int kFinishStrip = 16;
void finish_lanes(const IsaKernels& isa, const Epilogue& e, const LaneMap& m, int c_first, int count,
                  float* lanes, float* strip);

}  // namespace sk
