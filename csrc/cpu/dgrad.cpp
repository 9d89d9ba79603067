#include "cpu/dgrad.h"

#include <limits>
#include <stdexcept>

namespace sk {

Dgrad::Dgrad(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa)
    : shape_(shape), stripes_(std::move(stripes)), isa_(isa), part_count_(std::max(1, tiling.filter_parts)) {
  split_evenly(shape.group_c(), isa.tile_filters, [&](int a, int b) { tiles_.push_back({a, b - a}); });
  // Parts are stretches of whole tiles, so that packed weights serve every number of threads.
  for (int g = 0; g < shape.groups; ++g) {
    std::vector<int> work;
    work.reserve(tiles_.size());
    for (const ChannelTile& t : tiles_) work.push_back(t.channels);
    for (const Part& p : balanced_parts(g, work, part_count_))
      parts_.push_back(p.begin == p.end ? Part{g, 0, 0}
                                        : Part{g, tiles_[p.begin].begin,
                                               tiles_[p.end - 1].begin + tiles_[p.end - 1].channels});
  }
  for (Lattice& l : dgrad_lattices(shape, stripes_.live_taps(), planes_per(tiling.mode))) {
    Phase phase{Schedule(std::move(l), tiling, isa.lanes, shape.N, false), {}};
    const Schedule& s = phase.schedule;
    if (s.panel_floats(shape.group_k()) > std::numeric_limits<std::int32_t>::max())
      throw std::length_error("dgrad: a block's panel exceeds 2^31 floats");
    for (int g = 0; g < shape.groups; ++g) {
      const int first = stripes_.begin(g, 0);
      for (const std::vector<int>& set : s.tap_sets()) {
        std::vector<IndexedStep> steps;
        for (int index : set) {
          const int tap = s.lattice().taps[index].tap;
          const std::int64_t offset = s.tap_offset(index, shape.group_k());
          for (int i = stripes_.begin(g, tap); i < stripes_.end(g, tap); ++i)
            steps.push_back(
                {static_cast<std::int32_t>(offset + stripes_.filter[i] * s.channel_stride()), i - first});
        }
        phase.steps.push_back(std::move(steps));
      }
    }
    phases_.push_back(std::move(phase));
  }
}

void Dgrad::pack_weight(const void* weight, DType type, float* packed) const {
  const std::int64_t c = shape_.group_c();
  const std::int64_t bytes = static_cast<std::int64_t>(size_of(type));
  for (int g = 0; g < shape_.groups; ++g) {
    const int first = stripes_.begin(g, 0), last = stripes_.end(g, stripes_.taps - 1);
    float* const at = packed + first * c;
    for (const ChannelTile& t : tiles_)
      for (int i = first; i < last; ++i)
        isa_.load_row(at + static_cast<std::int64_t>(t.begin) * (last - first) + (i - first) * t.channels,
                      static_cast<const char*>(weight) + (stripes_.row[i] * c + t.begin) * bytes, type, 1,
                      t.channels);
  }
}

void Dgrad::compute(const Phase& phase, const Part& part, const BlockPlan& block, const float* packed,
                    const float* panel, float* lanes) const {
  const Schedule& s = phase.schedule;
  const int first = stripes_.begin(part.group, 0), last = stripes_.end(part.group, stripes_.taps - 1);
  const float* const weights = packed + static_cast<std::int64_t>(first) * shape_.group_c();
  const std::int64_t ld = s.output_stride();
  for (const Run& run : block.runs) {
    const std::vector<IndexedStep>& steps = phase.steps[part.group * s.tap_sets().size() + run.taps];
    for (const ChannelTile& t : tiles_) {
      if (t.begin < part.begin || t.begin >= part.end) continue;
      const float* const a = weights + static_cast<std::int64_t>(t.begin) * (last - first);
      float* const y = lanes + (t.begin - part.begin) * ld + run.y;
      each_tile(run.vectors, isa_.tile_vectors[t.channels], [&](int at, int vectors) {
        isa_.indexed[t.channels][vectors](static_cast<std::int64_t>(steps.size()), a,
                                          panel + run.x + at * isa_.lanes, steps.data(), y + at * isa_.lanes,
                                          ld);
      });
    }
  }
}

void Dgrad::run(const TensorView& dy, const float* packed, const TensorView& dx, int threads) const {
  for (const Phase& phase : phases_)
    drive(isa_, phase.schedule, parts_, part_count_, shape_.group_k(), shape_.group_c(), dy, dx, Epilogue{},
          threads, false,
          [&](int part, const BlockPlan& block, Channels<const float> panel, Channels<float> lanes) {
            compute(phase, parts_[part], block, packed, panel.at, lanes.at);
          });
}

}  // namespace sk
