// Whether a layout and its tables keep a kernel within its patch, its slab and its accumulators.
#pragma once
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"

namespace sk::cuda {

class TableCheck {
 public:
  TableCheck(const Layout& layout, const std::vector<int>& tables) : l_(layout), t_(tables) {
    int last = 0;
    for (int section : {l_.items, l_.steps, l_.entries, l_.lists, l_.classes}) {
      require(section >= last && section <= size() && section % 4 == 0, "sections follow each other");
      last = section;
    }
    require(size() - l_.classes == 2 * l_.walk.classes, "a class has two integers");
    const Walk& w = l_.walk;
    rows_ = w.tile_n * w.patch_h * w.patch_w;
    last_row_ =
        ((w.tile_n - 1) * w.patch_h + (w.tile_h - 1) * w.row_h) * w.patch_w + (w.tile_w - 1) * w.row_w;
    bytes_ = l_.dtype == DType::f32 ? 4 : 2;
  }

  // Calls units(step) for every step: how many weight units it executes.
  template <class Units>
  void steps(const Units& units) const {
    const int count = (l_.entries - l_.steps) / 8;
    const long long items = 1LL * l_.groups * l_.tiles_out * l_.walk.classes * l_.splits;
    require(l_.steps - l_.items >= 2 * items, "an item has two integers");
    for (long long i = 0; i < items; ++i) {
      const int begin = t_[l_.items + 2 * i], end = t_[l_.items + 2 * i + 1];
      require(0 <= begin && begin <= end && end <= count, "an item's steps exist");
      require(begin == end || t_[l_.steps + 8 * begin + 3] == 1, "an item begins with a fresh patch");
    }
    for (int i = 0; i < count; ++i) {
      Step s;
      std::memcpy(&s, &t_[l_.steps + 8 * i], sizeof s);
      require(0 <= s.channel && s.channel < l_.group_in, "a step's channel exists");
      require(0 <= s.entries && s.entries <= s.entries_end, "a step's entries exist");
      require(0 <= s.weights && s.weight_units <= l_.slab, "a step's weights fit the slab");
      require(units(s) == s.weight_units, "a step executes the weights it loads");
    }
  }

  void fprop_ffma() const {
    steps([&](const Step& s) {
      int filters = 0;
      for (int e = s.entries; e < s.entries_end; ++e) {
        row(entry(4 * e));
        const int first = entry(4 * e + 1), count = entry(4 * e + 2);
        for (int i = first; i < first + count; ++i)
          require(0 <= list(i) && list(i) < l_.tile_out, "a filter lies in its tile");
        filters += count;
      }
      return filters;
    });
  }

  void dgrad_ffma() const {
    steps([&](const Step& s) {
      for (int i = s.entries; i < s.entries_end; ++i) place(list(i), l_.pitch, l_.chunk, false);
      return s.entries_end - s.entries;
    });
  }

  void fprop_mma() const {
    require(l_.width == 8 || l_.width == 16, "width is 8 or 16 blocks");
    steps([&](const Step& s) {
      const int channels = l_.group_in - s.channel < l_.chunk ? l_.group_in - s.channel : l_.chunk;
      int fragments = 0;
      for (int e = s.entries; e < s.entries_end; ++e) {
        row(entry(2 * e));
        for (int b = 0; b < 31; ++b)
          if (entry(2 * e + 1) >> b & 1) {
            require(b < l_.width, "a block has accumulators");
            fragments += (channels * bytes_ + 63) / 64;
          }
      }
      return fragments;
    });
    const int stride = 4 + 4 * l_.tile_out;
    for (int tile = 0; tile < l_.groups * l_.tiles_out; ++tile) {
      require(list(tile * stride) >= 1 && list(tile * stride) <= 4, "a filter has one to four columns");
      for (int i = 4; i < stride; ++i)
        require(0 <= list(tile * stride + i) && list(tile * stride + i) <= 8 * l_.width, "a column exists");
    }
  }

  void dgrad_mma() const {
    require(l_.width == 2 || l_.width == 4, "width is 2 or 4 tiles of channels");
    steps([&](const Step& s) {
      for (int i = s.entries; i < s.entries_end; ++i) place(list(i), l_.chunk * bytes_, l_.pitch, true);
      return (s.entries_end - s.entries) * bytes_ / 32;
    });
  }

  void wgrad_ffma() const { wgrad(8, 1, 8, l_.groups * l_.group_out); }

