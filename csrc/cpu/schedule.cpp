#include "cpu/schedule.h"

#include <algorithm>

namespace sk {
Schedule::Schedule(Lattice lattice, const Tiling& tiling, int lanes, int batch_size, bool one_tap_per_run)
    : lattice_(std::move(lattice)), tiling_(tiling), lanes_(lanes), batch_size_(batch_size) {
  const Lattice& l = lattice_;
  const bool batch = tiling_.mode == LaneMode::batch, gather = tiling_.mode == LaneMode::gather;
  if (gather) tiling_.rows = std::max(1, l.rows);
  tiling_.rows = std::clamp(tiling_.rows, 1, std::max(1, l.rows));
  image_blocks_ = ceil_div(batch_size, tiling_.images);
  row_blocks_ = l.cols == 0 ? 0 : ceil_div(l.rows, tiling_.rows);

  int dr_min = 0, dr_max = 0, ds_min = 0, ds_max = 0;
  bool first = true;
  for (const TapAccess& t : l.taps) {
    dr_min = first ? t.dr : std::min(dr_min, t.dr), dr_max = first ? t.dr : std::max(dr_max, t.dr);
    ds_min = first ? t.ds : std::min(ds_min, t.ds), ds_max = first ? t.ds : std::max(ds_max, t.ds);
    first = false;
  }
  Range cols = {0, 0};
  for (std::size_t i = 0; i < l.planes.size(); ++i) {
    const Range c = l.plane_cols(l.planes[i]);
    cols = i == 0 ? c : Range{std::min(cols.lo, c.lo), std::max(cols.hi, c.hi)};
  }
  row_min_ = dr_min;
  panel_rows_ = tiling_.rows + dr_max - dr_min;
  if (batch) {
    // Only columns that some tap of some output reads, and only where the tensor has them.
    cols = intersect(cols, {std::min(0, ds_min), l.cols + ds_max});
    col_first_ = cols.lo;
    panel_cols_ = pitch_ = std::max(1, cols.size());
    out_pitch_ = l.cols;
    if (tiling_.resident_gap > 0) {
      row_min_ = col_first_ = 0;
      panel_rows_ = ceil_div(l.in_h, l.step_h), pitch_ = ceil_div(l.in_w, l.step_w);
    }
    channel_floats_ = static_cast<std::int64_t>(panel_rows_) * pitch_ * tiling_.images;
    channel_stride_ =
        tiling_.resident_gap > 0 ? channel_floats_ + tiling_.resident_gap : spread(channel_floats_);
    output_stride_ =
        static_cast<std::int64_t>(tiling_.rows) * out_pitch_ * tiling_.images + tiling_.resident_gap;
  } else {
    // A tap left of column 0 lands in the previous row's zeros; one right of the last column must not reach data.
    pitch_ = gather ? l.cols : std::max({cols.hi + std::max(0, -ds_min), l.cols, l.cols + ds_max});
    panel_cols_ = pitch_;
    if (tiling_.aligned && !gather) {  // planes by column hold what their taps read and no more
      panel_cols_ = l.cols;
      pitch_ = static_cast<int>(round_up(l.cols, lanes_));
    }
    out_pitch_ = pitch_;
    lead_ = round_up(std::max(0, -ds_min), lanes_);
    const std::int64_t rows = gather ? static_cast<std::int64_t>(tiling_.rows) * tiling_.images : panel_rows_;
    channel_floats_ = rows * pitch_;
    channel_stride_ = spread(channel_floats_);
    output_stride_ = round_up((gather ? rows : tiling_.rows) * pitch_, lanes_);
  }
  slack_ = 2 * lanes_ + std::max(0, ds_max);

  // Blocks of one kind share their runs; the last images of a batch may be fewer.
  const int tail = batch_size - (image_blocks_ - 1) * tiling_.images;
  for (int images : {tiling_.images, tail})
    for (int r = 0; r < row_blocks_; ++r) {
      BlockPlan b{r * tiling_.rows, std::min(l.rows, (r + 1) * tiling_.rows), images, {}, {}};
      batch ? add_batch_runs(b, one_tap_per_run) : add_pixel_runs(b, one_tap_per_run);
      blocks_.push_back(std::move(b));
    }
}

int Schedule::block_kind(int index) const {
  const bool last = index / row_blocks_ == image_blocks_ - 1;
  return (last ? row_blocks_ : 0) + index % row_blocks_;
}

int Schedule::tap_set(const std::vector<int>& taps) {
  const auto found = std::find(tap_sets_.begin(), tap_sets_.end(), taps);
  if (found != tap_sets_.end()) return static_cast<int>(found - tap_sets_.begin());
  tap_sets_.push_back(taps);
  return static_cast<int>(tap_sets_.size()) - 1;
}

std::int64_t Schedule::tap_offset(int tap_index, int channels) const {
  const TapAccess& t = lattice_.taps[tap_index];
  const int batch = tiling_.mode == LaneMode::batch ? tiling_.images : 1;
  return lead_ + t.plane * plane_stride(channels) +
         (static_cast<std::int64_t>(t.dr - row_min_) * pitch_ + (t.ds - col_first_)) * batch;
}

// Lanes are the block's pixels in row order. A run is widened to whole vectors: the rows it gains read zeros.
void Schedule::add_pixel_runs(BlockPlan& b, bool one_tap_per_run) {
  const bool gather = tiling_.mode == LaneMode::gather;
  const std::int64_t rows = static_cast<std::int64_t>(b.i1 - b.i0) * (gather ? b.images : 1);
  const std::int64_t all = round_up(rows * pitch_, lanes_),
                     window = static_cast<std::int64_t>(tiling_.window) * lanes_;
  const int taps = static_cast<int>(lattice_.taps.size());
  std::vector<int> every(taps);
  for (int t = 0; t < taps; ++t) every[t] = t;
  for (std::int64_t at = 0; at < all; at += window) {
    const std::int64_t end = std::min(all, at + window);
    if (!one_tap_per_run) {
      b.runs.push_back({tap_set(every), static_cast<int>((end - at) / lanes_), at, at});
      continue;
    }
    for (int t = 0; t < taps; ++t) {
      Range valid = {0, static_cast<int>(rows)};
      if (!gather || b.images == 1) {
        const Range v = intersect(lattice_.valid_rows(lattice_.taps[t]), {b.i0, b.i1});
        valid = {v.lo - b.i0, v.hi - b.i0};
      }
      const std::int64_t lo = std::max(at, static_cast<std::int64_t>(valid.lo) * pitch_ / lanes_ * lanes_);
      const std::int64_t hi = std::min(end, round_up(static_cast<std::int64_t>(valid.hi) * pitch_, lanes_));
      if (valid.size() > 0 && lo < hi)
        b.runs.push_back({tap_set({t}), static_cast<int>((hi - lo) / lanes_), lo, lo});
    }
  }
}

// Lanes are images: every pixel has its own exact set of taps.
void Schedule::add_batch_runs(BlockPlan& b, bool one_tap_per_run) {
  const int batch = tiling_.images, per_pixel = batch / lanes_;
  const int window = std::max(1, tiling_.window / per_pixel);
  const int taps = static_cast<int>(lattice_.taps.size());
  const auto add = [&](const std::vector<int>& set, int i, int j0, int j1) {
    const std::int64_t x = (static_cast<std::int64_t>(i - b.i0) * pitch_ + j0) * batch;
    const std::int64_t y = (static_cast<std::int64_t>(i - b.i0) * out_pitch_ + j0) * batch;
    b.runs.push_back({tap_set(set), (j1 - j0) * per_pixel, x, y});
  };
  const auto reaches = [&](int t, int i, int j) {
    const Range v = lattice_.valid_rows(lattice_.taps[t]), h = lattice_.valid_cols(lattice_.taps[t]);
    return i >= v.lo && i < v.hi && j >= h.lo && j < h.hi;
  };
  for (int i = b.i0; i < b.i1; ++i) {
    b.row_begin.push_back(static_cast<int>(b.runs.size()));
    for (int j0 = 0; j0 < lattice_.cols; j0 += window) {
      const int j1 = std::min(lattice_.cols, j0 + window);
      if (one_tap_per_run) {
        for (int t = 0; t < taps; ++t) {
          const Range h = intersect(lattice_.valid_cols(lattice_.taps[t]), {j0, j1});
          const Range v = lattice_.valid_rows(lattice_.taps[t]);
          if (h.size() > 0 && i >= v.lo && i < v.hi) add({t}, i, h.lo, h.hi);
        }
        continue;
      }
      for (int j = j0; j < j1;) {  // stretches of columns with one set of taps
        const auto set_at = [&](int column) {
          std::vector<int> set;
          for (int t = 0; t < taps; ++t)
            if (reaches(t, i, column)) set.push_back(t);
          return set;
        };
        const std::vector<int> set = set_at(j);
        int next = j + 1;
        while (next < j1 && set_at(next) == set) ++next;
        add(set, i, j, next);
        j = next;
      }
    }
  }
  b.row_begin.push_back(static_cast<int>(b.runs.size()));
}

void Schedule::pack(const IsaKernels& isa, const TensorView& x, int block, int c_first, int channels,
                    int begin, int end, float* panel) const {
  const BlockPlan& b = blocks_[block_kind(block)];
  LaneMap m;
  m.n0 = first_image(block), m.images = b.images;
  m.tensor_h = lattice_.in_h, m.tensor_w = lattice_.in_w;
  m.step_h = lattice_.step_h, m.step_w = lattice_.step_w;
  m.first_row = b.i0 + row_min_, m.rows = tiling_.mode == LaneMode::gather ? lattice_.rows : panel_rows_;
  m.first_col = col_first_, m.cols = panel_cols_, m.pitch = pitch_;
  m.c_stride = channel_stride_;
  m.batch = tiling_.mode == LaneMode::batch ? tiling_.images : 1;
  if (begin == 0 && end > 0) std::fill(panel, panel + lead_, 0.f);  // one member of a team
  for (int p = 0; p < planes(); ++p) {
    m.h0 = lattice_.planes[p].row0, m.w0 = lattice_.planes[p].col0;
    float* at = panel + lead_ + p * plane_stride(channels) + begin * channel_stride_;
    load_lanes(isa, x, m, c_first + begin, end - begin, at);
    if (m.batch > 1) continue;
    for (int c = 0; c < end - begin; ++c)  // a tap left of a channel's first pixel reads what lies before it
      std::fill(at + c * channel_stride_ + channel_floats_, at + (c + 1) * channel_stride_, 0.f);
  }
}

void Schedule::finish(const IsaKernels& isa, const TensorView& y, const Epilogue& e, int block, int begin,
                      int count, float* lanes, std::int64_t stride, float* strip, bool in_y) const {
  const BlockPlan& b = blocks_[block_kind(block)];
  LaneMap m;
  m.n0 = first_image(block), m.images = b.images;
  m.h0 = lattice_.out_h0, m.w0 = lattice_.out_w0, m.step_h = lattice_.out_sh, m.step_w = lattice_.out_sw;
  m.tensor_h = (lattice_.rows - 1) * m.step_h + m.h0 + 1,
  m.tensor_w = (lattice_.cols - 1) * m.step_w + m.w0 + 1;
  m.first_row = b.i0, m.rows = b.i1 - b.i0;
  m.cols = lattice_.cols, m.pitch = out_pitch_;
  m.c_stride = stride;
  m.batch = tiling_.mode == LaneMode::batch ? tiling_.images : 1;
  finish_lanes(isa, e, m, begin, count, lanes, strip);
  if (!in_y) store_lanes(isa, y, m, begin, count, lanes);
}

void Schedule::clear_around(const Planes& planes, const TensorView& y, int block, int begin,
                            int count) const {
  const BlockPlan& b = blocks_[block_kind(block)];
  for (int image = first_image(block); image < first_image(block) + b.images; ++image)
    planes.clear_around(static_cast<float*>(y.data), image, begin, begin + count, b.i0, b.i1);
}

std::int64_t Schedule::output_floats(int block) const {
  const BlockPlan& b = blocks_[block_kind(block)];
  return round_up(static_cast<std::int64_t>(b.i1 - b.i0) * out_pitch_, lanes_);
}

// One plane, the tensor itself; what a run's first and last vector read beyond the rows of its tap lies in the margin.
bool Schedule::reads_planes() const {
  const Lattice& l = lattice_;
  if (tiling_.mode != LaneMode::pixels || l.step_h != 1 || l.step_w != 1 || l.planes.size() != 1)
    return false;
  int reach = 0;
  for (const TapAccess& t : l.taps) reach = std::max(reach, std::abs(t.ds));
  return lanes_ - 1 + reach <= kPlaneMargin;
}

// May point outside x: only rows of the map and the margins around it are read.
const float* Schedule::panel_in(const TensorView& x, int block, int channel) const {
  const std::int64_t first = blocks_[block_kind(block)].i0 + row_min_;
  return reinterpret_cast<const float*>(x.at(first_image(block), channel, 0, 0)) + first * pitch_ - lead_;
}

float* Schedule::lanes_in(const TensorView& y, int block, int channel) const {
  return reinterpret_cast<float*>(y.at(first_image(block), channel, blocks_[block_kind(block)].i0, 0));
}

}  // namespace sk
