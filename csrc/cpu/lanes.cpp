#include "cpu/lanes.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/lattice.h"

namespace sk {
namespace {

constexpr int kStage = 64;            // pixels of an image staged at once where neither tensor stride is 1
constexpr std::int64_t kNear = 4096;  // bytes of an image's channel worth fetching ahead

Range inside(int first, int count, int step, int origin, int extent) {
  const Range in = {ceil_div(-origin, step) - first, floor_div(extent - 1 - origin, step) + 1 - first};
  return intersect(in, {0, count});
}

// The part of a block that lies inside the tensor.
struct Inside {
  Range rows, cols;
  explicit Inside(const LaneMap& m)
      : rows(inside(m.first_row, m.rows, m.step_h, m.h0, m.tensor_h)),
        cols(inside(m.first_col, m.cols, m.step_w, m.w0, m.tensor_w)) {}
};

char* element(const TensorView& t, const LaneMap& m, int image, int c, int row, int col) {
  return t.at(m.n0 + image, c, (m.first_row + row) * m.step_h + m.h0, (m.first_col + col) * m.step_w + m.w0);
}

float* lane_row(const LaneMap& m, float* lanes, int c, int image, int row) {
  return lanes + c * m.c_stride + (static_cast<std::int64_t>(image) * m.rows + row) * m.pitch;
}

// Rows above and below the tensor; all of them where no column meets it.
void zero_rows(const LaneMap& m, const Inside& in, float* map) {
  const bool none = in.cols.size() == 0 || in.rows.size() == 0;
  std::fill(map, map + (none ? m.rows : in.rows.lo) * static_cast<std::int64_t>(m.pitch), 0.f);
  if (!none)
    std::fill(map + in.rows.hi * static_cast<std::int64_t>(m.pitch),
              map + m.rows * static_cast<std::int64_t>(m.pitch), 0.f);
}

// True when rows of the block follow each other without a gap in the tensor and in the lanes.
bool rows_contiguous(const TensorView& t, const LaneMap& m, const Inside& in) {
  return t.stride[3] == 1 && m.step_w == 1 && m.step_h == 1 && t.stride[2] == m.tensor_w &&
         in.cols.size() == m.tensor_w && m.pitch == m.tensor_w && in.cols.lo == 0;
}

// And whole channels likewise.
bool channels_contiguous(const TensorView& t, const LaneMap& m, const Inside& in) {
  const std::int64_t plane = static_cast<std::int64_t>(m.tensor_h) * m.tensor_w;
  return rows_contiguous(t, m, in) && in.rows.lo == 0 && in.rows.size() == m.tensor_h &&
         m.rows == m.tensor_h && t.stride[1] == plane && m.c_stride == plane * m.batch;
}

void prefetch(const char* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

std::int64_t batch_pixel(const LaneMap& m, int row, int col) {
  return (static_cast<std::int64_t>(row) * m.pitch + col) * m.batch;
}

// Cuts a box of pixels into pieces of up to kStage that follow each other in the lanes: rows where they are whole, or parts
// of one. fn(row, rows, col, cols).
template <class Fn>
void staged(const LaneMap& m, const Range& rows, const Range& cols, const Fn& fn) {
  const int tall = cols.size() == m.pitch ? kStage / std::clamp(m.pitch, 1, kStage) : 1;
  for (int row = rows.lo; row < rows.hi; row += tall)
    for (int col = cols.lo; col < cols.hi; col += kStage)
      fn(row, std::min(tall, rows.hi - row), col, std::min(kStage, cols.hi - col));
}

void load_batch(const IsaKernels& isa, const TensorView& x, const LaneMap& m, const Inside& in, int c_first,
                int count, float* lanes) {
  if (in.cols.size() == 0 || in.rows.size() == 0) return;
  const std::int64_t images = x.stride[0];
  if (channels_contiguous(x, m, in)) {
    const std::int64_t n = static_cast<std::int64_t>(count) * m.tensor_h * m.tensor_w;
    return isa.load_transposed(lanes, m.batch, x.at(m.n0, c_first, 0, 0), x.dtype, images, m.images, n,
                               x.pair);
  }
  if (rows_contiguous(x, m, in)) {
    const std::int64_t run = static_cast<std::int64_t>(in.rows.size()) * m.tensor_w;
    for (int c = 0; c < count; ++c) {
      // Each channel is a short run in every image: too short for the hardware to see sixteen streams coming.
      if (c + 1 < count)
        for (int image = 0; image < m.images; ++image)
          prefetch(element(x, m, image, c_first + c + 1, in.rows.lo, 0),
                   run * static_cast<std::int64_t>(size_of(x.dtype)));
      isa.load_transposed(lanes + c * m.c_stride + static_cast<std::int64_t>(in.rows.lo) * m.pitch * m.batch,
                          m.batch, element(x, m, 0, c_first + c, in.rows.lo, 0), x.dtype, images, m.images,
                          run, x.pair);
    }
    return;
  }
  if (x.stride[1] == 1 && count > 1) {
    for (int row = in.rows.lo; row < in.rows.hi; ++row)
      for (int col = in.cols.lo; col < in.cols.hi; ++col)
        isa.load_transposed(lanes + batch_pixel(m, row, col), m.c_stride, element(x, m, 0, c_first, row, col),
                            x.dtype, images, m.images, count, x.pair);
    return;
  }
  const std::int64_t row_step = m.step_h * x.stride[2], step = m.step_w * x.stride[3];
  const std::int64_t span = std::abs(row_step) * in.rows.size() * static_cast<std::int64_t>(size_of(x.dtype));
  float stage[64 * kStage];
  for (int c = 0; c < count; ++c) {
    if (c + 1 < count && span <= kNear)
      for (int image = 0; image < m.images; ++image)
        prefetch(element(x, m, image, c_first + c + 1, in.rows.lo, 0), span);
    staged(m, in.rows, in.cols, [&](int row, int rows, int col, int cols) {
      for (int image = 0; image < m.images; ++image)
        isa.load_rows(stage + image * kStage, cols, element(x, m, image, c_first + c, row, col), x.dtype,
                      row_step, step, rows, 0, cols, 0, x.pair);
      float* const at = lanes + c * m.c_stride + batch_pixel(m, row, col);
      isa.load_transposed(at, m.batch, stage, DType::f32, kStage, m.images, rows * cols, kUnpaired);
    });
  }
}

void store_batch(const IsaKernels& isa, const TensorView& y, const LaneMap& m, const Inside& in, int c_first,
                 int count, const float* lanes) {
  const std::int64_t images = y.stride[0];
  if (channels_contiguous(y, m, in)) {
    const std::int64_t n = static_cast<std::int64_t>(count) * m.tensor_h * m.tensor_w;
    return isa.store_transposed(y.at(m.n0, c_first, 0, 0), y.dtype, images, lanes, m.batch, n, m.images);
  }
  if (rows_contiguous(y, m, in)) {
    for (int c = 0; c < count; ++c)
      isa.store_transposed(element(y, m, 0, c_first + c, 0, 0), y.dtype, images, lanes + c * m.c_stride,
                           m.batch, static_cast<std::int64_t>(m.rows) * m.tensor_w, m.images);
    return;
  }
  if (y.stride[1] == 1 && count > 1) {
    for (int row = 0; row < m.rows; ++row)
      for (int col = 0; col < m.cols; ++col)
        isa.store_transposed(element(y, m, 0, c_first, row, col), y.dtype, images,
                             lanes + batch_pixel(m, row, col), m.c_stride, count, m.images);
    return;
  }
  float stage[64 * kStage];
  for (int c = 0; c < count; ++c)
    staged(m, {0, m.rows}, {0, m.cols}, [&](int row, int rows, int col, int cols) {
      isa.store_transposed(stage, DType::f32, kStage, lanes + c * m.c_stride + batch_pixel(m, row, col),
                           m.batch, rows * cols, m.images);
      for (int image = 0; image < m.images; ++image)
        isa.store_rows(element(y, m, image, c_first + c, row, col), y.dtype, m.step_h * y.stride[2],
                       m.step_w * y.stride[3], stage + image * kStage, cols, rows, cols);
    });
}

}  // namespace

void load_lanes(const IsaKernels& isa, const TensorView& x, const LaneMap& m, int c_first, int count,
                float* lanes) {
  const Inside in(m);
  if (m.batch > 1) {
    if (m.images < m.batch) std::memset(lanes, 0, sizeof(float) * count * m.c_stride);
    return load_batch(isa, x, m, in, c_first, count, lanes);
  }
  const std::int64_t step = m.step_w * x.stride[3];
  const int before = in.cols.lo, cols = in.cols.size(), after = m.pitch - in.cols.hi;
  const bool transposed = x.stride[1] == 1 && step != 1 && count > 1;  // channels_last: pixels x channels
  for (int image = 0; image < m.images; ++image) {
    for (int c = 0; c < count; ++c) zero_rows(m, in, lane_row(m, lanes, c, image, 0));
    if (cols == 0) continue;
    if (!transposed) {
      for (int c = 0; c < count; ++c)
        isa.load_rows(lane_row(m, lanes, c, image, in.rows.lo), m.pitch,
                      element(x, m, image, c_first + c, in.rows.lo, before), x.dtype, m.step_h * x.stride[2],
                      step, in.rows.size(), before, cols, after, x.pair);
      continue;
    }
    for (int row = in.rows.lo; row < in.rows.hi; ++row) {
      float* const at = lane_row(m, lanes, 0, image, row);
      for (int c = 0; c < count; ++c) {
        std::fill(at + c * m.c_stride, at + c * m.c_stride + before, 0.f);
        std::fill(at + c * m.c_stride + in.cols.hi, at + c * m.c_stride + m.pitch, 0.f);
      }
      isa.load_transposed(at + before, m.c_stride, element(x, m, image, c_first, row, before), x.dtype, step,
                          cols, count, x.pair);
    }
  }
}

void store_lanes(const IsaKernels& isa, const TensorView& y, const LaneMap& m, int c_first, int count,
                 const float* lanes) {
  const Inside in(m);
  if (m.batch > 1) return store_batch(isa, y, m, in, c_first, count, lanes);
  const std::int64_t step = m.step_w * y.stride[3];
  const bool transposed = y.stride[1] == 1 && step != 1 && count > 1;
  float* const from = const_cast<float*>(lanes);
  if (in.cols.size() == 0) return;
  for (int image = 0; image < m.images; ++image) {
    for (int row = in.rows.lo; transposed && row < in.rows.hi; ++row)
      isa.store_transposed(element(y, m, image, c_first, row, in.cols.lo), y.dtype, step,
                           lane_row(m, from, 0, image, row) + in.cols.lo, m.c_stride, count, in.cols.size());
    for (int c = 0; !transposed && c < count; ++c)
      isa.store_rows(element(y, m, image, c_first + c, in.rows.lo, in.cols.lo), y.dtype,
                     m.step_h * y.stride[2], step, lane_row(m, from, c, image, in.rows.lo) + in.cols.lo,
                     m.pitch, in.rows.size(), in.cols.size());
  }
}

void load_pixel_major(const IsaKernels& isa, const TensorView& t, int n, int channels, Range rows, int width,
                      std::int64_t ld, float* dst) {
  if (rows.size() == 0 || width == 0) return;
  if (t.stride[1] == 1) {
    for (int h = rows.lo; h < rows.hi; ++h)
      for (int w = 0; w < width; ++w, dst += ld) isa.load_row(dst, t.at(n, 0, h, w), t.dtype, 1, channels);
  } else if (t.stride[3] == 1 && t.stride[2] == width) {
    isa.load_transposed(dst, ld, t.at(n, 0, rows.lo, 0), t.dtype, t.stride[1], channels,
                        static_cast<std::int64_t>(rows.size()) * width, kUnpaired);
  } else {
    for (int h = rows.lo; h < rows.hi; ++h)
      for (int w = 0; w < width; ++w, dst += ld)
        isa.load_row(dst, t.at(n, 0, h, w), t.dtype, t.stride[1], channels);
  }
}

void finish_lanes(const IsaKernels& isa, const Epilogue& e, const LaneMap& m, int c_first, int count,
                  float* lanes, float* strip) {
  if (e.empty()) return;
  const auto scale = [&](int c) { return e.scale ? e.scale[c] : 1.f; };
  const auto shift = [&](int c) { return e.shift ? e.shift[c] : 0.f; };
  const std::int64_t n = static_cast<std::int64_t>(m.rows) * m.pitch * (m.batch > 1 ? m.batch : m.images);
  if (!e.residual.data) {
    for (int c = 0; c < count; ++c)
      isa.finish_row(lanes + c * m.c_stride, n, scale(c_first + c), shift(c_first + c), nullptr,
                     e.activation);
    return;
  }
  const TensorView& r = e.residual;
  if (m.batch == 1 && m.images == 1 && r.dtype == DType::f32 && r.stride[3] == 1 && r.stride[2] == m.pitch &&
      m.step_h == 1 && m.step_w == 1) {  // it lies as the lanes do; what follows its last pixel is not read
    for (int c = 0; c < count; ++c)
      isa.finish_row(lanes + c * m.c_stride, n - m.pitch + m.cols, scale(c_first + c), shift(c_first + c),
                     reinterpret_cast<const float*>(element(r, m, 0, c_first + c, 0, 0)), e.activation);
    return;
  }
  for (int c0 = 0; c0 < count; c0 += kFinishStrip) {
    const int here = std::min(kFinishStrip, count - c0);
    load_lanes(isa, e.residual, m, c_first + c0, here, strip);
    for (int c = 0; c < here; ++c)
      isa.finish_row(lanes + (c0 + c) * m.c_stride, n, scale(c_first + c0 + c), shift(c_first + c0 + c),
                     strip + c * m.c_stride, e.activation);
  }
}

}  // namespace sk
