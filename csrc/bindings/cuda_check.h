// Whether a layout and its tables keep a kernel within its patch, its slab and its accumulators.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>
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

  // A tile of filters: channel, count, segments, their end, blocks, group; a segment: origin, phase, blocks, their end.
  void fprop_sm90() const {
    const Walk& w = l_.walk;
    const int n = l_.width, phases = w.in_step_h * w.in_step_w, pitch = l_.pitch;
    require(l_.dtype != DType::f32, "16-bit values");
    require(n == 64 || n == 128 || n == 256, "width is 64, 128 or 256 columns");
    require(rows_ <= (n == 64 ? 256 : n == 128 ? 128 : 64), "a patch has accumulators");
    require(w.in_step_h <= 4 && w.in_step_w <= 4 && phases <= 4, "at most four phases of the stride");
    require(w.patch_h <= 256 && w.patch_w <= 256 && w.tile_n <= 256, "a patch fits a box");
    require(w.classes == 1 && l_.splits == 1 && l_.slab >= 2, "one class, no splits, two stages");
    require(pitch % 2 == 0 && pitch >= l_.tile_out + l_.tile_out % 2,
            "sums have room for the filters, in pairs");
    require((l_.steps - l_.items) / 8 >= l_.groups * l_.tiles_out, "a tile of filters has eight integers");
    const int segments = (l_.entries - l_.steps) / 8, blocks = (l_.classes - l_.lists) / n;
    require(l_.lists - l_.entries >= blocks, "a block has its number of rounds");
    for (int i = 0; i < l_.groups * l_.tiles_out; ++i) {
      const int* f = &t_[l_.items + 8 * i];
      require(0 <= f[5] && f[5] < l_.groups && f[1] > 0 && f[1] <= l_.tile_out, "filters exist");
      require(f[0] >= f[5] * l_.group_out && f[0] + f[1] <= (f[5] + 1) * l_.group_out,
              "filters lie in their group");
      require(0 <= f[2] && f[2] <= f[3] && f[3] <= segments, "segments exist");
      int sum = 0;
      for (int g = f[2]; g < f[3]; ++g) {
        const int* s = &t_[l_.steps + 8 * g];
        require(0 <= s[2] && s[2] < phases && s[2] / w.in_step_w < w.in_h && s[2] % w.in_step_w < w.in_w,
                "a phase has pixels");
        require(0 <= s[3] && s[3] < s[4] && s[4] <= blocks, "blocks exist");
        sum += s[4] - s[3];
      }
      require(sum == f[4], "blocks are counted");
    }
    for (int b = 0; b < blocks; ++b) require(0 <= entry(b) && entry(b) <= n / 32, "rounds exist");
  }

  static void require(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument("stripe_kernels._cuda: tables do not hold: " + what);
  }

 private:
  int size() const { return static_cast<int>(t_.size()); }
  int at(int section, int end, int i) const {
    require(i >= 0 && section + i < end, "an index lies in its section");
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
