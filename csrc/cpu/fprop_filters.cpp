#include "cpu/fprop_filters.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace sk {
namespace {

// Where turning NCHW once pays: 512 channels on 7x7 in 80 % of the time, 256 on 14x14 in 92 %; on 4x4 maps a cache line holds
// a channel's pixels, and nothing is gained.
constexpr int kManyChannels = 128, kManyPixels = 36;

// Pixels and vectors of filters a tile holds: what covers all of them in the fewest tiles; of equals, the one with more pixels,
// which reads fewer weights.
void choose_tile(const IsaKernels& isa, int pixels, int vectors, int& tile_pixels, int& tile_vectors) {
  int fewest = std::numeric_limits<int>::max();
  for (int f = kMaxTileFilters; f >= 1; --f) {
    const int v = std::max(1, std::min(vectors, isa.tile_vectors[f]));
    const int tiles = ceil_div(pixels, f) * ceil_div(vectors, v);
    if (tiles < fewest) fewest = tiles, tile_pixels = f, tile_vectors = v;
  }
}

}  // namespace

FpropFilters::FpropFilters(const ConvShape& shape, Stripes stripes, int images, int filter_parts,
                           const IsaKernels& isa)
    : shape_(shape),
      stripes_(std::move(stripes)),
      isa_(isa),
      lattice_(fprop_lattice(shape, stripes_.live_taps(), PlanePer::tap)),
      images_(std::max(1, std::min(images, shape.N))),
      part_count_(std::max(1, filter_parts)) {
  if (images_ * pixel_floats() * shape.H * shape.W > std::numeric_limits<std::int32_t>::max())
    throw std::length_error("filter lanes: a block's input exceeds 2^31 values");
  for (int g = 0; g < shape.groups; ++g)
    for (const Part& p : balanced_parts(g, stripes_.work(g, shape.group_k(), shape.group_c()), part_count_))
      parts_.push_back(p);
  for (const Part& p : parts_)
    for (const TapAccess& t : lattice_.taps) {
      const auto [lo, hi] = stripes_.within(p.group, t.tap, p.begin, p.end);
      const int vectors = (hi - lo + isa.lanes - 1) / isa.lanes;
      TapFilters tap{packed_floats_,         vectors, lo, hi, lattice_.valid_rows(t),
                     lattice_.valid_cols(t), 1,       1,  t};
      if (!spans())
        choose_tile(isa, tap.rows.size() * tap.cols.size() * images_, vectors, tap.tile_pixels,
                    tap.tile_vectors);
      taps_.push_back(tap);
      packed_floats_ += static_cast<std::int64_t>(vectors) * isa.lanes * shape.group_c();
    }
}

void FpropFilters::pack_weight(const void* weight, DType type, float* packed) const {
  const std::int64_t c = shape_.group_c(), bytes = static_cast<std::int64_t>(size_of(type));
  std::vector<float> row(static_cast<std::size_t>(c));
  std::fill(packed, packed + packed_floats_, 0.f);
  for (const TapFilters& t : taps_)
    each_tile(t.vectors, t.tile_vectors, [&](int at, int vectors) {
      const int lanes = vectors * isa_.lanes, first = t.first + at * isa_.lanes;
      float* const tile = packed + t.weight + at * isa_.lanes * c;
      for (int i = first; i < std::min(first + lanes, t.last); ++i) {
        isa_.load_row(row.data(), static_cast<const char*>(weight) + stripes_.row[i] * c * bytes, type, 1, c);
        for (std::int64_t j = 0; j < c; ++j) tile[j * lanes + i - first] = row[j];
      }
    });
}