  void wgrad_mma() const {
    require(l_.width == 2 || l_.width == 4, "width is 2 or 4 tiles of channels");
    wgrad(4, 8, 8, l_.slab);
  }

  // A tile of filters: segments, their end, group; a segment: origin, phase, blocks, their end, taps, their count; a block:
  // first and last of its bundle, filters of y, and its octets.
  void fprop_sm90() const {
    const Walk& w = l_.walk;
    const int n = l_.width, phases = w.in_step_h * w.in_step_w;
    require(l_.dtype != DType::f32, "16-bit values");
    require(n == 64 || n == 96 || n == 128 || n == 192, "width is 64, 96, 128 or 192 columns");
    require(l_.pitch == 128 || (l_.pitch == 256 && n == 64), "a block has 128 rows, or 256 of 64 columns");
    require(rows_ <= l_.pitch && w.tile_n * w.tile_h * w.tile_w <= l_.pitch, "a patch and a tile have rows");
    require(w.in_step_h <= 4 && w.in_step_w <= 4 && phases <= 4, "at most four phases of the stride");
    require(w.patch_h <= 256 && w.patch_w <= 256 && w.tile_n <= 256, "a patch fits a box");
    require(w.classes == 1 && l_.splits == 1 && l_.slab >= 2 && l_.slab <= 64 && l_.chunk <= 64,
            "two to 64 stages, one class, no splits");
    const int filter_tiles = l_.groups * l_.tiles_out;
    const int record = 8 + n / 4;  // a block and its octets
    const int segments = (l_.entries - l_.steps) / 8, blocks = (l_.lists - l_.entries) / record;
    require((l_.steps - l_.items) / 4 >= filter_tiles, "a tile of filters has four integers");
    for (int i = 0; i < filter_tiles; ++i) {
      const int* f = &t_[l_.items + 4 * i];
      require(0 <= f[2] && f[2] < l_.groups, "a group exists");
      require(0 <= f[0] && f[0] < f[1] && f[1] <= segments, "segments exist");
      bool open = false;
      for (int g = f[0]; g < f[1]; ++g) {
        const int* s = &t_[l_.steps + 8 * g];
        require(0 <= s[2] && s[2] < phases && s[2] / w.in_step_w < w.in_h && s[2] % w.in_step_w < w.in_w,
                "a phase has pixels");
        require(0 <= s[3] && s[3] < s[4] && s[4] <= blocks, "blocks exist");
        require(s[5] % 2 == 0 && 0 <= s[6] && s[6] <= 32, "a phase has at most 32 taps, aligned");
        for (int t = 0; t < s[6]; ++t) {
          stays(list(s[5] + 2 * t), s[0], w.in_h, w.in_step_h, s[2] / w.in_step_w, w.out_h, w.tile_h,
                w.patch_h);
          stays(list(s[5] + 2 * t + 1), s[1], w.in_w, w.in_step_w, s[2] % w.in_step_w, w.out_w, w.tile_w,
                w.patch_w);
        }
        for (int b = s[3]; b < s[4]; ++b) open = bundled(&t_[l_.entries + record * b], s, f[2], open);
      }
      require(!open, "a bundle ends in its tile");
    }
  }

