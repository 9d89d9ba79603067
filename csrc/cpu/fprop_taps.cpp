#include "cpu/fprop_taps.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "cpu/driver.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace sk {
namespace {

constexpr int kLongestSum = 48;      // products of a filter that meet in registers before they join y
constexpr int kWindowBytes = 30000;  // of the lanes all taps read for a window: L1
constexpr int kFewestVectors = 4;    // of a window: with less, multiply-adds wait for each other
constexpr int kPartners = 256;       // filters looked at for the best partner

// A filter's live taps, rising, and the bits of the same.
struct Filter {
  std::vector<int> taps, rows;
  std::vector<std::uint64_t> bits;
};

int common(const Filter& a, const Filter& b) {
  int n = 0;
  for (std::size_t i = 0; i < a.bits.size(); ++i) n += __builtin_popcountll(a.bits[i] & b.bits[i]);
  return n;
}

}  // namespace

FpropTaps::FpropTaps(const ConvShape& shape, Stripes stripes, int rows, const IsaKernels& isa)
    : shape_(shape),
      stripes_(std::move(stripes)),
      isa_(isa),
      rows_(std::clamp(rows, 1, std::max(1, shape.P))),
      row_blocks_(ceil_div(shape.P, rows_)) {
  lay_out_panel();
  for (int g = 0; g < shape_.groups; ++g) {
    pair_filters(g);
    pair_ptr_.push_back(static_cast<int>(pairs_.size()));
  }
}

void FpropTaps::lay_out_panel() {
  const ConvShape& s = shape_;
  const std::vector<bool> live = stripes_.live_taps();
  std::vector<int> plane_of(s.taps()), shift_of(s.taps());
  int taps = 0;
  const auto grow = [](Range& r, int to, bool first) {
    r = first ? Range{to, to + 1} : Range{std::min(r.lo, to), std::max(r.hi, to + 1)};
  };
  for (int t = 0; t < s.taps(); ++t) {
    if (!live[t]) continue;
    const int off_h = t / s.S * s.dil_h - s.pad_top, dr = floor_div(off_h, s.stride_h);
    const int off_w = t % s.S * s.dil_w - s.pad_left, ds = floor_div(off_w, s.stride_w);
    const Plane phase{off_h - dr * s.stride_h, off_w - ds * s.stride_w};
    std::size_t i = 0, j = 0;
    while (i < phases_.size() && (phases_[i].plane.row0 != phase.row0 || phases_[i].plane.col0 != phase.col0))
      ++i;
    if (i == phases_.size()) phases_.push_back({phase, {0, 0}, {0, 0}, 0});
    const bool first = phases_[i].cols.size() == 0;
    grow(phases_[i].rows, dr, first), grow(phases_[i].cols, ds, first);
    while (j < planes_.size() && (planes_[j].phase != static_cast<int>(i) || planes_[j].shift != ds)) ++j;
    if (j == planes_.size()) planes_.push_back({static_cast<int>(i), ds});
    grow(shifts_, dr, taps++ == 0);
    plane_of[t] = static_cast<int>(j), shift_of[t] = dr;
  }
  vectors_ = isa_.pair_vectors;
  const std::int64_t bytes = static_cast<std::int64_t>(taps) * s.group_c() * isa_.lanes * 4;
  while (vectors_ > kFewestVectors && bytes * vectors_ > kWindowBytes) --vectors_;
  // Whole vectors a row where that costs little: loads of a tap that cross cache lines take twice as long.
  const std::int64_t whole = round_up(s.Q, isa_.lanes);
  pitch_ = static_cast<int>(whole * 10 <= s.Q * std::int64_t{11} ? whole : s.Q);
  plane_floats_ = spread(static_cast<std::int64_t>(rows_ + shifts_.size()) * pitch_);
  zeros_ = plane_floats_ * static_cast<std::int64_t>(planes_.size());
  for (Phase& p : phases_) {
    p.stage = stage_floats_;
    stage_floats_ += s.group_c() * phase_floats(p);
  }
  c_stride_ = spread(zeros_ + round_up(static_cast<std::int64_t>(rows_) * pitch_, isa_.lanes));
  if (c_stride_ > std::numeric_limits<std::int32_t>::max())
    throw std::length_error("taps: a block's panel exceeds 2^31 values a channel");
  for (int t = 0; t < s.taps(); ++t)
    tap_offsets_.push_back(plane_of[t] * plane_floats_ + (shift_of[t] - shifts_.lo) * std::int64_t{pitch_});
}

