#include "cpu/wgrad.h"

#include <algorithm>
#include <cstring>

#include "cpu/driver.h"
#include "cpu/lanes.h"
#include "cpu/lattice.h"
#include "cpu/parallel.h"

namespace sk {
namespace {
// Rows that are turned into pixel-major form together: single ones of a small map would leave most of a vector empty.
int rows_at_once(int width) { return std::max(1, 128 / std::max(1, width)); }
}  // namespace

struct Wgrad::Pixels {
  float *x, *dy;  // [image][in row][W][x_ld], [image][out row][Q][dy_ld]
  std::int64_t x_ld, dy_ld;
  int images, in_row0, in_rows, p0, p1;
};

Wgrad::Wgrad(const ConvShape& shape, Stripes stripes, int chunk_pixels, const IsaKernels& isa)
    : shape_(shape), stripes_(std::move(stripes)), isa_(isa) {
  const int map = shape.P * shape.Q;
  if (map >= chunk_pixels)
    chunk_ = {1, std::clamp(chunk_pixels / std::max(1, shape.Q), 1, std::max(1, shape.P))};
  else
    chunk_ = {std::clamp(chunk_pixels / std::max(1, map), 1, std::max(1, shape.N)), std::max(1, shape.P)};
  for (int g = 0; g < shape.groups; ++g)
    for (int t = 0; t < stripes_.taps; ++t) {
      const int begin = stripes_.begin(g, t);
      // With one or two vectors of channels a full tile, with more three quarters of one: F * V fills the registers.
      const int vectors = (shape.group_c() + isa.lanes - 1) / isa.lanes;
      const int most = vectors >= 4 ? std::max(1, isa.tile_filters * 3 / 4) : isa.tile_filters;
      split_evenly(stripes_.end(g, t) - begin, most,
                   [&](int a, int b) { tasks_.push_back({g, t, begin + a, b - a}); });
    }
}

void Wgrad::compute(const Task& task, const Pixels& px, float* tile) const {
  const ConvShape& s = shape_;
  if (task.filters < 1) __builtin_unreachable();  // no task is empty, which clang-tidy cannot see
  const std::int64_t ld = padded(s.group_c());
  std::fill(tile, tile + task.filters * ld, 0.f);
  const int r = task.tap / s.S, c = task.tap % s.S;
  const int off_h = r * s.dil_h - s.pad_top, off_w = c * s.dil_w - s.pad_left;
  // Output rows and columns whose input lies inside the image.
  const Range p =
      intersect({ceil_div(-off_h, s.stride_h), floor_div(s.H - 1 - off_h, s.stride_h) + 1}, {px.p0, px.p1});
  const Range q =
      intersect({ceil_div(-off_w, s.stride_w), floor_div(s.W - 1 - off_w, s.stride_w) + 1}, {0, s.Q});
  if (p.size() == 0 || q.size() == 0) return;
  BoxSteps box;
  box.count[0] = px.images, box.count[1] = p.size(), box.count[2] = q.size();
  // A short sum can afford stretches whose own errors are as small as those of joining them; one whose products are
  // rounded too needs them.
  const std::int64_t steps = box.count[0] * box.count[1] * box.count[2];
  box.stretch = steps <= 96 || !isa_.fused ? 8 : kStretch;
  box.a[2] = px.dy_ld, box.a[1] = px.dy_ld * s.Q, box.a[0] = box.a[1] * (px.p1 - px.p0);
  box.b[2] = px.x_ld * s.stride_w, box.b[1] = px.x_ld * s.W * s.stride_h,
  box.b[0] = px.x_ld * s.W * px.in_rows;
  const float* const a = px.dy + (p.lo - px.p0) * box.a[1] + q.lo * box.a[2];
  const float* const b =
      px.x + (static_cast<std::int64_t>(p.lo) * s.stride_h + off_h - px.in_row0) * s.W * px.x_ld +
      (static_cast<std::int64_t>(q.lo) * s.stride_w + off_w) * px.x_ld + task.group * s.group_c();
  std::int32_t filters[kMaxTileFilters];
  for (int f = 0; f < task.filters; ++f)
    filters[f] = task.group * s.group_k() + stripes_.filter[task.first + f];
  each_tile(static_cast<int>(ld / isa_.lanes), isa_.tile_vectors[task.filters], [&](int at, int vectors) {
    isa_.box[task.filters][vectors](box, a, filters, b + at * isa_.lanes, tile + at * isa_.lanes, ld);
  });
}

void Wgrad::store(void* dw, DType type, int stripe, const float* row) const {
  const std::int64_t bytes = shape_.group_c() * static_cast<std::int64_t>(size_of(type));
  isa_.store_row(static_cast<char*>(dw) + stripes_.row[stripe] * bytes, type, 1, row, shape_.group_c());
}

void Wgrad::run(const TensorView& x, const TensorView& dy, void* dw, DType type, int threads) const {
  const ConvShape& s = shape_;
  const int reach = (s.R - 1) * s.dil_h + 1;
  const int in_rows_most = std::min(s.H, (chunk_.rows - 1) * s.stride_h + reach);
  Pixels px;
  // One odd line apart from a power of two, or neighbouring pixels fall into the same cache sets.
  px.x_ld = padded(s.C) + 16, px.dy_ld = s.K + (s.K % 32 == 0 ? 16 : 0);
  const std::int64_t x_floats =
      padded(px.x_ld * s.W * in_rows_most * chunk_.images + 2 * kMaxTileVectors * isa_.lanes);
  const std::int64_t dy_floats = padded(px.dy_ld * s.Q * chunk_.rows * chunk_.images);
  const std::int64_t ld = padded(s.group_c()), a = stripes_.count();
  threads = std::max(1, threads);
  const int image_chunks = ceil_div(s.N, chunk_.images),
            row_chunks = s.Q == 0 ? 0 : ceil_div(s.P, chunk_.rows);
  const bool whole = image_chunks * row_chunks == 1;           // then no sums meet: a tile is stored as it is
  const std::int64_t tile_floats = kMaxTileFilters * ld + 16;  // a thread's
  const std::int64_t sum_floats = whole ? 0 : (2 * a * ld + 15) / 16 * 16;
  float* const memory =
      scratch(static_cast<std::size_t>(sum_floats + threads * tile_floats + x_floats + dy_floats));
  double* const sums = reinterpret_cast<double*>(memory);
  float* const tiles = memory + sum_floats;
  px.x = tiles + threads * tile_floats, px.dy = px.x + x_floats;
  const int tasks = static_cast<int>(tasks_.size());
  Tasks all[2];

  const auto turn = [&](const TensorView& t, int image, int channels, Range rows, int part, int width,
                        std::int64_t ld, float* to) {
    const int first = rows.lo + part * rows_at_once(width);
    load_pixel_major(isa_, t, image, channels, {first, std::min(first + rows_at_once(width), rows.hi)}, width,
                     ld, to + static_cast<std::int64_t>(first - rows.lo) * width * ld);
  };
  run_team(threads, [&](const Team& team) {
    Pixels mine = px;
    float* const tile = tiles + team.thread * tile_floats;
    if (!whole) std::fill(sums + team.begin(a) * ld, sums + team.end(a) * ld, 0.);
    for (int chunk = 0; chunk < image_chunks * row_chunks; ++chunk) {
      const int n0 = chunk / row_chunks * chunk_.images;
      mine.images = std::min(chunk_.images, s.N - n0);
      mine.p0 = chunk % row_chunks * chunk_.rows, mine.p1 = std::min(s.P, mine.p0 + chunk_.rows);
      const Range in = intersect(
          {mine.p0 * s.stride_h - s.pad_top, (mine.p1 - 1) * s.stride_h - s.pad_top + reach}, {0, s.H});
      mine.in_row0 = in.lo, mine.in_rows = in.size();
      // Both copies, dealt out to the team in a few rows each.
      const Range out{mine.p0, mine.p1};
      const int x_parts = ceil_div(in.size(), rows_at_once(s.W)),
                dy_parts = ceil_div(out.size(), rows_at_once(s.Q));
      const int each = std::max(1, x_parts + dy_parts), parts = mine.images * each;  // dy has one at least
      for (int i = static_cast<int>(team.begin(parts)); i < team.end(parts); ++i) {
        const int image = i / each, part = i % each;
        if (part < x_parts)
          turn(x, n0 + image, s.C, in, part, s.W, px.x_ld,
               px.x + static_cast<std::int64_t>(image) * in.size() * s.W * px.x_ld);
        else
          turn(dy, n0 + image, s.K, out, part - x_parts, s.Q, px.dy_ld,
               px.dy + static_cast<std::int64_t>(image) * out.size() * s.Q * px.dy_ld);
      }
      if (team.thread == 0) all[(chunk + 1) % 2].reset();
      team.barrier();
      all[chunk % 2].each(team, tasks, [&](int t) {
        const Task& task = tasks_[t];
        compute(task, mine, tile);
        if (!whole) isa_.add_wide(sums + task.first * ld, tile, task.filters * ld);
        for (int f = 0; whole && f < task.filters; ++f) store(dw, type, task.first + f, tile + f * ld);
      });
      team.barrier();
    }
    if (whole) return;
    for (std::int64_t i = team.begin(a); i < team.end(a); ++i) {
      std::copy(sums + i * ld, sums + i * ld + s.group_c(), tile);
      store(dw, type, static_cast<int>(i), tile);
    }
  });
}

}  // namespace sk
