// Every kernel of csrc/cpu against a plain loop, without Python or torch: runs wherever a C++ compiler
// reaches, under an emulator or a sanitizer too. Operands are multiples of 1/16 below 1, so every float sum
// is exact whatever its order, and results have to be equal to the last bit: rounded once, to nearest even,
// where they are stored.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cpu/call_list.h"
#include "cpu/dgrad.h"
#include "cpu/fprop.h"
#include "cpu/fprop_filters.h"
#include "cpu/fprop_matrix.h"
#include "cpu/fprop_taps.h"
#include "cpu/lane_network.h"
#include "cpu/wgrad.h"
#include "tensor.h"

using namespace sk;
using selftest::Format;
using selftest::Tensor;

namespace {

int failures = 0, checks = 0;

struct Problem {
  const char* name;
  ConvShape s;  // P and Q follow
  int keep;     // stripes kept of 8
};

int extent(int in, int pad, int dil, int taps, int stride) {
  return (in + 2 * pad - dil * (taps - 1) - 1) / stride + 1;
}

std::vector<Problem> problems() {
  //                    N  C   H  W   K   R  S       stride pad  dil  groups
  std::vector<Problem> all = {
      {"lopsided", {3, 5, 9, 7, 11, 3, 2, 0, 0, 2, 1, 1, 0, 2, 1, 1}, 4},
      {"grouped", {5, 6, 7, 10, 14, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 2}, 3},
      {"pointwise", {2, 17, 5, 3, 9, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1}, 5},
      {"small map", {19, 33, 2, 2, 19, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 1}, 2},
      {"strided", {7, 4, 8, 5, 10, 3, 3, 0, 0, 2, 2, 1, 1, 1, 1, 1}, 3},
      {"wide padding", {1, 3, 4, 3, 4, 2, 3, 0, 0, 3, 1, 3, 2, 1, 2, 1}, 6},
      {"stem", {1, 3, 21, 32, 7, 7, 7, 0, 0, 2, 2, 3, 3, 1, 1, 1}, 4},
      {"all live", {2, 3, 6, 6, 8, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 1}, 8},
      {"all dead", {2, 3, 4, 4, 5, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 1}, 0},
      {"many channels", {2, 128, 6, 7, 5, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 1}, 3},
      {"no image", {0, 3, 4, 4, 5, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 1}, 4},
  };
  for (Problem& p : all) {
    p.s.P = extent(p.s.H, p.s.pad_top, p.s.dil_h, p.s.R, p.s.stride_h);
    p.s.Q = extent(p.s.W, p.s.pad_left, p.s.dil_w, p.s.S, p.s.stride_w);
  }
  return all;
}

struct Live {
  int k, t;
};

// The live stripes in the weight's order: [K, R, S] row-major.
std::vector<Live> live_stripes(const Problem& p) {
  std::vector<Live> live;
  unsigned seed = 7;
  for (int k = 0; k < p.s.K; ++k)
    for (int t = 0; t < p.s.taps(); ++t) {
      seed = Tensor::next(seed);
      if (static_cast<int>(seed >> 16) % 8 < p.keep) live.push_back({k, t});
    }
  return live;
}

Stripes stripes_of(const ConvShape& s, const std::vector<Live>& live) {
  Stripes out;
  out.groups = s.groups, out.taps = s.taps();
  out.tap_ptr.push_back(0);
  for (int g = 0; g < s.groups; ++g)
    for (int t = 0; t < s.taps(); ++t) {
      for (std::size_t row = 0; row < live.size(); ++row)
        if (live[row].t == t && live[row].k / s.group_k() == g) {
          out.filter.push_back(live[row].k % s.group_k());
          out.row.push_back(static_cast<int>(row));
        }
      out.tap_ptr.push_back(out.count());
    }
  return out;
}

// Calls fn(a, c, n, p, q, h, w) for every product of the convolution: live stripe a, channel c of its group.
template <class Fn>
void each_product(const ConvShape& s, const std::vector<Live>& live, Fn fn) {
  for (int a = 0; a < static_cast<int>(live.size()); ++a)
    for (int n = 0; n < s.N; ++n)
      for (int p = 0; p < s.P; ++p)
        for (int q = 0; q < s.Q; ++q) {
          const int h = p * s.stride_h + live[a].t / s.S * s.dil_h - s.pad_top;
          const int w = q * s.stride_w + live[a].t % s.S * s.dil_w - s.pad_left;
          if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
          for (int c = 0; c < s.group_c(); ++c) fn(a, c, n, p, q, h, w);
        }
}

// A plain array in double with the same four indices.
struct Expected {
  std::vector<int> shape;
  std::vector<double> v;
  explicit Expected(const std::vector<int>& n)
      : shape(n), v(static_cast<std::size_t>(n[0]) * n[1] * n[2] * n[3]) {}
  double& at(int a, int b, int c, int d) {
    return v[((static_cast<std::size_t>(a) * shape[1] + b) * shape[2] + c) * shape[3] + d];
  }
};

void check(const std::string& what, const Tensor& got, Expected& want) {
  ++checks;
  std::string wrong = got.margin_untouched() ? "" : "wrote behind the end";
  for (int a = 0; a < want.shape[0] && wrong.empty(); ++a)
    for (int b = 0; b < want.shape[1] && wrong.empty(); ++b)
      for (int c = 0; c < want.shape[2] && wrong.empty(); ++c)
        for (int d = 0; d < want.shape[3] && wrong.empty(); ++d) {
          const double w = rounded(want.at(a, b, c, d), got.format()), g = got.get(a, b, c, d);
          if (g == w) continue;
          char text[128];
          std::snprintf(text, sizeof text, "[%d, %d, %d, %d] is %.9g, not %.9g", a, b, c, d, g, w);
          wrong = text;
        }
  if (wrong.empty()) return;
  ++failures;
  std::printf("FAILED %s: %s\n", what.c_str(), wrong.c_str());
}

// Operands of a problem in one format; their values are the same in all.
struct Operands {
  std::vector<Live> live;
  Tensor x, dy, w, residual;
  std::vector<float> scale, shift;

