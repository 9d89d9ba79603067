#include "cpu/wgrad.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cpu/driver.h"
#include "cpu/lanes.h"
#include "cpu/lattice.h"
#include "cpu/parallel.h"
#include "cpu/planes.h"

namespace sk {
namespace {
// Rows that are turned into pixel-major form together: single ones of a small map would leave most of a vector empty.
int rows_at_once(int width) { return std::max(1, 128 / std::max(1, width)); }
constexpr int kCopiedFilters = 16;
}  // namespace

struct Wgrad::Pixels {
  float *x, *dy;  // [image][in row][W][x_ld], [K][dy_ld]: [image][out row][Q]
  int images, in_row0, in_rows, p0, p1;
};

Wgrad::Wgrad(const ConvShape& shape, Stripes stripes, int chunk_pixels, const IsaKernels& isa)
    : shape_(shape), stripes_(std::move(stripes)), isa_(isa) {
  const int map = shape.P * shape.Q;
  if (map >= chunk_pixels) {  // chunks as even as possible, as near to chunk_pixels: 14 x 14 is one
    const int chunks = std::max(1, (map + chunk_pixels / 2) / chunk_pixels);
    chunk_ = {1, std::max(1, ceil_div(shape.P, chunks))};
  } else {
    chunk_ = {std::clamp(chunk_pixels / std::max(1, map), 1, std::max(1, shape.N)), std::max(1, shape.P)};
  }
  in_rows_ = std::min(shape.H, (chunk_.rows - 1) * shape.stride_h + (shape.R - 1) * shape.dil_h + 1);
  // One odd line apart from a power of two, or neighbouring pixels fall into the same cache sets.
  x_ld_ = padded(shape.C) + 16;
  dy_ld_ = spread(static_cast<std::int64_t>(chunk_.images) * chunk_.rows * shape.Q);
  if (std::max(x_ld_ * chunk_.images * in_rows_ * shape.W, dy_ld_ * shape.K) >
      std::numeric_limits<std::int32_t>::max())
    throw std::length_error("wgrad: a chunk's pixels exceed 2^31 floats");
  // Torch joins its sums, of a row at most, in one long sum: where ours has many chunks, one of them may be as long.
  const std::int64_t chunks =
      static_cast<std::int64_t>(ceil_div(shape.N, chunk_.images)) * ceil_div(shape.P, chunk_.rows);
  whole_sums_ = isa.fused && chunks >= 24;
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

std::int64_t Wgrad::list_steps(int tap, const Pixels& px, IndexedStep* steps) const {
  const ConvShape& s = shape_;
  const int off_h = tap / s.S * s.dil_h - s.pad_top, off_w = tap % s.S * s.dil_w - s.pad_left;
  // Output rows and columns whose input lies inside the image.
  const Range p =
      intersect({ceil_div(-off_h, s.stride_h), floor_div(s.H - 1 - off_h, s.stride_h) + 1}, {px.p0, px.p1});
  const Range q =
      intersect({ceil_div(-off_w, s.stride_w), floor_div(s.W - 1 - off_w, s.stride_w) + 1}, {0, s.Q});
  std::int64_t n = 0;
  for (int image = 0; image < px.images; ++image)
    for (int i = p.lo; i < p.hi; ++i) {
      const std::int64_t in_row =
          static_cast<std::int64_t>(image) * px.in_rows + i * s.stride_h + off_h - px.in_row0;
      std::int64_t x = (in_row * s.W + static_cast<std::int64_t>(q.lo) * s.stride_w + off_w) * x_ld_;
      int dy = (image * (px.p1 - px.p0) + i - px.p0) * s.Q + q.lo;
      for (int j = q.lo; j < q.hi; ++j, ++dy, x += x_ld_ * s.stride_w)
        steps[n++] = {static_cast<std::int32_t>(x), dy};
    }
  return n;
}

void Wgrad::compute(const Task& task, const Pixels& px, const IndexedStep* steps, std::int64_t n,
                    float* tile) const {
  if (task.filters < 1) __builtin_unreachable();  // no task is empty, which clang-tidy cannot see
  const std::int64_t ld = padded(shape_.group_c());
  // A short sum can afford stretches whose own errors are as small as those of joining them; one whose products are
  // rounded too needs them.
  const std::int64_t stretch = n <= 96 || !isa_.fused ? 8 : whole_sums_ ? n : kStretch;
  const float* const b = px.x + task.group * shape_.group_c();
  std::int32_t filters[kMaxTileFilters];
  for (int f = 0; f < task.filters; ++f)
    filters[f] =
        static_cast<std::int32_t>((task.group * shape_.group_k() + stripes_.filter[task.first + f]) * dy_ld_);
  each_tile(static_cast<int>(ld / isa_.lanes), isa_.tile_vectors[task.filters], [&](int at, int vectors) {
    isa_.listed[task.filters][vectors](n, stretch, px.dy, filters, b + at * isa_.lanes, steps,
                                       tile + at * isa_.lanes, ld);
  });
}

void Wgrad::store(void* dw, DType type, int stripe, const float* row) const {
  const std::int64_t bytes = shape_.group_c() * static_cast<std::int64_t>(size_of(type));
  isa_.store_row(static_cast<char*>(dw) + stripes_.row[stripe] * bytes, type, 1, row, shape_.group_c());
}

void Wgrad::run(const TensorView& x, const TensorView& dy, void* dw, DType type, int threads) const {
  const ConvShape& s = shape_;
  const int reach = (s.R - 1) * s.dil_h + 1;
  Pixels px;
  const std::int64_t x_floats =
      padded(x_ld_ * s.W * in_rows_ * chunk_.images + 2 * kMaxTileVectors * isa_.lanes);
  const std::int64_t dy_floats = dy_ld_ * s.K;
  const std::int64_t ld = padded(s.group_c()), a = stripes_.count();
  threads = std::max(1, threads);
  const int image_chunks = ceil_div(s.N, chunk_.images),
            row_chunks = s.Q == 0 ? 0 : ceil_div(s.P, chunk_.rows);
  const bool whole = image_chunks * row_chunks == 1;  // then no sums meet: a tile is stored as it is
  // A thread's: a tile and a list of steps.
  const std::int64_t list_floats = padded(2 * static_cast<std::int64_t>(chunk_.images) * chunk_.rows * s.Q);
  const std::int64_t tile_floats = kMaxTileFilters * ld + list_floats + 16;
  const std::int64_t sum_floats = whole ? 0 : (2 * a * ld + 15) / 16 * 16;
  float* const memory =
      scratch(static_cast<std::size_t>(sum_floats + threads * tile_floats + x_floats + dy_floats));
  double* const sums = reinterpret_cast<double*>(memory);
  float* const tiles = memory + sum_floats;
  px.x = tiles + threads * tile_floats, px.dy = px.x + x_floats;
  const int tasks = static_cast<int>(tasks_.size());
  Tasks all[2];

  const auto turn = [&](int image, Range rows, int part, float* to) {
    const int first = rows.lo + part * rows_at_once(s.W);
    load_pixel_major(isa_, x, image, s.C, {first, std::min(first + rows_at_once(s.W), rows.hi)}, s.W, x_ld_,
                     to + static_cast<std::int64_t>(first - rows.lo) * s.W * x_ld_);
  };
  run_team(threads, [&](const Team& team) {
    Pixels mine = px;
    float* const tile = tiles + team.thread * tile_floats;
    IndexedStep* const steps = reinterpret_cast<IndexedStep*>(tile + kMaxTileFilters * ld);
    if (!whole) std::fill(sums + team.begin(a) * ld, sums + team.end(a) * ld, 0.);
    for (int chunk = 0; chunk < image_chunks * row_chunks; ++chunk) {
      const int n0 = chunk / row_chunks * chunk_.images;
      mine.images = std::min(chunk_.images, s.N - n0);
      mine.p0 = chunk % row_chunks * chunk_.rows, mine.p1 = std::min(s.P, mine.p0 + chunk_.rows);
      const Range in = intersect(
          {mine.p0 * s.stride_h - s.pad_top, (mine.p1 - 1) * s.stride_h - s.pad_top + reach}, {0, s.H});
      mine.in_row0 = in.lo, mine.in_rows = in.size();
      // Both copies, dealt out to the team in a few rows or channels each.
      LaneMap out;
      out.n0 = n0, out.images = mine.images;
      out.first_row = mine.p0, out.rows = mine.p1 - mine.p0;
      out.cols = out.pitch = out.tensor_w = s.Q, out.tensor_h = s.P;
      out.c_stride = dy_ld_;
      const int x_parts = ceil_div(in.size(), rows_at_once(s.W)), turned = mine.images * x_parts;
      const int parts = turned + ceil_div(s.K, kCopiedFilters);
      for (int i = static_cast<int>(team.begin(parts)); i < team.end(parts); ++i) {
        if (i < turned) {
          const int image = i / x_parts;  // NOLINT(*-core.DivideZero): i < images * x_parts, so it is not 0
          turn(n0 + image, in, i % x_parts,
               px.x + static_cast<std::int64_t>(image) * in.size() * s.W * x_ld_);
        } else {
          const int first = (i - turned) * kCopiedFilters;
          load_lanes(isa_, dy, out, first, std::min(kCopiedFilters, s.K - first), px.dy + first * dy_ld_);
        }
      }
      if (team.thread == 0) all[(chunk + 1) % 2].reset();
      team.barrier();
      int listed = -1;
      std::int64_t n = 0;
      all[chunk % 2].each(team, tasks, [&](int t) {
        const Task& task = tasks_[t];
        if (task.tap != listed) n = list_steps(listed = task.tap, mine, steps);
        compute(task, mine, steps, n, tile);
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
