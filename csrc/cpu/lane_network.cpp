#include "cpu/lane_network.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/fprop.h"
#include "cpu/lanes.h"

namespace sk {
namespace {

constexpr int kGap =
    16;  // an odd number of cache lines between channels: maps are powers of two, cache sets too
// Output rows are zeroed, summed and finished while they are in L2 (1 MB, shared with the rows they read).
constexpr std::int64_t kRowsInCache = 32 * 1024;
constexpr std::int64_t kLargest = 1 << 30;  // extent: what is computed from two of them stays an int

}  // namespace

struct LaneNetwork::Activation3 {
  int c, h, w;
  std::int64_t offset;  // floats from the arena's start
  std::int64_t plane;   // floats between channels
};

// Runs on one block; a team may share it, and then every member calls run and the network puts a barrier after it.
struct LaneNetwork::Step {
  virtual ~Step() = default;
  virtual void run(float* arena, float* staging, const Team& team) const = 0;
};

struct LaneNetwork::ConvStep : Step {
  ConvStep(const LaneNetwork& net, const ConvShape& shape, Stripes stripes, const float* weight,
           Activation act)
      : isa(net.isa_),
        shape(shape),
        fprop(shape, std::move(stripes),
              {LaneMode::batch, net.images_, std::max(1, shape.P), net.parts_, 12, kGap}, net.isa_),
        packed(static_cast<std::size_t>(fprop.packed_floats())),
        images(net.images_),
        activation(act) {
    fprop.pack_weight(weight, DType::f32, packed.data());
  }

  bool split() const { return shape.stride_h > 1 || shape.stride_w > 1; }
  std::int64_t split_floats() const {
    const Schedule& s = fprop.schedule();
    return split() ? s.plane_floats(shape.C) * static_cast<std::int64_t>(s.lattice().planes.size()) : 0;
  }

  // Strided layers read one plane a phase of the stride.
  void split_phases(const float* in, float* planes, const Team& team) const {
    const Schedule& s = fprop.schedule();
    const Lattice& l = s.lattice();
    const std::int64_t plane = s.plane_floats(shape.C), c_stride = s.channel_stride();
    for (std::size_t p = 0; p < l.planes.size(); ++p)
      for (std::int64_t c = team.begin(shape.C); c < team.end(shape.C); ++c)
        for (int row = l.planes[p].row0, a = 0; row < l.in_h; row += l.step_h, ++a) {
          float* to = planes + p * plane + c * c_stride + static_cast<std::int64_t>(a) * s.pitch() * images;
          const float* from = in + c * x.plane + static_cast<std::int64_t>(row) * l.in_w * images;
          for (int col = l.planes[p].col0; col < l.in_w; col += l.step_w, to += images)
            std::memcpy(to, from + static_cast<std::int64_t>(col) * images, sizeof(float) * images);
        }
  }

  void run(float* arena, float* staging, const Team& team) const override {
    const Schedule& s = fprop.schedule();
    const float* in = arena + x.offset;
    if (split()) {
      split_phases(in, staging, team);
      team.barrier();
      in = staging;
    }
    const BlockPlan& block = s.block(0);
    const std::int64_t row = static_cast<std::int64_t>(shape.Q) * images;
    for (std::size_t p = team.thread; p < fprop.parts().size(); p += team.threads) {
      const Part& part = fprop.parts()[p];
      const int count = part.end - part.begin, first = part.group * shape.group_k() + part.begin;
      if (count == 0) continue;
      const std::int64_t in_group =
          static_cast<std::int64_t>(part.group) * shape.group_c() * s.channel_stride();
      float* const out = arena + y.offset + first * y.plane;
      const int rows = static_cast<int>(std::clamp<std::int64_t>(kRowsInCache / (row * count), 1, shape.P));
      for (int i = 0; i < shape.P; i += rows) {
        const int last = std::min(shape.P, i + rows);
        const std::int64_t at = i * row, n = (last - i) * row;
        for (int k = 0; k < count; ++k) std::memset(out + k * y.plane + at, 0, sizeof(float) * n);
        fprop.accumulate(static_cast<int>(p), block.runs.data() + block.row_begin[i],
                         block.runs.data() + block.row_begin[last], packed.data(),
                         {in + in_group, s.channel_stride()}, {out, s.output_stride()});
        if (scale.empty() && shift.empty() && !has_residual && activation == Activation::none) continue;
        for (int k = 0; k < count; ++k)
          isa.finish_row(out + k * y.plane + at, n, scale.empty() ? 1.f : scale[first + k],
                         shift.empty() ? 0.f : shift[first + k],
                         has_residual ? arena + residual.offset + (first + k) * residual.plane + at : nullptr,
                         activation);
      }
    }
  }

  const IsaKernels& isa;
  ConvShape shape;
  Fprop fprop;
  std::vector<float> packed, scale, shift;
  int images;
  Activation activation;
  Activation3 x{}, y{}, residual{};
  bool has_residual = false;
};

struct LaneNetwork::PoolStep : Step {
  PoolStep(Pool kind, const PoolShape& s, const IsaKernels& isa, int images)
      : kind(kind), s(s), isa(isa), images(images) {}

