#include "cpu/fprop.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>

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

namespace {

// Filters of a full tile, 1 to kMaxTileFilters, that a schedule's runs suit best.
//   cost = sum over runs and filter tiles of  C * (max(F * V, F + V, 8) + V / 2) + 20 + 3 F V     half cycles
// A step issues F * V multiply-adds and F + V loads, two a cycle each, and waits 4 cycles for the step before it; lane vectors
// come from L2 often enough that 6 filters by 2 vectors beat 4 by 3 by 1 to 5 % (AVX2), and both beat 3 by 4; y is loaded, added
// and stored once.
int fitting_filters(const Schedule& s, const std::vector<int>& filters_of_tap, int cells,
                    const IsaKernels& isa) {
  std::map<std::pair<int, int>, int> runs;  // (filters, vectors) -> how many
  for (const BlockPlan& b : s.blocks())
    for (const Run& r : b.runs) ++runs[{filters_of_tap[s.tap_sets()[r.taps][0]], r.vectors}];
  int best = isa.tile_filters;
  double least = std::numeric_limits<double>::infinity();
  for (int most = 1; most <= kMaxTileFilters; ++most) {
    double cost = 0;
    for (const auto& [run, count] : runs)
      split_evenly(run.first, most, [&, vectors_of_run = run.second, times = count](int a, int b) {
        const int f = b - a;
        each_tile(vectors_of_run, isa.tile_vectors[f], [&](int, int v) {
          cost += times * (cells * static_cast<double>(std::max({f * v, f + v, 8})) + cells * v * 0.5 + 20 +
                           3 * f * v);
        });
      });
    if (cost < least || (cost == least && most <= isa.tile_filters)) least = cost, best = most;
  }
  return best;
}

}  // namespace

