#include "cpu/fprop.h"

namespace sk {

std::vector<Part> balanced_parts(int group, const std::vector<int>& work, int parts) {
  std::int64_t total = 0, done = 0;
  for (int w : work) total += w;
  std::vector<Part> out;
  int k = 0;
  for (int p = 0; p < parts; ++p) {
    const int begin = k;
    const std::int64_t goal = total * (p + 1) / parts;
    while (k < static_cast<int>(work.size()) && (done < goal || p + 1 == parts)) done += work[k++];
    out.push_back({group, begin, k});
  }
  return out;
}

Fprop::Fprop(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa)
    : shape_(shape),
      stripes_(std::move(stripes)),
      isa_(isa),
      schedule_(fprop_lattice(shape, stripes_.live_taps(), tiling.mode == LaneMode::gather), tiling, isa.lanes, shape.N,
                true),
      part_count_(std::max(1, tiling.filter_parts)) {
  const int taps = static_cast<int>(schedule_.lattice().taps.size());
  for (int t = 0; t < taps; ++t) tap_offsets_.push_back(schedule_.tap_offset(t, shape.group_c()));

  for (int g = 0; g < shape.groups; ++g)
    for (const Part& p : balanced_parts(g, stripes_.work(g, shape.group_k(), shape.group_c()), part_count_))
      parts_.push_back(p);
  tile_ptr_.push_back(0);
  for (const Part& p : parts_)
    for (const TapAccess& t : schedule_.lattice().taps) {
      const auto [lo, hi] = stripes_.within(p.group, t.tap, p.begin, p.end);
      const int first = lo;
      split_evenly(hi - lo, isa.tile_filters, [&, first](int a, int b) {
        tiles_.push_back({packed_floats_, b - a, static_cast<int>(order_.size())});
        packed_floats_ += static_cast<std::int64_t>(b - a) * shape.group_c();
        for (int i = first + a; i < first + b; ++i) {
          order_.push_back(stripes_.row[i]);
          local_.push_back(stripes_.filter[i] - p.begin);
        }
      });
      tile_ptr_.push_back(static_cast<std::int32_t>(tiles_.size()));
    }
}

void Fprop::pack_weight(const void* weight, DType type, float* packed) const {
  const std::int64_t c = shape_.group_c();
  std::vector<float> row(static_cast<std::size_t>(c));
  for (const FilterTile& t : tiles_)
    for (int f = 0; f < t.filters; ++f) {
      const char* source = static_cast<const char*>(weight) + order_[t.first + f] * c * static_cast<std::int64_t>(size_of(type));
      isa_.load_row(row.data(), source, type, 1, c);
      float* at = packed + t.weight + f;
      for (std::int64_t i = 0; i < c; ++i) at[i * t.filters] = row[i];
    }
}

void Fprop::accumulate(int part, const Run* begin, const Run* end, const float* packed, const float* panel,
                       float* lanes) const {
  const int taps = static_cast<int>(schedule_.lattice().taps.size());
  const std::int64_t c_stride = schedule_.channel_stride(), ld = schedule_.output_stride();
  for (const Run* r = begin; r != end; ++r) {
    const Run& run = *r;
    const int tap = schedule_.tap_sets()[run.taps][0];
    const float* x = panel + tap_offsets_[tap] + run.x;
    for (int i = tile_ptr_[part * taps + tap]; i < tile_ptr_[part * taps + tap + 1]; ++i) {
      const FilterTile& t = tiles_[i];
      each_tile(run.vectors, isa_.tile_vectors[t.filters], [&](int at, int vectors) {
        isa_.strided[t.filters][vectors](shape_.group_c(), packed + t.weight, t.filters, x + at * isa_.lanes, c_stride,
                                         lanes + run.y + at * isa_.lanes, ld, &local_[t.first]);
      });
    }
  }
}

void Fprop::run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e, int threads) const {
  drive(isa_, schedule_, parts_, part_count_, shape_.group_c(), shape_.group_k(), x, y, e, threads, true,
        [&](int part, const BlockPlan& block, const float* panel, float* lanes) {
          accumulate(part, block.runs.data(), block.runs.data() + block.runs.size(), packed, panel, lanes);
        });
}

}  // namespace sk
