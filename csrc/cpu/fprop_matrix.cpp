#include "cpu/fprop_matrix.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace sk {
namespace {

constexpr int kCells = kMatrixChannels / 2;  // of a step

Tiling aligned(Tiling t) {
  t.aligned = true;
  return t;
}

// Filters of a tile that taps with so many filters suit best: 17 are two tiles of 9. A product takes as many cycles as a tile has
// rows, but not fewer than 9, the end of a sum 16.
int fitting_height(const std::vector<int>& filters_of_tap, int steps) {
  int best = kMatrixHeight;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (int height = kMatrixHeight; height >= 1; --height) {
    std::int64_t cost = 0;
    for (int n : filters_of_tap) cost += ceil_div(n, height) * (steps * std::max(height, 9) + 16);
    if (cost < least) least = cost, best = height;
  }
  return best;
}

}  // namespace

FpropMatrix::FpropMatrix(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa)
    : shape_(shape),
      stripes_(std::move(stripes)),
      isa_(isa),
      schedule_(fprop_lattice(shape, stripes_.live_taps(), planes_per(tiling.mode, true)), aligned(tiling),
                isa.lanes, shape.N, true),
      steps_(shape.group_c() / kMatrixChannels),
      part_count_(std::max(1, tiling.filter_parts)) {
  if (!isa.matrix.add || shape.group_c() % kMatrixChannels != 0)
    throw std::invalid_argument("matrices of bfloat16 need the instruction and a multiple of 32 channels");
  const std::vector<TapAccess>& taps = schedule_.lattice().taps;
  for (std::size_t t = 0; t < taps.size(); ++t)
    tap_offsets_.push_back(schedule_.tap_offset(static_cast<int>(t), steps_ * kCells));

  for (int g = 0; g < shape.groups; ++g)
    for (const Part& p : balanced_parts(g, stripes_.work(g, shape.group_k(), shape.group_c()), part_count_))
      parts_.push_back(p);
  std::vector<int> counts;
  for (const Part& p : parts_)
    for (const TapAccess& t : taps) {
      const auto [lo, hi] = stripes_.within(p.group, t.tap, p.begin, p.end);
      counts.push_back(hi - lo);
    }
  height_ = fitting_height(counts, steps_);

  for (const Part& p : parts_)
    for (const TapAccess& t : taps) {
      const auto [lo, hi] = stripes_.within(p.group, t.tap, p.begin, p.end);
      const int first = static_cast<int>(order_.size());
      filters_.push_back({packed_floats_, first, first + hi - lo});
      packed_floats_ += static_cast<std::int64_t>(round_up(hi - lo, height_)) * steps_ * kCells;
      for (int i = lo; i < hi; ++i) {
        order_.push_back(stripes_.row[i]);
        local_.push_back(stripes_.filter[i] - p.begin);
      }
    }
}

void FpropMatrix::pack_weight(const void* weight, DType type, float* packed) const {
  const std::int64_t c = shape_.group_c();
  std::vector<float> row(static_cast<std::size_t>(c));
  std::vector<std::uint16_t> halves(row.size());
  std::fill(packed, packed + packed_floats_, 0.f);
  for (const TapFilters& t : filters_)
    for (int f = 0; f < t.last - t.first; ++f) {
      const char* source = static_cast<const char*>(weight) +
                           order_[t.first + f] * c * static_cast<std::int64_t>(size_of(type));
      isa_.load_row(row.data(), source, type, 1, c);
      isa_.store_row(halves.data(), DType::bf16, 1, row.data(), c);
      const std::int64_t tile = f / height_, in_tile = f % height_;
      for (int i = 0; i < steps_; ++i)
        std::memcpy(packed + t.weight + ((tile * steps_ + i) * height_ + in_tile) * kCells,
                    halves.data() + i * kMatrixChannels, kMatrixChannels * sizeof(std::uint16_t));
    }
}

void FpropMatrix::accumulate(int part, const BlockPlan& block, const float* packed,
                             Channels<const float> panel, Channels<float> lanes) const {
  const TapFilters* const filters = filters_.data() + part * tap_offsets_.size();  // may be none
  MatrixWork work;
  isa_.matrix.begin(work, steps_, height_);
  for (const Run& run : block.runs) {
    const int tap = schedule_.tap_sets()[run.taps][0];
    const TapFilters& f = filters[tap];
    isa_.matrix.add(work,
                    {packed + f.weight, panel.at + tap_offsets_[tap] + run.x, panel.stride, lanes.at + run.y,
                     lanes.stride, local_.data() + f.first, f.last - f.first, run.vectors});
  }
  isa_.matrix.end(work);
}

void FpropMatrix::run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e,
                      int threads) const {
  if (x.dtype != DType::bf16) throw std::invalid_argument("matrices of bfloat16 are read from bfloat16");
  drive(isa_, schedule_, parts_, part_count_, steps_ * kCells, shape_.group_k(), paired(x), y, e, threads,
        true, [&](int part, const BlockPlan& block, Channels<const float> panel, Channels<float> lanes) {
          accumulate(part, block, packed, panel, lanes);
        });
}

}  // namespace sk
