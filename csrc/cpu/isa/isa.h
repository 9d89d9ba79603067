// What one instruction set offers to the loops above it. Filled once per ISA from the same sources (tile.cpp,
// layout.cpp), which are compiled with that ISA's flags and keep everything in anonymous namespaces.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace sk {

constexpr int kMaxTileFilters = 8;
constexpr int kMaxTileVectors = 12;
// Steps over stripes or pixels summed before they join y: one running sum of 70 products left the error budget (generated
// problems). Of the channels of a tap: channel_chain (cpu/stripes.h).
constexpr int kStretch = 32;

// One step of a reduction through a list: where the two operands lie.
struct IndexedStep {
  std::int32_t lanes;   // offset into the lane operand b
  std::int32_t scalar;  // row of the broadcast operand a, F scalars each; for pixels an offset into a
};

// y[rows[f], v*W + lane] += sum_i a[i, f] * b[i, v*W + lane]
//   a: dense rows of F scalars, broadcast;  b: i-th row at b + i * b_step, V vectors of lanes.
using StridedTile = void (*)(std::int64_t n, const float* a, const float* b, std::int64_t b_step, float* y,
                             std::int64_t ldy, const std::int32_t* rows);
// The same, zero at the start, with operand rows at a + F * steps[i].scalar and b + steps[i].lanes; y rows are consecutive.
// kStretch steps are summed before they join y.
using IndexedTile = void (*)(std::int64_t n, const float* a, const float* b, const IndexedStep* steps,
                             float* y, std::int64_t ldy);
// y[f * ldy + v*W + lane] = sum_i a[f_off[f] + i * a_step] * b[i, v*W + lane], rows of b dense: one stream, summed `stretch` by
// `stretch`. Meanwhile it fetches `bytes` of what lies `ahead`.
struct Fetch {
  const char* ahead;
  std::int64_t bytes;
};
using StreamTile = void (*)(std::int64_t n, std::int64_t stretch, const float* a, std::int64_t a_step,
                            const std::int32_t* f_off, const float* b, float* y, std::int64_t ldy,
                            Fetch fetch);
// y[f*W + lane] = sum_i a[i * a_step + f] * b[i*W + lane], rows of b dense: F scalars that follow each other, one vector;
// summed `stretch` by `stretch`.
constexpr int kMaxSpan = 24;
using SpanTile = void (*)(std::int64_t n, std::int64_t stretch, const float* a, std::int64_t a_step,
                          const float* b, float* y);
// y[f * ldy + v*W + lane] = sum_i a[f_off[f] + steps[i].scalar] * b[steps[i].lanes + v*W + lane], summed `stretch` by stretch.
using ListedTile = void (*)(std::int64_t n, std::int64_t stretch, const float* a, const std::int32_t* f_off,
                            const float* b, const IndexedStep* steps, float* y, std::int64_t ldy);

// StridedTile on cells of two bfloat16 values: y += sum_i low(a) * low(b) + high(a) * high(b), float sums.
using PairedTile = StridedTile;

// One tap's filters over one run of lanes in matrix registers (isa/matrix.h): cells as above, sixteen of them a step.
//   y[rows[f], v*W + lane] += sum_i low(a_f[i]) * low(b[i, v*W + lane]) + high(a_f[i]) * high(...),  v < vectors
struct MatrixRun {
  const float* a;  // [tiles][steps][height][16]: the filters' cells, the last tile filled up with zeros
  const float* b;  // [16 * steps], b_step apart: begins and steps by whole vectors where loads shall be fast
  std::int64_t b_step;
  float* y;
  std::int64_t ldy;
  const std::int32_t* rows;
  int filters, vectors;
};
struct MatrixSums {  // on their way to y
  const float* from;
  float* y;
  std::int64_t ldy;
  const std::int32_t* rows;
  int filters, vectors;
};
struct MatrixWork {
  alignas(64) float sums[2][4 * 16 * 16];
  MatrixSums before;  // of the products before, added to y beside the next
  int steps, height, turn;
};
struct MatrixKernels {
  void (*begin)(MatrixWork& w, int steps,
                int height);  // of this thread's registers; height: filters of a tile, 16 at most
  void (*add)(MatrixWork& w, const MatrixRun& run);
  void (*end)(MatrixWork& w);  // y is complete then
};
constexpr int kMatrixHeight = 16, kMatrixChannels = 32;

// Adds (or, first: stores) to V vectors of y0 and of y1 the sums over `stripes` of two filters, C channels c_stride apart:
// shared: y_f[lane] += sum_i,c a[i, c, f] * b[offsets[i] + c * c_stride + lane];  own: with offsets[2 i + f].
constexpr int kTapChannels = 3;  // numbers of channels that have loops of their own; 0: any number
using TapTile = void (*)(std::int64_t stripes, std::int64_t channels, const float* a,
                         const std::int32_t* offsets, const float* b, std::int64_t c_stride, float* y0,
                         float* y1, bool first);

