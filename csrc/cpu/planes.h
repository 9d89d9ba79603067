// Planes: how a float32 map [N, C, H, W] lies between calls so that pixel lanes read and write it where it is.
//
// Rows are `pitch` >= W floats apart and a margin follows every channel and precedes the first; all that is not a pixel is
// zero. So the zeros right of a row are also those left of the next one, and a tap above or below the map reads the margin.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/tensor.h"

namespace sk {

// Floats: a vector's lanes but one, and how far a tap reaches sideways.
constexpr int kPlaneMargin = 32;

// Floats from one channel to the next: an odd number of cache lines. With 9 rows of 57 pixels, 2 KB, all channels of a panel
// met in two sets of L1: 12 % of a 64-channel layer.
inline std::int64_t spread(std::int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

struct Planes {
  int n = 0, c = 0, h = 0, w = 0, pitch = 0;  // pitch 0: the tensor lies otherwise

  std::int64_t channel_floats() const { return spread(static_cast<std::int64_t>(h) * pitch + kPlaneMargin); }
  std::int64_t floats() const { return kPlaneMargin + channel_floats() * c * n; }
  // Zeros around the pixels, which are left as they are.
  void clear(void* data) const {
    float* at = static_cast<float*>(data);
    std::fill(at, at + kPlaneMargin, 0.f);
    at += kPlaneMargin;
    const std::int64_t size = static_cast<std::int64_t>(h) * pitch;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(n) * c; ++i, at += channel_floats()) {
      if (pitch == w + 1)
        for (int row = 0; row < h; ++row) at[static_cast<std::int64_t>(row) * pitch + w] = 0.f;
      else
        for (int row = 0; row < h; ++row) {
          float* const end = at + static_cast<std::int64_t>(row) * pitch;
          std::fill(end + w, end + pitch, 0.f);
        }
      std::fill(at + size, at + channel_floats(), 0.f);
    }
  }
};

}  // namespace sk