// Filters with many taps first, each with the partner that leaves the least work: a shared stripe takes 12 loads' time, two
// others side by side 15.
void FpropTaps::pair_filters(int group) {
  const int count = shape_.group_k();
  std::vector<Filter> filters(count);
  for (Filter& f : filters) f.bits.resize((stripes_.taps + 63) / 64);
  for (int t = 0; t < stripes_.taps; ++t)
    for (int i = stripes_.begin(group, t); i < stripes_.end(group, t); ++i) {
      Filter& f = filters[stripes_.filter[i]];
      f.taps.push_back(t), f.rows.push_back(stripes_.row[i]);
      f.bits[t / 64] |= std::uint64_t{1} << t % 64;
    }
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return filters[a].taps.size() > filters[b].taps.size(); });
  std::vector<bool> taken(count);
  const Filter nothing;
  for (int head = 0; head < count; ++head) {
    if (taken[head]) continue;
    const Filter& a = filters[order[head]];
    int best = -1, least = std::numeric_limits<int>::max();
    for (int i = head + 1, seen = 0; i < count && seen < kPartners; ++i) {
      if (taken[i]) continue;
      ++seen;
      const Filter& b = filters[order[i]];
      const int n = static_cast<int>(a.taps.size()), m = static_cast<int>(b.taps.size());
      const int shared = common(a, b), cost = 12 * shared + 15 * (std::max(n, m) - shared) - 6 * (n + m);
      if (cost < least) least = cost, best = i;
    }
    Pair pair{{order[head], best < 0 ? -1 : order[best]}, static_cast<int>(segments_.size()), 0};
    const Filter& b = best < 0 ? nothing : filters[order[best]];
    if (best >= 0) taken[best] = true;

    std::vector<Step> shared, own[2];
    std::size_t i = 0, j = 0;
    while (i < a.taps.size() || j < b.taps.size()) {
      const int t = i < a.taps.size() ? a.taps[i] : stripes_.taps,
                u = j < b.taps.size() ? b.taps[j] : stripes_.taps;
      if (t == u)
        shared.push_back({{t, t}, {a.rows[i++], b.rows[j++]}});
      else if (t < u)
        own[0].push_back({{t, -1}, {a.rows[i++], -1}});
      else
        own[1].push_back({{-1, u}, {-1, b.rows[j++]}});
    }
    std::vector<Step> beside(std::max(own[0].size(), own[1].size()), {{-1, -1}, {-1, -1}});
    for (int f : {0, 1})
      for (std::size_t k = 0; k < own[f].size(); ++k)
        beside[k].tap[f] = own[f][k].tap[f], beside[k].row[f] = own[f][k].row[f];
    if (!shared.empty() || beside.empty()) add_segments(true, shared);  // dead filters: zeros are stored
    if (!beside.empty()) add_segments(false, beside);
    pair.last = static_cast<int>(segments_.size());
    pairs_.push_back(pair);
  }
}

void FpropTaps::add_segments(bool shared, const std::vector<Step>& steps) {
  const int count = static_cast<int>(steps.size()), channels = shape_.group_c();
  const auto offset = [&](int tap) {
    return static_cast<std::int32_t>(tap < 0 ? zeros_ : tap_offsets_[tap]);
  };
  const auto add = [&](int begin, int end) {
    segments_.push_back({shared, end - begin, static_cast<int>(offsets_.size()),
                         static_cast<int>(row_of_.size()), packed_floats_});
    packed_floats_ += static_cast<std::int64_t>(end - begin) * channels * 2;
    for (int i = begin; i < end; ++i) {
      offsets_.push_back(offset(steps[i].tap[0]));
      if (!shared) offsets_.push_back(offset(steps[i].tap[1]));
      row_of_.insert(row_of_.end(), steps[i].row, steps[i].row + 2);
    }
  };
  count == 0 ? add(0, 0) : split_evenly(count, std::max(1, kLongestSum / channels), add);
}

void FpropTaps::pack_weight(const void* weight, DType type, float* packed) const {
  const std::int64_t c = shape_.group_c(), bytes = static_cast<std::int64_t>(size_of(type));
  std::vector<float> row(static_cast<std::size_t>(c));
  std::fill(packed, packed + packed_floats_, 0.f);
  for (const Segment& s : segments_)
    for (int i = 0; i < 2 * s.stripes; ++i) {
      const std::int32_t from = row_of_[s.rows + i];
      if (from < 0) continue;
      isa_.load_row(row.data(), static_cast<const char*>(weight) + from * c * bytes, type, 1, c);
      float* const at = packed + s.weight + i / 2 * c * 2 + i % 2;
      for (std::int64_t j = 0; j < c; ++j) at[2 * j] = row[j];
    }
}

void FpropTaps::fill(const TensorView& x, int n, int group, Range out, float* panel, float* stage) const {
  LaneMap m;
  m.n0 = n, m.tensor_h = shape_.H, m.tensor_w = shape_.W;
  m.step_h = shape_.stride_h, m.step_w = shape_.stride_w;
  for (const Phase& p : phases_) {
    m.h0 = p.plane.row0, m.w0 = p.plane.col0;
    m.first_row = out.lo + p.rows.lo, m.rows = out.size() + p.rows.size() - 1;
    m.first_col = p.cols.lo, m.cols = m.pitch = pitch_ + p.cols.size() - 1;
    m.c_stride = phase_floats(p);
    load_lanes(isa_, x, m, group * shape_.group_c(), shape_.group_c(), stage + p.stage);
  }
  for (std::size_t i = 0; i < planes_.size(); ++i) {
    const Phase& p = phases_[planes_[i].phase];
    const std::int64_t rows = out.size() + p.rows.size() - 1, width = pitch_ + p.cols.size() - 1;
    for (int c = 0; c < shape_.group_c(); ++c)
      isa_.load_rows(
          panel + c * c_stride_ + i * plane_floats_ + (p.rows.lo - shifts_.lo) * std::int64_t{pitch_}, pitch_,
          stage + p.stage + c * phase_floats(p) + planes_[i].shift - p.cols.lo, DType::f32, width, 1, rows, 0,
          pitch_, 0, kUnpaired);
  }
}