Fprop::Fprop(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa,
             bool paired)
    : shape_(shape),
      stripes_(std::move(stripes)),
      isa_(isa),
      schedule_(fprop_lattice(shape, stripes_.live_taps(), planes_per(tiling.mode)), tiling, isa.lanes,
                shape.N, true),
      paired_(paired),
      cells_(paired ? shape.group_c() / 2 : shape.group_c()),
      part_count_(std::max(1, tiling.filter_parts)) {
  if (paired && (!isa.paired[1][1] || shape.group_c() % 2 != 0))
    throw std::invalid_argument("pairs of bfloat16 need the instruction and an even number of channels");
  const int taps = static_cast<int>(schedule_.lattice().taps.size());
  for (int t = 0; t < taps; ++t) tap_offsets_.push_back(schedule_.tap_offset(t, cells_));

  for (const std::vector<int>& set : schedule_.tap_sets()) tap_of_set_.push_back(set[0]);
  int longest = 0;
  for (const BlockPlan& b : schedule_.blocks())
    for (const Run& r : b.runs) longest = std::max(longest, r.vectors);
  for (int vectors = 0; vectors <= longest; ++vectors)
    for (int filters = 0; filters <= kMaxTileFilters; ++filters) {
      const int tiles = filters ? ceil_div(vectors, isa.tile_vectors[filters]) : 0;
      cuts_.push_back(tiles ? Cut{tiles, vectors / tiles, vectors % tiles} : Cut{});
    }

  for (int g = 0; g < shape.groups; ++g)
    for (const Part& p : balanced_parts(g, stripes_.work(g, shape.group_k(), shape.group_c()), part_count_))
      parts_.push_back(p);
  std::vector<int> filters_of_tap(taps);  // of an average part
  for (int t = 0; t < taps; ++t)
    for (int g = 0; g < shape.groups; ++g) {
      const int tap = schedule_.lattice().taps[t].tap;
      filters_of_tap[t] += stripes_.end(g, tap) - stripes_.begin(g, tap);
    }
  for (int& n : filters_of_tap) n = ceil_div(n, static_cast<int>(parts_.size()));
  const int chain = paired ? cells_ : channel_chain(shape);
  const int tile_filters = fitting_filters(schedule_, filters_of_tap, cells_, isa);
  tile_ptr_.push_back(0);
  for (const Part& p : parts_)
    for (const TapAccess& t : schedule_.lattice().taps) {
      const auto [lo, hi] = stripes_.within(p.group, t.tap, p.begin, p.end);
      const int first = lo;
      split_evenly(hi - lo, tile_filters, [&, first](int a, int b) {
        for (int c = 0; c < cells_; c += chain) {
          const int cells = std::min(chain, cells_ - c);
          tiles_.push_back({packed_floats_, b - a, static_cast<int>(order_.size()), c, cells});
          packed_floats_ += static_cast<std::int64_t>(b - a) * cells;
        }
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
  std::vector<std::uint16_t> halves(paired_ ? row.size() : 0);
  for (const FilterTile& t : tiles_)
    for (int f = 0; f < t.filters; ++f) {
      const char* source = static_cast<const char*>(weight) + (order_[t.first + f] * c + t.first_cell) *
                                                                  static_cast<std::int64_t>(size_of(type));
      isa_.load_row(row.data(), source, type, 1, paired_ ? c : t.cells);
      if (paired_) {
        isa_.store_row(halves.data(), DType::bf16, 1, row.data(), c);
        std::memcpy(row.data(), halves.data(), static_cast<std::size_t>(c) * 2);
      }
      float* at = packed + t.weight + f;
      for (int i = 0; i < t.cells; ++i) at[static_cast<std::int64_t>(i) * t.filters] = row[i];
    }
}

void Fprop::accumulate(int part, const Run* begin, const Run* end, const float* packed,
                       Channels<const float> panel, Channels<float> lanes) const {
  const int taps = static_cast<int>(schedule_.lattice().taps.size());
  const auto& tiles = paired_ ? isa_.paired : isa_.strided;
  for (const Run* run = begin; run != end; ++run) {
    const int tap = tap_of_set_[run->taps];
    const Cut* const cuts = &cuts_[static_cast<std::size_t>(run->vectors) * (kMaxTileFilters + 1)];
    const FilterTile* const last = &tiles_[0] + tile_ptr_[part * taps + tap + 1];
    for (const FilterTile* t = &tiles_[0] + tile_ptr_[part * taps + tap]; t != last; ++t) {
      const Cut& cut = cuts[t->filters];
      const float* x = panel.at + t->first_cell * panel.stride + tap_offsets_[tap] + run->x;
      float* y = lanes.at + run->y;
      for (int i = 0; i < cut.tiles; ++i) {
        const int vectors = cut.size + (i < cut.longer ? 1 : 0);
        tiles[t->filters][vectors](t->cells, packed + t->weight, x, panel.stride, y, lanes.stride,
                                   &local_[t->first]);
        x += vectors * isa_.lanes, y += vectors * isa_.lanes;
      }
    }
  }
}

void Fprop::run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e, int threads,
                InPlanes planes) const {
  if (paired_ && x.dtype != DType::bf16)
    throw std::invalid_argument("pairs of bfloat16 are read from bfloat16");
  // A block's last vector writes into the rows of the next one: their order is kept only by one thread, or by a team that
  // shares every block.
  const bool ordered = threads == 1 || part_count_ > 1 || schedule_.single_row_block();
  const InPlace here{planes.x && x.stride[2] == plane_pitch(),
                     planes.y && schedule_.writes_planes() && y.stride[2] == schedule_.pitch() && ordered,
                     planes.y};
  drive(
      isa_, schedule_, parts_, part_count_, cells_, shape_.group_k(), paired_ ? paired(x) : x, y, e, threads,
      true,
      [&](int part, const BlockPlan& block, Channels<const float> panel, Channels<float> lanes) {
        accumulate(part, block.runs.data(), block.runs.data() + block.runs.size(), packed, panel, lanes);
      },
      here);
}

}  // namespace sk
