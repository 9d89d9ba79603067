// y[n, k, p, q] = epilogue( sum over live taps t of filter k, sum over c of  w[row(k, t), c] * x[n, c, p', q'] )
// with p' = p * stride_h + r * dil_h - pad_top, q' likewise, t = (r, s).
//
// Every tap has its own packed list of filters, cut into tiles of 4 to 8: exact at one filter. Accumulators go to the
// lanes of y after each tap; this costs 3 memory operations per C multiply-adds and is why C < 32 is less efficient.
#pragma once
#include <memory>
#include <vector>

#include "core/conv_shape.h"
#include "cpu/driver.h"
#include "cpu/planes.h"
#include "cpu/stripes.h"

namespace sk {

class Fprop {
 public:
  // `paired`: bfloat16 products on cells of two neighbouring channels; x is bfloat16, C/groups even, and the set has them.
  Fprop(const ConvShape& shape, Stripes stripes, const Tiling& tiling, const IsaKernels& isa,
        bool paired = false);

  std::int64_t packed_floats() const { return packed_floats_; }
  void pack_weight(const void* weight, DType type, float* packed) const;  // weight [A, C/groups]
  void run(const TensorView& x, const float* packed, const TensorView& y, const Epilogue& e, int threads,
           InPlanes planes = {}) const;
  // The pitch of planes that x is read from where they lie; 0: x is always packed.
  int plane_pitch() const { return !paired_ && schedule_.reads_planes() ? schedule_.pitch() : 0; }

  const Schedule& schedule() const { return schedule_; }
  const std::vector<Part>& parts() const { return parts_; }
  // Adds runs [begin, end) of a block into the lanes of one part's filters.
  void accumulate(int part, const Run* begin, const Run* end, const float* packed,
                  Channels<const float> panel, Channels<float> lanes) const;

 private:
  struct FilterTile {
    std::int64_t weight;  // packed [cells][filters] begins here
    int filters;
    int first;              // into order_ and local_
    int first_cell, cells;  // of a stripe, summed before they join y
  };

  // A run of so many vectors in tiles of t filters: `tiles` of them, the first `longer` of `size` + 1 vectors, the others of
  // `size`. Kept: of 16 channels a tile takes 150 cycles, and two divisions 25.
  struct Cut {
    int tiles, size, longer;
  };

  ConvShape shape_;
  Stripes stripes_;
  const IsaKernels& isa_;
  Schedule schedule_;
  bool paired_;
  int cells_;  // of a stripe: floats, or pairs of bfloat16
  int part_count_;
  std::vector<Part> parts_;
  std::vector<std::int64_t> tap_offsets_;  // by index into lattice().taps
  std::vector<int> tap_of_set_;            // of each of the schedule's sets, which are single taps
  std::vector<Cut> cuts_;                  // [vectors][kMaxTileFilters + 1]
  std::vector<FilterTile> tiles_;
  std::vector<std::int32_t> tile_ptr_;  // [parts * taps + 1] into tiles_
  std::vector<std::int32_t> order_;     // weight row of each packed filter
  std::vector<std::int32_t> local_;     // its channel within the part
  std::int64_t packed_floats_ = 0;
};

}  // namespace sk