  // A tile: phase, first pixel, first row and rows of its patch; a phase: group, place, extent, taps, their count, steps,
  // their end.
  void dgrad_sm90() const {
    const Walk& w = l_.walk;
    const int n = l_.width, chunks = (l_.group_in + 63) / 64, box = w.load_w;
    require(l_.dtype != DType::f32, "16-bit values");
    require(n == 64 || n == 128 || n == 256, "width is 64, 128 or 256 channels");
    require(l_.group_in % 8 == 0 && l_.group_out % 8 == 0, "channels come in pieces of 16 bytes");
    require(box <= 256 && l_.pitch % 1024 == 0 && (l_.chunk + box - 1) / box * box * 128 + 128 <= l_.pitch,
            "a patch and its zeros have room");
    require(l_.slab >= 2 && l_.splits == 1 && w.load_h <= 2, "two stages, no splits");
    require(static_cast<long long>(l_.tiles_out) * n >= l_.group_out, "tiles of channels hold them all");
    const int phases = w.classes, steps = (l_.lists - l_.entries) / 80;
    const long long images = w.images, pixels = images * w.in_h * w.in_w;
    require(l_.entries - l_.steps >= 12 * phases, "a phase has twelve integers");
    require(l_.steps - l_.items >= 8 * w.tiles_n, "a tile has eight integers");
    for (int i = 0; i < phases; ++i) {
      const int* f = &t_[l_.steps + 12 * i];
      require(0 <= f[0] && f[0] < l_.groups, "a group exists");
      require(0 <= f[1] && 0 <= f[2] && f[3] > 0 && f[4] > 0 && f[1] + (f[3] - 1) * w.out_step_h < w.out_h &&
                  f[2] + (f[4] - 1) * w.out_step_w < w.out_w && images * f[3] * f[4] < 1LL << 31,
              "a phase's pixels lie in dx");
      require(0 <= f[6] && f[6] <= 32, "a phase has at most 32 taps");
      require(f[5] % 2 == 0, "taps are aligned");
      for (int t = 0; t < 2 * f[6]; ++t) list(f[5] + t);
      require(0 <= f[7] && f[7] < f[8] && f[8] <= steps && f[8] - f[7] <= w.patch_w,
              "steps exist and have room");
      for (int s = f[7]; s < f[8]; ++s) {
        const int* step = &t_[l_.entries + 80 * s];
        for (int e = 0; e < 64; ++e) {
          const int at = step[e], filter = at / l_.pitch * 64 + at % l_.pitch / 2;
          require(
              at >= 0 && at % 2 == 0 && at % l_.pitch < 128 && at / l_.pitch < chunks && filter < l_.group_in,
              "a filter lies in its pixel");
        }
        for (int e = 0; e < 8; ++e) {  // a bit of no tap is never met
          const unsigned bit = static_cast<unsigned>(step[64 + 2 * e]);
          int t = 0;
          while (t < f[6] && bit != 1u << t) ++t;
          require(bit == 0 || (t < f[6] && step[65 + 2 * e] ==
                                               -(list(f[5] + 2 * t) * w.in_w + list(f[5] + 2 * t + 1)) * 128),
                  "a step's tap is the phase's");
        }
      }
    }
    // Every pixel that a tap reads has to lie in the patch; the kernel does not look.
    for (int i = 0; i < w.tiles_n; ++i) {
      const int* tile = &t_[l_.items + 8 * i];
      require(0 <= tile[0] && tile[0] < phases && tile[1] >= 0, "a tile's phase exists");
      require(0 <= tile[2] && 0 <= tile[3] && tile[3] <= l_.chunk && tile[2] + tile[3] <= pixels,
              "a patch lies in dy");
      const int* f = &t_[l_.steps + 12 * tile[0]];
      require(tile[1] == (tile[4] * f[3] + tile[5]) * f[4] + tile[6] && 0 <= tile[5] && tile[5] < f[3] &&
                  0 <= tile[6] && tile[6] < f[4],
              "a tile begins at its first pixel");
      bool stays = true;
      for (int m = 0, n = tile[4], i = tile[5], j = tile[6]; m < 128 && n < images; ++m) {
        for (int t = 0; t < f[6]; ++t) {
          const int p = i - t_[l_.lists + f[5] + 2 * t], q = j - t_[l_.lists + f[5] + 2 * t + 1];
          if (p < 0 || p >= w.in_h || q < 0 || q >= w.in_w) continue;
          const long long at = (n * static_cast<long long>(w.in_h) + p) * w.in_w + q - tile[2];
          stays = stays && 0 <= at && at < tile[3];
        }
        if (++j == f[4]) j = 0, ++i;
        if (i == f[3]) i = 0, ++n;
      }
      require(stays, "a tap stays in its patch");
    }
  }