  // Rows and columns of the map that the windows of output row i and column j cover.
  Range rows_of(int i) const {
    return intersect({i * s.stride_h - s.pad_h, i * s.stride_h - s.pad_h + s.kernel_h}, {0, x.h});
  }
  Range cols_of(int j) const {
    return intersect({j * s.stride_w - s.pad_w, j * s.stride_w - s.pad_w + s.kernel_w}, {0, x.w});
  }

  void run(float* arena, float*, const Team& team) const override {
    // Columns whose windows are whole go together; of the clipped ones each goes alone.
    const Range whole = intersect(
        {ceil_div(s.pad_w, s.stride_w), floor_div(x.w + s.pad_w - s.kernel_w, s.stride_w) + 1}, {0, y.w});
    for (std::int64_t c = team.begin(x.c); c < team.end(x.c); ++c) {
      const float* const in = arena + x.offset + c * x.plane;
      float* const out = arena + y.offset + c * y.plane;
      for (int i = 0; i < y.h; ++i)
        for (int j = 0; j < y.w;) {
          const int next = j == whole.lo && whole.size() > 0 ? whole.hi : j + 1;
          some(in, out + (static_cast<std::int64_t>(i) * y.w + j) * images, i, j, next - j);
          j = next;
        }
    }
  }

  // `count` neighbouring output pixels of row i whose windows are of one size.
  void some(const float* in, float* out, int i, int j, int count) const {
    const Range h = rows_of(i), w = cols_of(j);
    if (h.size() == 0 || w.size() == 0)
      return std::fill(out, out + static_cast<std::int64_t>(count) * images,
                       kind == Pool::max ? -std::numeric_limits<float>::infinity() : 0.f);
    const std::int64_t row = static_cast<std::int64_t>(x.w) * images;
    const Windows windows{count,   static_cast<std::int64_t>(s.stride_w) * images, row, images, h.size(),
                          w.size()};
    const float* const first = in + h.lo * row + static_cast<std::int64_t>(w.lo) * images;
    if (kind == Pool::max) return isa.max_windows(out, first, windows);
    isa.sum_windows(out, first, windows);
    // torch divides by the window clipped to the padded image, or to the image where padding is not counted.
    const auto padded = [](int at, int stride, int pad, int kernel, int size) {
      return std::min(at * stride - pad + kernel, size + pad) - (at * stride - pad);
    };
    const int counted = kind == Pool::average_padded ? padded(i, s.stride_h, s.pad_h, s.kernel_h, x.h) *
                                                           padded(j, s.stride_w, s.pad_w, s.kernel_w, x.w)
                                                     : h.size() * w.size();
    for (std::int64_t n = 0; n < static_cast<std::int64_t>(count) * images; ++n)
      out[n] /= static_cast<float>(counted);
  }

  Pool kind;
  PoolShape s;
  const IsaKernels& isa;
  int images;
  Activation3 x{}, y{};
};

struct LaneNetwork::PointwiseStep : Step {
  PointwiseStep(const IsaKernels& isa, int images) : isa(isa), images(images) {}

  void run(float* arena, float*, const Team& team) const override {
    const std::int64_t n = static_cast<std::int64_t>(x.h) * x.w * images;
    for (std::int64_t c = team.begin(x.c); c < team.end(x.c); ++c) {
      float* const out = arena + y.offset + c * y.plane;
      if (x.offset != y.offset) std::memcpy(out, arena + x.offset + c * x.plane, sizeof(float) * n);
      isa.finish_row(out, n, scale.empty() ? 1.f : scale[c], shift.empty() ? 0.f : shift[c],
                     has_residual ? arena + residual.offset + c * residual.plane : nullptr, activation);
    }
  }