void FpropTaps::compute(int group, Range out, const float* packed, const float* panel, float* lanes,
                        std::int64_t ld, float* nobody) const {
  const int channels = shape_.group_c(), loop = channels <= kTapChannels ? channels : 0;
  const int chain = channel_chain(shape_);  // a segment of so many channels is one stripe
  const int all =
      static_cast<int>(round_up(static_cast<std::int64_t>(out.size()) * pitch_, isa_.lanes)) / isa_.lanes;
  each_tile(all, vectors_, [&](int at, int vectors) {
    const TapTile tiles[] = {isa_.own_taps[loop][vectors], isa_.shared_taps[loop][vectors]};
    const float* const x = panel + at * isa_.lanes;
    for (int i = pair_ptr_[group]; i < pair_ptr_[group + 1]; ++i) {
      const Pair& p = pairs_[i];
      float* const y0 = lanes + p.filter[0] * ld + at * isa_.lanes;
      float* const y1 = p.filter[1] < 0 ? nobody : lanes + p.filter[1] * ld + at * isa_.lanes;
      if (i + 1 < pair_ptr_[group + 1])  // y may come from far away: 1 of 3 ms of a stem
        for (int f : {0, 1})
          if (const int k = pairs_[i + 1].filter[f]; k >= 0)
            for (int v = 0; v < vectors; ++v) __builtin_prefetch(lanes + k * ld + (at + v) * isa_.lanes, 1);
      for (int j = p.first; j < p.last; ++j) {
        const Segment& s = segments_[j];
        for (int c = 0; c < channels; c += chain)
          tiles[s.shared](s.stripes, std::min(chain, channels - c), packed + s.weight + 2 * c,
                          offsets_.data() + s.offsets, x + c * c_stride_, c_stride_, y0, y1,
                          j == p.first && c == 0);
      }
    }
  });
}

void FpropTaps::run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e,
                    int threads, InPlanes planes) const {
  const ConvShape& s = shape_;
  const std::int64_t ld = spread(round_up(static_cast<std::int64_t>(rows_) * pitch_, isa_.lanes));
  // Whole blocks that lie in y as they do here are computed there.
  const bool in_place =
      y.dtype == DType::f32 && y.stride[3] == 1 && y.stride[2] == s.Q && pitch_ == s.Q && !e.residual.data;
  const std::int64_t panel_floats = spread(c_stride_ * s.group_c() + isa_.lanes),
                     stage_floats = spread(stage_floats_), lanes_floats = spread(ld * s.group_k()),
                     strip_floats = e.residual.data ? spread(ld * kFinishStrip) : 0;
  const std::int64_t each = panel_floats + stage_floats + lanes_floats + strip_floats + vectors_ * 16;
  float* const memory = scratch(static_cast<std::size_t>(each * threads));
  const int tasks = s.Q == 0 ? 0 : s.N * row_blocks_ * s.groups;
  Tasks all;

  run_team(threads, [&](const Team& team) {
    float* const panel = memory + team.thread * each;
    float* const stage = panel + panel_floats;
    float* const lanes = stage + stage_floats;
    float* const strip = lanes + lanes_floats;
    for (int c = 0; c < s.group_c(); ++c)
      std::fill(panel + c * c_stride_ + zeros_, panel + (c + 1) * c_stride_, 0.f);
    all.each(team, tasks, [&](int task) {
      const int group = task % s.groups, block = task / s.groups % row_blocks_,
                n = task / s.groups / row_blocks_;
      const Range out = {block * rows_, std::min(s.P, (block + 1) * rows_)};
      fill(x, n, group, out, panel, stage);
      const bool here = in_place && out.size() * std::int64_t{s.Q} % isa_.lanes == 0;
      const int k = group * s.group_k();
      float* const to = here ? reinterpret_cast<float*>(y.at(n, k, out.lo, 0)) : lanes;
      LaneMap m;
      m.n0 = n, m.first_row = out.lo, m.rows = out.size();
      m.cols = s.Q, m.pitch = pitch_, m.tensor_h = s.P, m.tensor_w = s.Q;
      m.c_stride = here ? y.stride[1] : ld;
      compute(group, out, packed, panel, to, m.c_stride, strip + strip_floats);
      finish_lanes(isa_, e, m, k, s.group_k(), to, strip);
      if (!here) store_lanes(isa_, y, m, k, s.group_k(), to);
      if (planes.y)
        planes.y->clear_around(static_cast<float*>(y.data), n, k, k + s.group_k(), out.lo, out.hi);
    });
  });
}

}  // namespace sk
