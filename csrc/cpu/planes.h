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
  // Zeros around rows [row0, row1) of channels [c0, c1) of an image, whose pixels are left as they are: behind each row, and
  // what follows a channel's last and precedes the first channel's first. pixels: the first one of them all.
  void clear_around(float* pixels, int image, int c0, int c1, int row0, int row1) const {
    if (image == 0 && c0 == 0 && row0 == 0) std::fill(pixels - kPlaneMargin, pixels, 0.f);
    const std::int64_t size = static_cast<std::int64_t>(h) * pitch;
    float* at = pixels + (static_cast<std::int64_t>(image) * c + c0) * channel_floats();
    for (int i = c0; i < c1; ++i, at += channel_floats()) {
      if (pitch == w + 1)
        for (int row = row0; row < row1; ++row) at[static_cast<std::int64_t>(row) * pitch + w] = 0.f;
      else
        for (int row = row0; row < row1; ++row) {
          float* const end = at + static_cast<std::int64_t>(row) * pitch;
          std::fill(end + w, end + pitch, 0.f);
        }
      if (row1 == h) std::fill(at + size, at + channel_floats(), 0.f);
    }
  }
};

// What of a kernel's call lies in planes: x, to be read there if it can; y, whose zeros the kernel writes where it wrote
// pixels, while they are near.
struct InPlanes {
  bool x = false;
  const Planes* y = nullptr;
};

}  // namespace sk