// sums[(image * P + p) * Q + q][filter of the part] over every tap.
void FpropFilters::compute(const Part& part, const TapFilters* taps, int n0, int images, const TensorView& x,
                           const float* packed, std::int32_t* places, float* sums) const {
  const ConvShape& s = shape_;
  const int filters = part.end - part.begin;
  const int chain = channel_chain(s);
  alignas(64) float tile[kMaxTileFilters * kMaxTileVectors * 16];
  std::int32_t* const source = places;  // where a pixel is read in x
  std::int32_t* const target = places + static_cast<std::int64_t>(images_) * s.P * s.Q;  // its row of sums
  const float* const a =
      static_cast<const float*>(x.data) + n0 * x.stride[0] + part.group * s.group_c() * x.stride[1];
  for (const TapFilters* t = taps; t != taps + lattice_.taps.size(); ++t) {
    if (t->first == t->last) continue;
    const Plane& plane = lattice_.planes[t->access.plane];
    const int row0 = t->access.dr * lattice_.step_h + plane.row0,
              col0 = t->access.ds * lattice_.step_w + plane.col0;
    int pixels = 0;
    for (int image = 0; image < images; ++image)
      for (int row = t->rows.lo; row < t->rows.hi; ++row)
        for (int col = t->cols.lo; col < t->cols.hi; ++col) {
          source[pixels] =
              static_cast<std::int32_t>(image * x.stride[0] + (row * lattice_.step_h + row0) * x.stride[2] +
                                        (col * lattice_.step_w + col0) * x.stride[3]);
          target[pixels++] = (image * s.P + row) * s.Q + col;
        }
    if (pixels == 0) continue;  // the tap never meets the image
    const auto scatter = [&](int pixel, const float* row, const std::int32_t* filter, int live) {
      float* const out = sums + static_cast<std::int64_t>(target[pixel]) * filters - part.begin;
      for (int j = 0; j < live; ++j) out[filter[j]] += row[j];
    };
    each_tile(t->vectors, t->tile_vectors, [&](int at, int vectors) {
      const int lanes = vectors * isa_.lanes;
      const float* const b = packed + t->weight + static_cast<std::int64_t>(at) * isa_.lanes * s.group_c();
      const std::int32_t* const filter = &stripes_.filter[t->first + at * isa_.lanes];
      const int live = std::min(lanes, t->last - t->first - at * isa_.lanes);
      if (spans()) {
        const int first = source[0], span = source[pixels - 1] + 1 - first;
        isa_.span[span](s.group_c(), chain, a + first, x.stride[1], b, tile);
        for (int i = 0; i < pixels; ++i) scatter(i, tile + (source[i] - first) * lanes, filter, live);
        return;
      }
      const std::int64_t bytes = std::int64_t(4) * lanes * s.group_c();
      const char* const next =
          reinterpret_cast<const char*>(b) + bytes;  // tile, of this tap or the one after it
      split_evenly(pixels, t->tile_pixels, [&](int begin, int end) {
        const int count = end - begin;
        // Weights that come from memory arrive while the pixels of the tile before are computed. With one pass over the
        // pixels memory never rests, and the hardware alone is faster.
        Fetch fetch{next, 0};
        if (count < pixels) fetch = {next + bytes * begin / pixels, bytes * count / pixels};
        isa_.stream[count][vectors](s.group_c(), chain, a, x.stride[1], source + begin, b, tile, lanes,
                                    fetch);
        for (int f = 0; f < count; ++f) scatter(begin + f, tile + f * lanes, filter, live);
      });
    });
  }
}