  Operands(const Problem& p, const Format& f, bool channels_last)
      : live(live_stripes(p)),
        x({p.s.N, p.s.C, p.s.H, p.s.W}, f, channels_last),
        dy({p.s.N, p.s.K, p.s.P, p.s.Q}, f, channels_last),
        w({static_cast<int>(live.size()), p.s.group_c(), 1, 1}, f, false),
        residual({p.s.N, p.s.K, p.s.P, p.s.Q}, f, !channels_last) {
    x.fill(1), dy.fill(2), w.fill(3), residual.fill(4);
    for (int k = 0; k < p.s.K; ++k)
      scale.push_back(k % 3 ? 0.5f : -2.f), shift.push_back(static_cast<float>(k % 7 - 3) * 0.25f);
  }
};

// The answers, by plain loops in double.
struct Answers {
  Expected y, finished, above, dx,
      dw;  // finished: y after scale, shift, residual and relu; above: y its own residual

  Answers(const Problem& p, const Operands& in)
      : y(in.dy.shape()), finished(in.dy.shape()), above(in.dy.shape()), dx(in.x.shape()), dw(in.w.shape()) {
    const ConvShape& s = p.s;
    each_product(s, in.live, [&](int a, int c, int n, int p, int q, int h, int w) {
      const int k = in.live[a].k, channel = k / s.group_k() * s.group_c() + c;
      const double x = in.x.get(n, channel, h, w), dy = in.dy.get(n, k, p, q), weight = in.w.get(a, c, 0, 0);
      y.at(n, k, p, q) += weight * x;
      dx.at(n, channel, h, w) += weight * dy;
      dw.at(a, c, 0, 0) += dy * x;
    });
    for (int n = 0; n < s.N; ++n)
      for (int k = 0; k < s.K; ++k)
        for (int p = 0; p < s.P; ++p)
          for (int q = 0; q < s.Q; ++q) {
            const double scaled = y.at(n, k, p, q) * in.scale[k] + in.shift[k];
            finished.at(n, k, p, q) = std::max(0.0, scaled + in.residual.get(n, k, p, q));
            above.at(n, k, p, q) = std::max(0.0, scaled + y.at(n, k, p, q));
          }
  }
};

struct Plan {
  const char* name;
  Tiling tiling;
  int threads;
};

Tensor like(const Tensor& t) { return Tensor(t.shape(), t.format(), t.channels_last()); }

// Of this thread, by XGETBV's word of what is in use: tile configuration and tile data.
bool matrix_registers_in_use() {
#ifdef __x86_64__
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low >> 17 & 3) != 0;
#else
  return false;
#endif
}