// Pooling windows of one row of output pixels (isa/pool.h).
struct Windows {
  std::int64_t count, step;  // output pixels, and how far apart their windows begin
  std::int64_t row_step;
  std::int64_t images;
  int rows, cols;
};

struct IsaKernels {
  const char* name;
  bool fused;                             // multiplies and adds with one rounding
  int lanes;                              // W: floats in a vector
  int tile_filters;                       // filters of a full tile
  int tile_vectors[kMaxTileFilters + 1];  // most vectors a tile of F filters keeps in registers
  StridedTile strided[kMaxTileFilters + 1][kMaxTileVectors + 1];  // [F][V], null beyond tile_vectors[F]
  PairedTile paired[kMaxTileFilters + 1][kMaxTileVectors + 1];    // all null without such an instruction
  MatrixKernels matrix;                                           // null likewise
  IndexedTile indexed[kMaxTileFilters + 1][kMaxTileVectors + 1];
  StreamTile stream[kMaxTileFilters + 1][kMaxTileVectors + 1];
  int most_span;  // F of a SpanTile that stays in registers
  SpanTile span[kMaxSpan + 1];
  ListedTile listed[kMaxTileFilters + 1][kMaxTileVectors + 1];
  int pair_vectors;  // most vectors of the two that follow
  TapTile shared_taps[kTapChannels + 1][kMaxTileVectors + 1];
  TapTile own_taps[kTapChannels + 1][kMaxTileVectors + 1];

  // dst[i] = float(src[i * step])
  void (*load_row)(float* dst, const void* src, DType type, std::int64_t step, std::int64_t n);
  // dst[i * step] = type(src[i])
  void (*store_row)(void* dst, DType type, std::int64_t step, const float* src, std::int64_t n);
  // `pair` in what follows: kUnpaired, or float(v) is the cell of v and of the value `pair` elements further (TensorView::pair).
  // Rows: zeros_before zeros, then float(src[r * row_step + i * step]) for i < cols, then zeros_after zeros, at dst + r * pitch.
  void (*load_rows)(float* dst, std::int64_t pitch, const void* src, DType type, std::int64_t row_step,
                    std::int64_t step, std::int64_t rows, std::int64_t zeros_before, std::int64_t cols,
                    std::int64_t zeros_after, std::int64_t pair);
  // dst[r * row_step + i * step] = type(src[r * pitch + i])
  void (*store_rows)(void* dst, DType type, std::int64_t row_step, std::int64_t step, const float* src,
                     std::int64_t pitch, std::int64_t rows, std::int64_t cols);
  // dst[j * dst_ld + i] = float(src[i * src_ld + j]) for i < rows, j < cols
  void (*load_transposed)(float* dst, std::int64_t dst_ld, const void* src, DType type, std::int64_t src_ld,
                          std::int64_t rows, std::int64_t cols, std::int64_t pair);
  // dst[j * dst_ld + i] = type(src[i * src_ld + j]) for i < rows, j < cols
  void (*store_transposed)(void* dst, DType type, std::int64_t dst_ld, const float* src, std::int64_t src_ld,
                           std::int64_t rows, std::int64_t cols);
  // sums[i] += x[i]
  void (*add_wide)(double* sums, const float* x, std::int64_t n);
  // row[i] = activation(row[i] * scale + shift + residual[i]); residual may be null
  void (*finish_row)(float* row, std::int64_t n, float scale, float shift, const float* residual,
                     Activation act);
  // Where b or x is the larger, or a NaN: y[i] = a[i] or b[i];  y[i] = y[i] or x[i * step];  of a[2i], a[2i + 1], b[2i], b[2i + 1];
  // of the squares of a dense map whose rows have `width` values: n outputs.
  void (*larger_of)(float* y, const float* a, const float* b, std::int64_t n);
  void (*keep_larger)(float* y, const float* x, std::int64_t step, std::int64_t n);
  void (*largest_of_squares)(float* y, const float* a, const float* b, std::int64_t n);
  void (*largest_of_narrow_squares)(float* y, const float* x, int width, std::int64_t n);
  // Maximum and sum of each window: out [count][images]
  void (*max_windows)(float* out, const float* in, const Windows& w);
  void (*sum_windows)(float* out, const float* in, const Windows& w);
};

// By name, or null where this build or this processor lacks it. `best_isa` never is null.
const IsaKernels* find_isa(const char* name);
const IsaKernels* best_isa();
const char* const* isa_names();  // null-terminated, best first, those that run here

}  // namespace sk
