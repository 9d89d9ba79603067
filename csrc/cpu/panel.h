// Activations as rows of lanes. A panel holds, for one block of a lattice,
//
//   panel[plane][channel][lane]     lane = (row * pitch + col) * images + image
//
// `images` is 1 (lanes run along pixels; rows are `pitch` apart so that a tap is an offset, the zero columns between
// them shared by neighbours) or a multiple of the vector (lanes run along the batch; nothing is padded and
// out-of-image taps are skipped).
#pragma once
#include <cstdint>

#include "core/tensor.h"
#include "cpu/isa/isa.h"
#include "cpu/lattice.h"

namespace sk {

// How a plan lays lanes. `pixels`: along rows of one image. `gather`: along the pixels of several images, one plane
// per tap. `batch`: along images.
enum class LaneMode : int { pixels = 0, gather = 1, batch = 2 };

struct Block {
  int n0, images;  // images [n0, n0 + images)
  int i0, i1;      // lattice rows
};

class PanelLayout {
 public:
  PanelLayout(const Lattice& lattice, LaneMode mode, int channels, int lanes, int images, int block_rows);

  std::int64_t floats() const { return lead_ + planes_ * plane_stride_ + slack_; }
  std::int64_t channel_stride() const { return channel_stride_; }
  int pitch() const { return pitch_; }
  int batch() const { return batch_; }

  // Lane offset from the panel's start at which tap `t` reads for lattice pixel (block row 0, column 0).
  std::int64_t tap_offset(const TapAccess& t) const;

  // Fills channels [c_begin, c_end) (panel numbering; the tensor's start at c_first) for a block.
  void pack(const IsaKernels& isa, const TensorView& x, const Lattice& l, const Block& b, int c_first,
            int c_begin, int c_end, float* panel) const;

 private:
  void pack_pixels(const IsaKernels&, const TensorView&, const Lattice&, const Block&, int, int, int,
                   float*) const;
  void pack_batch(const IsaKernels&, const TensorView&, const Lattice&, const Block&, int, int, int,
                  float*) const;

  LaneMode mode_;
  int rows_, pitch_, batch_,
      row_min_;        // rows_ of a plane in the panel; plane row of panel row 0 is i0 + row_min_
  int col_first_ = 0;  // plane column of panel column 0 (batch mode)
  std::int64_t lead_, slack_, planes_, plane_stride_, channel_stride_;
};

// The output side: y[channel][lane], rows of `pitch` columns, written out and finished channel by channel.
struct OutputPanel {
  LaneMode mode;
  int pitch, batch;
  std::int64_t ld;  // floats between channels

  void store(const IsaKernels& isa, const Lattice& l, const Block& b, int k_first, int k_count, float* panel,
             const TensorView& y, const Epilogue& e) const;

 private:
  void finish(const IsaKernels&, const Lattice&, const Block&, int, int, float*, const Epilogue&) const;
  void move_out(const IsaKernels&, const Lattice&, const Block&, int, int, const float*,
                const TensorView&) const;
};

}  // namespace sk