template <class Kernel>
void check_fprop(const std::string& what, const Kernel& kernel, Operands& in, Answers& want, int threads) {
  const std::unique_ptr<float[]> packed(new float[kernel.packed_floats()]);
  kernel.pack_weight(in.w.data(), in.w.format().type, packed.get());
  Tensor y = like(in.dy), finished = like(in.dy);
  kernel.run(in.x.view(), packed.get(), y.view(), Epilogue{}, threads);
  check(what + " fprop", y, want.y);
  const Epilogue epilogue{in.scale.data(), in.shift.data(), in.residual.view(), Activation::relu};
  kernel.run(in.x.view(), packed.get(), finished.view(), epilogue, threads);
  check(what + " fprop with epilogue", finished, want.finished);
}

void check_dgrad(const std::string& what, Operands& in, const ConvShape& s, Answers& want, const Plan& plan,
                 const IsaKernels& isa) {
  const Dgrad kernel(s, stripes_of(s, in.live), plan.tiling, isa);
  const std::unique_ptr<float[]> packed(new float[kernel.packed_floats()]);
  kernel.pack_weight(in.w.data(), in.w.format().type, packed.get());
  Tensor dx = like(in.x);
  kernel.run(in.dy.view(), packed.get(), dx.view(), plan.threads);
  check(what + " dgrad", dx, want.dx);
}

void check_wgrad(const std::string& what, Operands& in, const ConvShape& s, Answers& want, int chunk_pixels,
                 const IsaKernels& isa) {
  const Wgrad kernel(s, stripes_of(s, in.live), chunk_pixels, isa);
  Tensor dw = like(in.w);
  kernel.run(in.x.view(), in.dy.view(), dw.data(), in.w.format().type, 1 + chunk_pixels % 3);
  check(what + " wgrad", dw, want.dw);
}

// The output sizes of a window of `size` at a stride, with `pad` on both sides.
int windows(int in, int size, int stride, int pad) { return (in + 2 * pad - size) / stride + 1; }

// Maxima (or, without padding, means) of square windows of a map in double.
Expected pooled(Expected& from, int size, int stride, int pad, bool mean) {
  const std::vector<int>& n = from.shape;
  Expected to({n[0], n[1], windows(n[2], size, stride, pad), windows(n[3], size, stride, pad)});
  for (int a = 0; a < n[0]; ++a)
    for (int b = 0; b < n[1]; ++b)
      for (int i = 0; i < to.shape[2]; ++i)
        for (int j = 0; j < to.shape[3]; ++j) {
          double sum = 0, most = -HUGE_VAL;
          for (int h = std::max(0, i * stride - pad); h < std::min(n[2], i * stride - pad + size); ++h)
            for (int w = std::max(0, j * stride - pad); w < std::min(n[3], j * stride - pad + size); ++w)
              sum += from.at(a, b, h, w), most = std::max(most, from.at(a, b, h, w));
          to.at(a, b, i, j) = mean ? sum / (size * size) : most;
        }
  return to;
}

struct Windowing {
  const char* name;
  int size, stride, pad;
  bool mean;
};
constexpr Windowing kWindowings[] = {
    {", max pool", 3, 2, 1, false}, {", halved", 2, 2, 0, false}, {", mean", 2, 1, 0, true}};