  // A tile as dgrad's; a phase is a tile of filters, its taps are its steps', with their signs as they are.
  void fprop_taps_sm90() const {
    const Walk& w = l_.walk;
    const int chunks = (l_.group_in + 63) / 64, padded = chunks > 1 ? (chunks + 1) / 2 * 2 : 1;
    const int box = w.load_w, phases = l_.groups * l_.tiles_out;
    require(l_.dtype != DType::f32, "16-bit values");
    require((l_.tile_out == 64 || l_.tile_out == 128) && (l_.width == 64 || l_.width == 128) &&
                l_.width <= l_.tile_out,
            "a tile has 64 or 128 filters, and so has what shares columns");
    require(l_.group_in % 8 == 0, "channels come in pieces of 16 bytes");
    require(l_.groups == 1 || l_.group_in == padded * 64, "channels of a group are not read with another's");
    require(box <= 256 && (box >= l_.chunk || box % 8 == 0) && l_.pitch % 1024 == 0 && l_.pitch >= 1024 &&
                l_.chunk <= 1 << 15 && (l_.chunk + box - 1) / box * box * 128 + 128 <= l_.pitch,
            "a patch and its zeros have room");
    require(static_cast<long long>(padded) * l_.pitch <= 1 << 18 && w.patch_w <= 1 << 10,
            "a tile fits shared memory");
    require(l_.slab >= 2 && l_.slab <= 64 && l_.splits == 1 && w.load_h <= 2, "two stages, no splits");
    require(w.tile_n == 192 && w.in_step_h == 1 && w.in_step_w == 1 && w.out_step_h == 1 && w.out_step_w == 1,
            "a tile has 192 pixels, a stride is 1");
    require(static_cast<long long>(l_.tiles_out) * l_.tile_out >= l_.group_out,
            "tiles of filters hold them all");
    require(w.classes == phases && w.tiles_n % l_.groups == 0, "every tile of filters has steps");
    const int steps = w.row_w, of_group = w.tiles_n / l_.groups;
    const long long images = w.images, pixels = images * w.in_h * w.in_w;
    require(pixels < 1LL << 31 && images * w.out_h * w.out_w < 1LL << 31, "32 bits number all pixels");
    require(l_.lists - l_.entries >= 2LL * steps, "a step has two integers");
    require(l_.entries - l_.steps >= 12 * phases, "a phase has twelve integers");
    require(l_.steps - l_.items >= 8 * w.tiles_n, "a tile has eight integers");
    std::vector<std::vector<std::pair<int, int>>> taps(l_.groups);
    for (int i = 0, next = 0; i < phases; ++i) {
      const int* f = &t_[l_.steps + 12 * i];
      const int group = i / l_.tiles_out, first = i % l_.tiles_out * l_.tile_out;
      require(f[0] == group && f[1] == 0 && f[2] == 0 && f[3] == w.out_h && f[4] == w.out_w,
              "a phase is its group's");
      require(f[7] == next && f[7] < f[8] && f[8] <= steps && f[8] - f[7] <= w.patch_w,
              "steps follow each other and have room");
      require(f[9] == group * l_.group_out + first && f[10] > 0 &&
                  f[10] == std::min(l_.tile_out, l_.group_out - first),
              "tiles of filters follow each other");
      next = f[8];
      for (int s = f[7]; s < f[8]; ++s) taps[group].emplace_back(entry(2 * s), entry(2 * s + 1));
    }
    for (auto& of : taps) {
      std::sort(of.begin(), of.end());
      of.erase(std::unique(of.begin(), of.end()), of.end());
    }
    // Every pixel that a tap reads has to lie in the patch; the kernel does not look.
    for (int i = 0; i < w.tiles_n; ++i) {
      const int* tile = &t_[l_.items + 8 * i];
      require(tile[0] == i / of_group, "a tile's group exists");
      require(0 <= tile[2] && 0 <= tile[3] && tile[3] <= l_.chunk && pixels - tile[2] >= tile[3],
              "a patch lies in x");
      require(tile[1] == i % of_group * w.tile_n && 0 <= tile[4] && tile[4] < std::max(1LL, images) &&
                  0 <= tile[5] && tile[5] < w.out_h && 0 <= tile[6] && tile[6] < w.out_w &&
                  tile[1] == (static_cast<long long>(tile[4]) * w.out_h + tile[5]) * w.out_w + tile[6],
              "a tile begins at its first pixel");
      bool stays = true;
      for (int m = 0, n = tile[4], p = tile[5], q = tile[6]; m < w.tile_n && n < images; ++m) {
        for (const auto& tap : taps[tile[0]]) {
          const long long h = static_cast<long long>(p) + tap.first,
                          v = static_cast<long long>(q) + tap.second;
          if (h < 0 || h >= w.in_h || v < 0 || v >= w.in_w) continue;
          const long long at = (n * static_cast<long long>(w.in_h) + h) * w.in_w + v - tile[2];
          stays = stays && 0 <= at && at < tile[3];
        }
        if (++q == w.out_w) q = 0, ++p;
        if (p == w.out_h) p = 0, ++n;
      }
      require(stays, "a tap stays in its patch");
    }
  }

