// Live stripes as flat arrays, computed once per skeleton in Python (stripe_kernels/packed.py), sorted by
// (convolution group, tap, filter).
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/conv_shape.h"

namespace sk {

struct Stripes {
  int groups = 1, taps = 0;
  std::vector<std::int32_t> tap_ptr;  // [groups * taps + 1]: where the stripes of (group, tap) begin
  std::vector<std::int32_t> filter;   // [A] filter, counted within its group
  std::vector<std::int32_t> row;      // [A] row of the weight [A, C/groups]

  int count() const { return static_cast<int>(filter.size()); }
  int begin(int group, int tap) const { return tap_ptr[group * taps + tap]; }
  int end(int group, int tap) const { return tap_ptr[group * taps + tap + 1]; }

  // Stripes of one tap whose filter lies in [k0, k1).
  std::pair<int, int> within(int group, int tap, int k0, int k1) const {
    const auto first = filter.begin() + begin(group, tap), last = filter.begin() + end(group, tap);
    return {static_cast<int>(std::lower_bound(first, last, k0) - filter.begin()),
            static_cast<int>(std::lower_bound(first, last, k1) - filter.begin())};
  }
  // Multiply-adds of each filter of a group, per pixel; a dead filter still is an output to write.
  std::vector<int> work(int group, int filters, int channels) const {
    std::vector<int> w(filters, 1);
    for (int i = begin(group, 0); i < end(group, taps - 1); ++i) w[filter[i]] += channels;
    return w;
  }
  std::vector<bool> live_taps() const {
    std::vector<bool> live(taps);
    for (int g = 0; g < groups; ++g)
      for (int t = 0; t < taps; ++t)
        if (begin(g, t) < end(g, t)) live[t] = true;
    return live;
  }
};

// Channels of a tap whose products are summed before they join y. One sum of up to 256 is mostly no worse than torch's. Of more,
// of an image of few pixels, and in 1x1 filters on small maps, torch adds several sums: one of 512 was 2.9 times as far from
// float64, and filters of one tap left the error budget.
inline int channel_chain(const ConvShape& s) {
  const std::int64_t pixels = std::int64_t{s.P} * s.Q;
  if (s.N * pixels < 16 || (s.taps() == 1 && pixels < 16)) return 32;
  return s.group_c() <= 256 ? 256 : 128;
}

// n filters (or channels) in the fewest tiles of at most `most`, as even as possible: 9 -> 5 + 4, never 8 + 1.
template <class Fn>
void split_evenly(int n, int most, Fn fn) {
  const int parts = (n + most - 1) / most;
  for (int p = 0; p < parts; ++p)
    fn(static_cast<int>(static_cast<std::int64_t>(n) * p / parts),
       static_cast<int>(static_cast<std::int64_t>(n) * (p + 1) / parts));
}

}  // namespace sk