// A network in batch lanes: a convolution; on top of it a second activation, scale, shift, its own input as residual, relu;
// then pools.
void check_lanes(const std::string& what, Operands& in, const ConvShape& s, Answers& want, int threads,
                 const IsaKernels& isa) {
  LaneNetwork network(isa.lanes, threads, isa);
  std::int64_t end = 0;
  const auto place = [&](int c, int h, int w) {
    const std::int64_t at = end;
    end += (c * network.channel_floats(h, w) + 15) / 16 * 16;
    return network.add_activation(c, h, w, at);
  };
  const int x = place(s.C, s.H, s.W), conv = place(s.K, s.P, s.Q), top = place(s.K, s.P, s.Q);
  network.add_conv(s, stripes_of(s, in.live), static_cast<const float*>(in.w.data()), nullptr, nullptr,
                   Activation::none, x, -1, conv);
  network.add_pointwise(in.scale.data(), in.shift.data(), Activation::relu, conv, conv, top);
  const auto run = [&](const std::string& name, int activation, Expected& expected) {
    Tensor y(expected.shape, selftest::kFormats[0], in.x.channels_last());
    network.run(in.x.view(), s.N, x, y.view(), activation, threads);
    check(what + name, y, expected);
  };
  run(" lane network", conv, want.y);
  run(" lane network, pointwise", top, want.above);
  for (const Windowing& k : kWindowings) {
    if (std::min(s.P, s.Q) + 2 * k.pad < k.size) continue;
    Expected expected = pooled(want.above, k.size, k.stride, k.pad, k.mean);
    const int pool = place(s.K, expected.shape[2], expected.shape[3]);
    network.add_pool(k.mean ? Pool::average : Pool::max, {k.size, k.size, k.stride, k.stride, k.pad, k.pad},
                     top, pool);
    run(std::string(" lane network") + k.name, pool, expected);
  }
}

// Pitches of planes that a kernel works on where they lie, where there are such; else any.
struct Pitches {
  int x, y;
};
Pitches pitches(const Fprop& kernel, int w, int q) {
  const int y = std::max(q, kernel.schedule().pitch());
  return {std::max(w, kernel.plane_pitch()), y};
}
template <class Kernel>
Pitches pitches(const Kernel&, int w, int q) {
  return {w + 1, q + 2};
}

// A list of native calls: y into the arena, a second convolution with y as its residual beside it, a max pool to the outside.
// In planes, x is first moved there by a pool of single pixels.
template <class Kernel>
void check_list(const std::string& what, const Kernel& kernel, Operands& in, Answers& want, int threads,
                bool in_planes) {
  const std::unique_ptr<float[]> packed(new float[kernel.packed_floats()]);
  kernel.pack_weight(in.w.data(), in.w.format().type, packed.get());
  const auto size = [](const Tensor& t) {
    return MapSize{t.shape()[0], t.shape()[1], t.shape()[2], t.shape()[3]};
  };
  const MapSize map = size(in.dy), from = size(in.x);
  const Pitches pitch = pitches(kernel, from.w, map.w);
  const bool none = std::min({from.n, from.c, from.h, from.w, map.c}) == 0;
  if (in_planes && (in.x.channels_last() || none)) return;
  const Planes px{from.n, from.c, from.h, from.w, pitch.x}, py{map.n, map.c, map.h, map.w, pitch.y};
  for (const Windowing& k : kWindowings) {
    if (k.mean || std::min(map.h, map.w) + 2 * k.pad < k.size) continue;
    Expected expected = pooled(want.above, k.size, k.stride, k.pad, false);
    Tensor y = like(in.dy), above = like(in.dy), out(expected.shape, in.dy.format(), in.dy.channels_last());
    const std::int64_t bytes = in_planes ? 4 * py.floats() : static_cast<std::int64_t>(want.y.v.size()) * 4;
    const std::int64_t room = 2 * bytes + (in_planes ? 4 * px.floats() : 0);
    const std::unique_ptr<char[]> arena(new char[room]);
    std::memset(arena.get(), 0xff, room);  // NaN
    CallList list;
    const int given = list.add_slot(DType::f32, in.x.view().stride, 0);
    const int x = in_planes ? list.add_planes(px, 2 * bytes) : given;
    const int mid = in_planes ? list.add_planes(py, 0) : list.add_arena(DType::f32, y.view().stride, 0);
    const int top =
        in_planes ? list.add_planes(py, bytes) : list.add_arena(DType::f32, above.view().stride, bytes);
    const int end = list.add_slot(DType::f32, out.view().stride, 1);
    if (in_planes) list.add_max_pool({1, 1, 1, 1, 0, 0}, from, from, given, x);
    list.add_fprop(kernel, packed.get(), Epilogue{}, x, -1, mid);
    list.add_fprop(kernel, packed.get(), Epilogue{in.scale.data(), in.shift.data(), {}, Activation::relu}, x,
                   mid, top);
    list.add_max_pool({k.size, k.size, k.stride, k.stride, k.pad, k.pad}, map,
                      {map.n, map.c, expected.shape[2], expected.shape[3]}, top, end);
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    list.run(address(arena.get()), {address(in.x.view().data), address(out.data())}, threads);
    check(what + (in_planes ? " call list in planes" : " call list") + k.name, out, expected);
  }
}