  // A tile of pixels of x as dgrad's; a phase is a block of stripes, with its taps.
  void wgrad_sm90() const {
    const Walk& w = l_.walk;
    const int chunks = l_.tile_out / 64, box = w.load_w;
    require(l_.dtype != DType::f32, "16-bit values");
    require(l_.width == 64 || l_.width == 128, "width is 64 or 128 channels");
    require(w.tile_n == 64 || w.tile_n == 128, "a tile has 64 or 128 pixels");
    require(w.in_step_h == 1 && w.in_step_w == 1 && w.out_step_h == 1 && w.out_step_w == 1, "a stride is 1");
    require(l_.group_in % 8 == 0 && l_.group_out % 8 == 0, "channels come in pieces of 16 bytes");
    require(l_.tile_out % 64 == 0 && chunks >= 1 && chunks <= 64, "a patch has whole rows of filters");
    require(box <= 256 && (box >= l_.chunk || box % 8 == 0) && l_.pitch % 1024 == 0 && l_.pitch >= 1024 &&
                l_.chunk <= 1 << 15 && (l_.chunk + box - 1) / box * box * 128 + 1024 <= l_.pitch,
            "a patch and its zeros have room");
    require(static_cast<long long>(chunks) * l_.pitch <= 1 << 16 && w.patch_w <= 64,
            "16 bits tell places in a patch, and there are few taps");
    require(l_.slab >= 2 && l_.slab <= 64, "two to 64 stages");
    require(w.tiles_h == 1 && w.tiles_w == 1 && l_.splits <= std::max(1, w.tiles_n),
            "every share has a tile");
    const int blocks = (l_.entries - l_.steps) / 12;  // none where no stripe lives: nothing is launched then
    const int stripes = (l_.lists - l_.entries) / 4;
    const long long images = w.images, pixels = images * w.in_h * w.in_w;
    require(pixels < 1LL << 31 && images * w.out_h * w.out_w < 1LL << 31, "32 bits number all pixels");
    require(blocks == 0 || blocks == l_.tiles_out, "a block has twelve integers");
    require(stripes == 192 * blocks, "a block has 192 stripes of four integers");
    require(l_.steps - l_.items >= 8LL * w.tiles_n, "a tile has eight integers");
    std::vector<std::pair<int, int>> taps;
    std::vector<int> rows;
    for (int i = 0; i < blocks; ++i) {
      const int* f = &t_[l_.steps + 12 * i];
      require(0 <= f[0] && f[0] < l_.groups && f[1] == 0 && f[2] == 0 && f[3] == w.out_h && f[4] == w.out_w,
              "a block's group exists, its pixels are all");
      require(f[5] % 2 == 0 && 0 < f[6] && f[6] <= w.patch_w, "a block has taps, aligned");
      for (int t = 0; t < f[6]; ++t) taps.emplace_back(list(f[5] + 2 * t), list(f[5] + 2 * t + 1));
      require(f[7] == 192 * i && 0 < f[10] && f[10] <= 192 && f[10] % 64 == 0, "stripes follow each other");
      for (int e = 0; e < 192; ++e) {
        const int* stripe = &t_[l_.entries + 4 * (f[7] + e)];
        require(0 <= stripe[0] && stripe[0] % 2 == 0 && stripe[0] / l_.pitch < chunks &&
                    stripe[0] % l_.pitch < 128,
                "a filter lies in its pixel");
        require(0 <= stripe[1] && stripe[1] < f[6], "a stripe's tap exists");
        if (stripe[2] < 0) continue;
        require(e < f[10], "a stripe has a warpgroup");
        const long long filter =
            static_cast<long long>(f[9]) + stripe[0] / l_.pitch * 64 + stripe[0] % l_.pitch / 2;
        require(f[9] >= 0 && filter / l_.group_out == f[0], "filters lie in their group");
        rows.push_back(stripe[2]);
      }
    }
    std::sort(rows.begin(), rows.end());
    for (std::size_t i = 0; i < rows.size(); ++i)
      require(rows[i] == static_cast<int>(i), "every row of dw has one stripe");
    std::sort(taps.begin(), taps.end());
    taps.erase(std::unique(taps.begin(), taps.end()), taps.end());
    // Every pixel that a tap meets has to lie in the patch; the kernel does not look.
    for (int i = 0; i < w.tiles_n; ++i) {
      const int* tile = &t_[l_.items + 8 * i];
      require(0 <= tile[2] && 0 <= tile[3] && tile[3] <= l_.chunk && pixels - tile[2] >= tile[3],
              "a patch lies in dy");
      require(tile[1] == i * w.tile_n && 0 <= tile[4] && tile[4] < std::max(1LL, images) && 0 <= tile[5] &&
                  tile[5] < w.out_h && 0 <= tile[6] && tile[6] < w.out_w &&
                  tile[1] == (static_cast<long long>(tile[4]) * w.out_h + tile[5]) * w.out_w + tile[6],
              "a tile begins at its first pixel");
      bool stays = true;
      for (int m = 0, n = tile[4], h = tile[5], v = tile[6]; m < w.tile_n && n < images; ++m) {
        for (const auto& tap : taps) {
          const long long p = static_cast<long long>(h) - tap.first,
                          q = static_cast<long long>(v) - tap.second;
          if (p < 0 || p >= w.in_h || q < 0 || q >= w.in_w) continue;
          const long long at = (n * static_cast<long long>(w.in_h) + p) * w.in_w + q - tile[2];
          stays = stays && 0 <= at && at < tile[3];
        }
        if (++v == w.out_w) v = 0, ++h;
        if (h == w.out_h) h = 0, ++n;
      }
      require(stays, "a tap stays in its patch");
    }
  }