  const IsaKernels& isa;
  int images;
  std::vector<float> scale, shift;
  Activation activation = Activation::none;
  Activation3 x{}, y{}, residual{};
  bool has_residual = false;
};

LaneNetwork::LaneNetwork(int images, int parts, const IsaKernels& isa)
    : images_(images), parts_(parts), isa_(isa) {}
LaneNetwork::~LaneNetwork() = default;

void LaneNetwork::check(int activation) const {
  if (activation < 0 || activation >= static_cast<int>(activations_.size()))
    throw std::invalid_argument("activation " + std::to_string(activation) + " does not exist");
}

void LaneNetwork::check_residual(const Activation3& residual, const Activation3& y) {
  if (residual.c != y.c || residual.h != y.h || residual.w != y.w)
    throw std::invalid_argument("a residual has its output's sizes");
}

std::int64_t LaneNetwork::channel_floats(int h, int w) const {
  return static_cast<std::int64_t>(h) * w * images_ + kGap;
}

int LaneNetwork::add_activation(int c, int h, int w, std::int64_t offset) {
  if (c < 1 || h < 1 || w < 1 || offset < 0 || offset % 16)
    throw std::invalid_argument("an activation needs sizes and a place");
  if (c >= 1 << 20 || std::int64_t{h} * w >= kLargest || offset >= std::int64_t{1} << 60)
    throw std::invalid_argument("an activation exceeds 2^20 channels of 2^30 pixels");
  activations_.push_back({c, h, w, offset, channel_floats(h, w)});
  arena_floats_ = std::max(arena_floats_, (offset + c * channel_floats(h, w) + 31) / 16 * 16);
  return static_cast<int>(activations_.size()) - 1;
}

void LaneNetwork::add_conv(const ConvShape& shape, Stripes stripes, const float* weight, const float* scale,
                           const float* shift, Activation activation, int x, int residual, int y) {
  check(x), check(y);
  ConvShape one = shape;
  one.N = images_;
  const Activation3 &in = activations_[x], &out = activations_[y];
  if (in.c != shape.C || in.h != shape.H || in.w != shape.W || out.c != shape.K || out.h != shape.P ||
      out.w != shape.Q)
    throw std::invalid_argument("a convolution's sizes are those of its activations");
  auto step = std::make_unique<ConvStep>(*this, one, std::move(stripes), weight, activation);
  step->x = in, step->y = out;
  if (scale) step->scale.assign(scale, scale + shape.K);
  if (shift) step->shift.assign(shift, shift + shape.K);
  if (residual >= 0) {
    check(residual);
    step->residual = activations_[residual], step->has_residual = true;
    check_residual(step->residual, out);
  }
  staging_floats_ = std::max(staging_floats_, step->split_floats());
  steps_.push_back(std::move(step));
}

void LaneNetwork::add_pool(Pool kind, const PoolShape& shape, int x, int y) {
  check(x), check(y);
  auto step = std::make_unique<PoolStep>(kind, shape, isa_, images_);
  step->x = activations_[x], step->y = activations_[y];
  if (step->x.c != step->y.c) throw std::invalid_argument("a pool keeps its channels");
  const auto reach = [](int out, int stride, int kernel, int pad, int in) {
    return std::max(std::int64_t{out} * stride + kernel, std::int64_t{in} + pad);
  };
  if (reach(step->y.h, shape.stride_h, shape.kernel_h, shape.pad_h, step->x.h) >= kLargest ||
      reach(step->y.w, shape.stride_w, shape.kernel_w, shape.pad_w, step->x.w) >= kLargest)
    throw std::invalid_argument("a pool's windows exceed 2^30");
  steps_.push_back(std::move(step));
}

void LaneNetwork::add_pointwise(const float* scale, const float* shift, Activation activation, int x,
                                int residual, int y) {
  check(x), check(y);
  auto step = std::make_unique<PointwiseStep>(isa_, images_);
  step->x = activations_[x], step->y = activations_[y], step->activation = activation;
  if (step->x.c != step->y.c || step->x.h != step->y.h || step->x.w != step->y.w)
    throw std::invalid_argument("a pointwise step keeps its sizes");
  if (scale) step->scale.assign(scale, scale + step->x.c);
  if (shift) step->shift.assign(shift, shift + step->x.c);
  if (residual >= 0) {
    check(residual);
    step->residual = activations_[residual], step->has_residual = true;
    check_residual(step->residual, step->y);
  }
  steps_.push_back(std::move(step));
}

void LaneNetwork::run(const TensorView& x, int n, int input, const TensorView& y, int output,
                      int threads) const {
  check(input), check(output);
  const std::int64_t each = arena_floats_ + staging_floats_ + 64;
  float* const memory = scratch(static_cast<std::size_t>(each * threads));
  const int blocks = ceil_div(n, images_);
  Tasks all;
  const auto map = [&](const Activation3& a, int block) {
    LaneMap m;
    m.batch = images_, m.n0 = block * images_, m.images = std::min(images_, n - m.n0);
    m.rows = m.tensor_h = a.h, m.cols = m.pitch = m.tensor_w = a.w, m.c_stride = a.plane;
    return m;
  };
  const auto one_block = [&](int block, float* arena, const Team& team) {
    const Activation3 &in = activations_[input], &out = activations_[output];
    const int c0 = static_cast<int>(team.begin(in.c)), c1 = static_cast<int>(team.end(in.c));
    if (c0 < c1) load_lanes(isa_, x, map(in, block), c0, c1 - c0, arena + in.offset + c0 * in.plane);
    team.barrier();
    for (const std::unique_ptr<Step>& step : steps_) {
      step->run(arena, arena + arena_floats_, team);
      team.barrier();
    }
    const int k0 = static_cast<int>(team.begin(out.c)), k1 = static_cast<int>(team.end(out.c));
    if (k0 < k1) store_lanes(isa_, y, map(out, block), k0, k1 - k0, arena + out.offset + k0 * out.plane);
    team.barrier();
  };
  run_team(threads, [&](const Team& team) {
    const int whole = blocks / team.threads * team.threads;
    all.each(team, whole, [&](int block) { one_block(block, memory + each * team.thread, {0, 1}); });
    team.barrier();
    for (int block = whole; block < blocks; ++block) one_block(block, memory, team);
  });
}

}  // namespace sk
