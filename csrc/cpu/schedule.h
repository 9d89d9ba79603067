// What fprop and dgrad share: how a plan cuts a lattice into blocks, where a block's lanes lie, and the runs of lanes
// each set of taps covers.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/isa/isa.h"
#include "cpu/lanes.h"
#include "cpu/lattice.h"
#include "cpu/planes.h"

namespace sk {

// How a plan lays lanes. pixels: along the rows of one image, rows one pitch apart so that a tap is an offset; the zero
// columns between rows serve both neighbours. gather: along the pixels of several images, one plane per tap (an
// im2col; no halo lanes, aligned loads). batch: along images; nothing is padded, out-of-image taps are skipped exactly.
enum class LaneMode : int { pixels = 0, gather = 1, batch = 2 };

struct Tiling {
  LaneMode mode = LaneMode::pixels;
  int images = 1;        // per block: 1, any number, a multiple of the vector's lanes
  int rows = 1;          // lattice rows per block
  int filter_parts = 1;  // > 1: the team shares one block's panel and splits its filters (channels in dgrad)
  int window = 12;       // vectors of lanes that stay close to the core while all taps pass over them
  // Batch lanes only: the panel is a whole activation that already lies in lanes, channels this many floats further apart
  // than the map is large. 0: the panel is packed from a tensor.
  int resident_gap = 0;
  bool aligned = false;  // pixel lanes: rows are whole vectors, and taps have planes by column
};
inline PlanePer planes_per(LaneMode mode, bool aligned = false) {
  if (mode == LaneMode::gather) return PlanePer::tap;
  return mode == LaneMode::pixels && aligned ? PlanePer::column : PlanePer::phase;
}

// `vectors` vectors of lanes that the same taps reach: input at panel + x (+ the tap's offset), output at y.
struct Run {
  int taps;  // index into Schedule::tap_sets
  int vectors;
  std::int64_t x, y;
};

struct BlockPlan {
  int i0, i1, images;
  std::vector<Run> runs;
  std::vector<int> row_begin;  // batch lanes: the runs of lattice row i0 + r begin at runs[row_begin[r]]
};

class Schedule {
 public:
  Schedule(Lattice lattice, const Tiling& tiling, int lanes, int batch_size, bool one_tap_per_run);

  const Lattice& lattice() const { return lattice_; }
  const std::vector<std::vector<int>>& tap_sets() const { return tap_sets_; }  // indices into lattice().taps
  int block_count() const { return image_blocks_ * row_blocks_; }
  int pitch() const { return pitch_; }
  std::int64_t plane_floats(int channels) const { return plane_stride(channels); }
  const BlockPlan& block(int index) const { return blocks_[block_kind(index)]; }
  const std::vector<BlockPlan>& blocks() const { return blocks_; }  // of every kind

  std::int64_t panel_floats(int channels) const { return lead_ + plane_stride(channels) * planes() + slack_; }
  std::int64_t channel_stride() const { return channel_stride_; }
  std::int64_t output_stride() const { return output_stride_; }
  // Floats of a channel that a block's runs write: its rows, widened to whole vectors.
  std::int64_t output_floats(int block) const;
  std::int64_t tap_offset(int tap_index, int channels) const;

  // Channels [begin, end) of the block's panel; the tensor's channel of panel channel 0 is c_first.
  void pack(const IsaKernels& isa, const TensorView& x, int block, int c_first, int channels, int begin,
            int end, float* panel) const;
  // Finishes channels [begin, begin + count) of the tensor in `lanes` (their first at lanes, `stride` floats apart) and,
  // unless they lie in y, stores them.
  void finish(const IsaKernels& isa, const TensorView& y, const Epilogue& e, int block, int begin, int count,
              float* lanes, std::int64_t stride, float* strip, bool in_y) const;

  // The zeros beside the pixels that `finish` finished or stored in planes.
  void clear_around(const Planes& planes, const TensorView& y, int block, int begin, int count) const;

  // Pixel lanes of planes (planes.h): whether x can stand for every block's panel, and y for its lanes.
  bool reads_planes() const;
  bool writes_planes() const { return tiling_.mode == LaneMode::pixels; }
  // Then no block's last vector reaches into another block's rows.
  bool single_row_block() const { return row_blocks_ == 1; }
  const float* panel_in(const TensorView& x, int block, int channel) const;
  float* lanes_in(const TensorView& y, int block, int channel) const;

 private:
  int planes() const { return static_cast<int>(lattice_.planes.size()); }
  std::int64_t plane_stride(int channels) const { return channel_stride_ * channels; }
  int block_kind(int index) const;
  int first_image(int index) const { return index / row_blocks_ * tiling_.images; }
  void add_pixel_runs(BlockPlan& b, bool one_tap_per_run);
  void add_batch_runs(BlockPlan& b, bool one_tap_per_run);
  int tap_set(const std::vector<int>& taps);

  Lattice lattice_;
  Tiling tiling_;
  int lanes_, batch_size_;
  int image_blocks_, row_blocks_;
  int row_min_ = 0, panel_rows_ = 0, col_first_ = 0, panel_cols_ = 0, pitch_ = 0, out_pitch_ = 0;
  std::int64_t lead_ = 0, slack_ = 0, channel_floats_ = 0, channel_stride_ = 0, output_stride_ = 0;
  std::vector<std::vector<int>> tap_sets_;
  std::vector<BlockPlan> blocks_;
};

}  // namespace sk