void check_isa(const Problem& problem, Operands& in, Answers& want, const IsaKernels& isa) {
  const std::string what = std::string(isa.name) + " " + in.x.format().name +
                           (in.x.channels_last() ? " channels_last " : " ") + problem.name;
  const Plan plans[] = {
      {", pixels", {LaneMode::pixels, 1, 2, 1, 12}, 1},
      {", pixels, split filters", {LaneMode::pixels, 1, 1000, 3, 2}, 3},
      {", gather", {LaneMode::gather, 3, 1, 1, 12}, 2},
      {", batch", {LaneMode::batch, isa.lanes, 1000, 1, 12}, 1},
      {", batch, split filters", {LaneMode::batch, 2 * isa.lanes, 1, 2, 3}, 2},
  };
  const bool matrix =
      isa.matrix.add && in.x.format().type == DType::bf16 && problem.s.group_c() % kMatrixChannels == 0;
  for (const Plan& plan : plans) {
    if (matrix) {
      check_fprop(what + plan.name + ", matrix",
                  FpropMatrix(problem.s, stripes_of(problem.s, in.live), plan.tiling, isa), in, want,
                  plan.threads);
      ++checks;
      if (matrix_registers_in_use()) {
        ++failures;
        std::printf("%s: matrix registers are not released\n", (what + plan.name).c_str());
      }
    }
    check_fprop(what + plan.name, Fprop(problem.s, stripes_of(problem.s, in.live), plan.tiling, isa), in,
                want, plan.threads);
    check_dgrad(what + plan.name, in, problem.s, want, plan, isa);
  }
  const bool networks = in.w.format().type == DType::f32 && problem.s.P > 0 && problem.s.Q > 0;
  for (int parts : {1, 3})
    check_fprop(what + ", filters",
                FpropFilters(problem.s, stripes_of(problem.s, in.live), parts, parts, isa), in, want, parts);
  for (int rows : {1, 2, 1000})
    check_fprop(what + ", taps", FpropTaps(problem.s, stripes_of(problem.s, in.live), rows, isa), in, want,
                1 + rows % 3);
  for (int threads : {1, 3})
    if (networks) {
      check_lanes(what, in, problem.s, want, threads, isa);
      for (bool planes : {false, true}) {
        check_list(what, Fprop(problem.s, stripes_of(problem.s, in.live), plans[planes ? 0 : 2].tiling, isa),
                   in, want, threads, planes);
        check_list(what + ", filters",
                   FpropFilters(problem.s, stripes_of(problem.s, in.live), threads, threads, isa), in, want,
                   threads, planes);
      }
      check_list(what + ", split filters",
                 Fprop(problem.s, stripes_of(problem.s, in.live), plans[1].tiling, isa), in, want, threads,
                 true);
      check_list(what + ", taps", FpropTaps(problem.s, stripes_of(problem.s, in.live), threads, isa), in,
                 want, threads, false);
    }
  for (int chunk_pixels : {1, 10, 1000}) check_wgrad(what, in, problem.s, want, chunk_pixels, isa);
}

}  // namespace

// Instruction sets can be named; without names it is all of this processor.
int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  for (const char* const* name = isa_names(); *name && argc == 1; ++name) isas.emplace_back(*name);
  for (const Problem& problem : problems()) {
    Answers want(problem, Operands(problem, selftest::kFormats[0], false));
    for (const Format& format : selftest::kFormats)
      for (bool channels_last : {false, true}) {
        Operands in(problem, format, channels_last);
        for (const std::string& name : isas) check_isa(problem, in, want, *find_isa(name.c_str()));
      }
  }
  std::printf("%d checks on", checks);
  for (const std::string& name : isas) std::printf(" %s", name.c_str());
  std::printf(", %d failed\n", failures);
  return failures ? 1 : 0;
}