  // A tile of filters: taps, their end, first filter, count; a tap: rows of the patch from a position to what it reads. A
  // block reads 64 rows from each, whether its positions exist or not; those that do have to find theirs in the box.
  void fprop_whole_sm90() const {
    const Walk& w = l_.walk;
    const long long chunks = (l_.group_in + 63) / 64, width = w.patch_w, box = width * w.patch_h;
    require(l_.dtype != DType::f32, "16-bit values");
    require((l_.width == 64 || l_.width == 128) && l_.tile_out == l_.width, "a tile has 64 or 128 filters");
    require(l_.group_in % 8 == 0, "channels come in pieces of 16 bytes");
    require(w.patch_h <= 256 && width <= 256 && w.tile_n == 1 && w.tile_h == 1, "a patch is one box");
    require(w.in_step_h == 1 && w.in_step_w == 1 && w.out_step_h == 1 && w.out_step_w == 1 &&
                w.classes == 1 && l_.splits == 1,
            "a stride is 1, one class, no splits");
    require(w.load_w <= 3 && w.load_h <= 64 && w.load_h >= chunks,
            "a tile has 1 to 3 blocks, and its patches room");
    require(l_.slab <= 64 && l_.slab * chunks * l_.width <= 1 << 11 && l_.pitch <= 1 << 18 &&
                l_.pitch % 1024 == 0 && box * 128 <= l_.pitch,
            "weights and a patch fit shared memory");
    const long long positions = (w.out_h - 1LL) * width + w.tile_w, reads = 64LL * w.load_w, step = w.row_h;
    require(w.tiles_n == w.images && 1LL * w.tiles_w * w.tile_w >= w.out_w && w.tiles_h * step >= positions &&
                (w.tiles_h - 1LL) * step < positions && 1LL * w.images * w.tiles_h * w.tiles_w < 1LL << 30 &&
                w.out_h * width < 1LL << 31,
            "tiles hold all positions");
    require(step <= reads || (step % width == 0 && step <= reads + width - w.tile_w),
            "what lies between two tiles is not stored");
    const int tiles = l_.groups * l_.tiles_out;
    require(1LL * l_.tiles_out * l_.tile_out >= l_.group_out, "tiles of filters hold them all");
    require(l_.steps - l_.items >= 4 * tiles && l_.entries - l_.steps >= 4,
            "a tile of filters has four integers");
    long long reach = 0;
    for (int i = 0, next = 0; i < tiles; ++i) {
      const int* f = &t_[l_.items + 4 * i];
      const int group = i / l_.tiles_out, first = i % l_.tiles_out * l_.tile_out;
      require(f[0] == next && f[0] <= f[1] && f[1] - f[0] <= l_.slab, "taps follow each other and have room");
      require(f[2] == group * l_.group_out + first && f[3] > 0 &&
                  f[3] == std::min(l_.tile_out, l_.group_out - first),
              "tiles of filters follow each other");
      next = f[1];
      for (int tap = f[0]; tap < f[1]; ++tap) {
        require(entry(tap) >= 0, "a tap stays in its patch");
        reach = std::max<long long>(reach, entry(tap));
      }
    }
    for (int t = 0; t < w.tiles_h; ++t) {
      const long long first = t * step, shift = first % width;
      const long long count = std::min(std::min(step, reads), positions - first);
      require(shift + count + reach <= box && (shift + reads + reach) * 128 <= l_.pitch,
              "a tap stays in its patch");
    }
  }