void FpropFilters::run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e,
                       int threads) const {
  const ConvShape& s = shape_;
  const auto padded = [](std::int64_t n) { return (n + 15) / 16 * 16 + 16; };
  const std::int64_t pixels = static_cast<std::int64_t>(images_) * s.P * s.Q;
  int widest = 0;
  for (const Part& p : parts_) widest = std::max(widest, p.end - p.begin);
  const std::int64_t part_floats = padded(pixels * widest);
  // Halves are widened once; float32 is read where it lies, unless its strides are too far for a tile's 32-bit offsets, or
  // every channel of a pixel is another cache line and those of a tile's pixels do not stay in L1.
  const std::int64_t reach =
      images_ * std::abs(x.stride[0]) + s.H * std::abs(x.stride[2]) + s.W * std::abs(x.stride[3]);
  const bool apart = x.stride[1] != 1 && s.group_c() >= kManyChannels && s.P * s.Q >= kManyPixels;
  const bool dense = x.stride[3] == 1 && x.stride[2] == s.W;
  const bool copy =
      x.dtype != DType::f32 || (spans() ? !dense : apart) || reach > std::numeric_limits<std::int32_t>::max();
  const std::int64_t image_floats = pixel_floats() * s.H * s.W, x_floats = copy ? s.N * image_floats : 0;
  const std::int64_t strip_floats = e.residual.data ? padded(pixels * kFinishStrip) : 0;
  const std::int64_t each = 2 * part_floats + strip_floats + padded(2 * pixels);
  float* const memory = scratch(static_cast<std::size_t>(padded(x_floats) + threads * each));

  TensorView source = x;
  if (x_floats) {
    source.data = memory, source.dtype = DType::f32;
    source.stride[0] = image_floats, source.stride[1] = spans() ? s.H * s.W : 1;
    source.stride[2] = spans() ? s.W : pixel_floats() * s.W, source.stride[3] = spans() ? 1 : pixel_floats();
  }
  LaneMap map;
  map.rows = s.P, map.cols = map.pitch = s.Q, map.tensor_h = s.P, map.tensor_w = s.Q;
  const int image_blocks = ceil_div(s.N, images_), tasks = image_blocks * static_cast<int>(parts_.size());
  Tasks all;

  run_team(threads, [&](const Team& team) {
    if (!copy && dense && (s.N == 1 || x.stride[0] == s.C * x.stride[1]))
      fetch_from_others(team, static_cast<const float*>(x.data), s.N * s.C, s.H * s.W, x.stride[1]);
    if (x_floats && spans()) {
      LaneMap m;
      m.rows = m.tensor_h = s.H, m.cols = m.pitch = m.tensor_w = s.W, m.c_stride = source.stride[1];
      const int begin = static_cast<int>(team.begin(s.C)), end = static_cast<int>(team.end(s.C));
      for (m.n0 = 0; m.n0 < s.N; ++m.n0)
        load_lanes(isa_, x, m, begin, end - begin, memory + m.n0 * image_floats + begin * m.c_stride);
      team.barrier();
    } else if (x_floats) {
      const Range rows = {static_cast<int>(team.begin(s.H)), static_cast<int>(team.end(s.H))};
      for (int n = 0; n < s.N; ++n)
        load_pixel_major(isa_, x, n, s.C, rows, s.W, pixel_floats(),
                         memory + n * image_floats + rows.lo * pixel_floats() * s.W);
      team.barrier();
    }
    float* const sums = memory + padded(x_floats) + team.thread * each;
    float* const turned = sums + part_floats;
    auto* const places = reinterpret_cast<std::int32_t*>(turned + part_floats + strip_floats);
    all.each(team, tasks, [&](int task) {
      const int index = task % static_cast<int>(parts_.size());
      const Part& part = parts_[index];
      const int filters = part.end - part.begin;
      LaneMap m = map;
      m.n0 = task / static_cast<int>(parts_.size()) * images_, m.images = std::min(images_, s.N - m.n0);
      const std::int64_t here = static_cast<std::int64_t>(m.images) * s.P * s.Q;
      std::fill(sums, sums + here * filters, 0.f);
      compute(part, taps_.data() + index * lattice_.taps.size(), m.n0, m.images, source, packed, places,
              sums);
      isa_.load_transposed(turned, here, sums, DType::f32, filters, here, filters, kUnpaired);
      m.c_stride = here;
      finish_lanes(isa_, e, m, part.group * s.group_k() + part.begin, filters, turned, turned + part_floats);
      store_lanes(isa_, y, m, part.group * s.group_k() + part.begin, filters, turned);
    });
  });
}

}  // namespace sk
