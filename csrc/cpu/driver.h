// The loop fprop and dgrad share around their micro-kernels: blocks over the team, or, where blocks are too few, one
// block at a time with the team splitting its channels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/planes.h"
#include "cpu/schedule.h"

namespace sk {

// Output channels [begin, end) of one convolution group.
struct Part {
  int group, begin, end;
};

// Cuts `work` (one entry a channel) into at most `parts` stretches of like sums.
std::vector<Part> balanced_parts(int group, const std::vector<int>& work, int parts);

// Channels `stride` floats apart.
template <class T>
struct Channels {
  T* at;
  std::int64_t stride;
};

// Which tensors are planes that the schedule works on where they lie: nothing is packed from x, nothing is stored into y.
// around: the planes that y lies in, if it does, whose zeros are written too.
struct InPlace {
  bool x = false, y = false;
  const Planes* around = nullptr;
};

// compute(part index, block plan, panel, lanes): adds into the lanes of the part's channels, zeroed if `zero`.
template <class Compute>
void drive(const IsaKernels& isa, const Schedule& s, const std::vector<Part>& parts, int part_count,
           int in_channels, int out_channels, const TensorView& x, const TensorView& y, const Epilogue& e,
           int threads, bool zero, const Compute& compute, InPlace in_place = {}) {
  const std::int64_t panel_floats = in_place.x ? 0 : s.panel_floats(in_channels);
  const std::int64_t lane_stride = in_place.y ? y.stride[1] : s.output_stride();
  int widest = 0;
  for (const Part& p : parts) widest = std::max(widest, p.end - p.begin);
  // Odd numbers of cache lines keep neighbouring threads and buffers off each other's sets.
  const auto padded = [](std::int64_t n) { return (n + 15) / 16 * 16 + 16; };
  const std::int64_t lanes_floats = in_place.y ? 0 : padded(lane_stride * widest);
  const bool shared = part_count > 1;
  const std::int64_t strip_floats = e.residual.data ? padded(lane_stride * kFinishStrip) : 0;
  const std::int64_t each = lanes_floats + strip_floats + (shared ? 0 : padded(panel_floats));
  float* const memory =
      scratch(static_cast<std::size_t>(each * threads + (shared ? padded(panel_floats) : 0)));
  const int units = static_cast<int>(parts.size()) / part_count;  // convolution groups
  Tasks all;

  const auto one_part = [&](int index, int block, Channels<const float> panel, float* buffer) {
    const Part& p = parts[index];
    const int count = p.end - p.begin, first = p.group * out_channels + p.begin;
    if (count == 0) return;
    const Channels<float> lanes{in_place.y ? s.lanes_in(y, block, first) : buffer, lane_stride};
    if (zero && !in_place.y) std::fill(buffer, buffer + count * lane_stride, 0.f);
    if (zero && in_place.y)
      for (int k = 0; k < count; ++k) std::fill_n(lanes.at + k * lane_stride, s.output_floats(block), 0.f);
    compute(index, s.block(block), panel, lanes);
    s.finish(isa, y, e, block, first, count, lanes.at, lane_stride, buffer + lanes_floats, in_place.y);
    if (in_place.around) s.clear_around(*in_place.around, y, block, first, count);
  };
  const auto panel_of = [&](int block, int group, const float* packed) -> Channels<const float> {
    if (in_place.x) return {s.panel_in(x, block, group * in_channels), x.stride[1]};
    return {packed, s.channel_stride()};
  };

  run_team(threads, [&](const Team& team) {
    float* const lanes = memory + team.thread * each;
    if (!shared) {
      float* const panel = lanes + lanes_floats + strip_floats;
      const int tasks = s.block_count() * units;
      all.each(team, tasks, [&](int task) {
        const int block = task / units, unit = task % units, group = parts[unit].group;
        if (!in_place.x) s.pack(isa, x, block, group * in_channels, in_channels, 0, in_channels, panel);
        one_part(unit, block, panel_of(block, group, panel), lanes);
      });
      return;
    }
    float* const panel = memory + each * threads;
    if (in_place.x && s.block_count() == 1)
      fetch_from_others(team, static_cast<const float*>(x.data), in_channels * units, x.stride[1],
                        x.stride[1]);
    for (int task = 0; task < s.block_count() * units; ++task) {
      const int block = task / units, unit = task % units, group = parts[unit * part_count].group;
      if (!in_place.x) {
        if (task) team.barrier();
        s.pack(isa, x, block, group * in_channels, in_channels, static_cast<int>(team.begin(in_channels)),
               static_cast<int>(team.end(in_channels)), panel);
        team.barrier();
      }
      for (int p = team.thread; p < part_count; p += team.threads)
        one_part(unit * part_count + p, block, panel_of(block, group, panel), lanes);
    }
  });
}

// Calls fn(first vector, vectors) over a run in near-equal tiles of at most `most` vectors.
template <class Fn>
inline void each_tile(int vectors, int most, const Fn& fn) {
  const int tiles = (vectors + most - 1) / most;
  int at = 0;
  for (int t = 0; t < tiles; ++t) {
    const int here = (vectors - at + tiles - t - 1) / (tiles - t);
    fn(at, here);
    at += here;
  }
}

}  // namespace sk