  static void require(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument("stripe_kernels._cuda: tables do not hold: " + what);
  }

 private:
  // Blocks of `warps` warps with `per_warp` runs of so many stripes each.
  void wgrad(int warps, int per_warp, int stripes, int filters) const {
    const int blocks = (l_.steps - l_.items) / 4;  // none where no stripe lives: nothing is launched then
    require(blocks == 0 || blocks == l_.tiles_out, "a block has four integers");
    for (int block = 0; block < blocks; ++block) {
      const int group = t_[l_.items + 4 * block], filter = t_[l_.items + 4 * block + 3];
      require(0 <= group && group < l_.groups && 0 <= filter && filter < l_.group_out, "a group exists");
      for (int i = 0; i < warps * per_warp; ++i) {
        if (entry(block * warps * per_warp + i) >= 0) row(entry(block * warps * per_warp + i));
        for (int j = 0; j < stripes; ++j) {
          const int k = list(2 * ((block * warps * per_warp + i) * stripes + j) + 1);
          require(0 <= k && k < filters, "a stripe's filter exists");
        }
      }
    }
  }

  // Along one axis: whatever pixel of the image a tap reads lies in its tile's patch; the kernel does not look.
  static void stays(int tap, int origin, int in, int step, int phase, int out, int tile, int patch) {
    const int size = (in - phase + step - 1) / step;
    bool stays = true;
    for (int p = 0; p < out; ++p) {
      const long long read = static_cast<long long>(p) + tap, at = read - p / tile * tile - origin;
      stays = stays && (read < 0 || read >= size || (0 <= at && at < patch));
    }
    require(stays, "a tap stays in its patch");
  }

  // One block of a bundle, and whether the bundle goes on behind it.
  bool bundled(const int* b, const int* segment, int group, bool open) const {
    require(b[0] == (open ? 0 : 1) && (b[1] == 0 || b[1] == 1), "bundles follow each other");
    require(b[3] > 0 && b[3] <= 64, "a bundle has 1 to 64 filters");
    require(b[2] >= group * l_.group_out && b[2] <= (group + 1) * l_.group_out - b[3],
            "filters lie in their group");
    for (int o = 0; o < l_.width / 8; ++o) {  // a bit of no tap is never met
      const unsigned bit = static_cast<unsigned>(b[8 + 2 * o]);
      const int row = b[8 + 2 * o + 1];
      int t = 0;
      while (t < segment[6] && bit != 1u << t) ++t;
      require(
          bit == 0 || (t < segment[6] && row == (list(segment[5] + 2 * t) - segment[0]) * l_.walk.patch_w +
                                                    list(segment[5] + 2 * t + 1) - segment[1]),
          "an octet's tap is the phase's");
    }
    return b[1] == 0;
  }

  int size() const { return static_cast<int>(t_.size()); }
  int at(int section, int end, int i) const {
    require(i >= 0 && i < end - section, "an index lies in its section");
    return t_[section + i];
  }
  int entry(int i) const { return at(l_.entries, l_.lists, i); }
  int list(int i) const { return at(l_.lists, l_.classes, i); }
  void row(int offset) const {
    require(0 <= offset && offset + last_row_ < rows_, "a tap stays in its patch");
  }
  // A place in the patch: planes of rows (ffma: plane * pitch + row), or rows of bytes (mma: row * pitch +
  // byte).
  void place(int where, int inner, int outer, bool rows) const {
    require(where >= 0, "a place in the patch is not negative");
    if (rows) {
      row(where / outer);
      require(where % outer < inner && where % bytes_ == 0, "a filter lies in its chunk");
    } else {
      row(where % inner);
      require(where / inner < outer, "a filter lies in its chunk");
    }
  }

  const Layout& l_;
  const std::vector<int>& t_;
  int rows_, last_row_, bytes_;
};

}  // namespace sk::cuda
