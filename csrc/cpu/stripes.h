// Live stripes as flat arrays, computed once per skeleton in Python (stripe_kernels/packed.py), sorted by
// (convolution group, tap, filter).
#pragma once
#include <cstdint>
#include <vector>

namespace sk {

struct Stripes {
  int groups = 1, taps = 0;
  std::vector<std::int32_t> tap_ptr;  // [groups * taps + 1]: where the stripes of (group, tap) begin
  std::vector<std::int32_t> filter;   // [A] filter, counted within its group
  std::vector<std::int32_t> row;      // [A] row of the weight [A, C/groups]

  int count() const { return static_cast<int>(filter.size()); }
  int begin(int group, int tap) const { return tap_ptr[group * taps + tap]; }
  int end(int group, int tap) const { return tap_ptr[group * taps + tap + 1]; }

  std::vector<bool> live_taps() const {
    std::vector<bool> live(taps);
    for (int g = 0; g < groups; ++g)
      for (int t = 0; t < taps; ++t)
        if (begin(g, t) < end(g, t)) live[t] = true;
    return live;
  }
};

// n filters (or channels) in the fewest tiles of at most `most`, as even as possible: 9 -> 5 + 4, never 8 + 1.
template <class Fn>
void split_evenly(int n, int most, Fn fn) {
  const int parts = (n + most - 1) / most;
  for (int p = 0; p < parts; ++p) fn(static_cast<int>(static_cast<std::int64_t>(n) * p / parts),
                                     static_cast<int>(static_cast<std::int64_t>(n) * (p + 1) / parts));
}

}  // namespace sk
