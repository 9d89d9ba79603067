#include "cpu/call_list.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"

namespace sk {
namespace {

constexpr std::int64_t kWorthATeam = 1 << 14;  // outputs: below, waking threads costs more than the pool

struct Range {
  int begin, end;
};

// The q in [0, count) whose input q * stride + shift lies in [0, size).
Range inside(int count, int stride, int shift, int size) {
  const int begin = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
  const int end = shift >= size ? 0 : std::min(count, (size - 1 - shift) / stride + 1);
  return {std::min(begin, count), std::max(end, std::min(begin, count))};
}

// A max pool between two maps whose rows (or, channels_last, whose pixels) are dense.
struct MaxPool {
  const IsaKernels& isa;
  Window k;
  MapSize in, out;
  TensorView x, y;
  std::vector<Range> columns;  // of each s: the q whose tap lies inside
  bool halves;                 // 2x2 windows side by side, none clipped: nearly every pool
  bool narrow;                 // these, and vectors hold whole rows of maps without gaps

  const float* from(int n, int c, int h, int w) const {
    return reinterpret_cast<const float*>(x.at(n, c, h, w));
  }
  float* to(int n, int c, int p, int q) const { return reinterpret_cast<float*>(y.at(n, c, p, q)); }
  Range rows(int p) const {  // the r whose tap lies inside
    const int h = p * k.stride_h - k.pad_h;
    return {std::max(0, -h), std::min(k.kernel_h, in.h - h)};
  }

  // Channels [c0, c1) of an image; `line` has room for an input row.
  void channels(int n, int c0, int c1, float* line) const {
    if (narrow) {
      const std::int64_t outputs = std::int64_t(out.h) * out.w * (c1 - c0);
      return isa.largest_of_narrow_squares(to(n, c0, 0, 0), from(n, c0, 0, 0), in.w, outputs);
    }
    for (int c = c0; c < c1; ++c) channel(n, c, line);
  }

  // The rows of a window first, whole vectors of them, then its columns, which lie a stride apart.
  void channel(int n, int c, float* line) const {
    for (int p = 0; p < out.h; ++p) {
      float* row = to(n, c, p, 0);
      if (halves) {
        const float *a = from(n, c, 2 * p, 0), *b = a + x.stride[2];
        isa.largest_of_squares(row, a, b, out.w);
        continue;
      }
      std::fill(row, row + out.w, -std::numeric_limits<float>::infinity());
      const Range r = rows(p);
      if (r.begin >= r.end) continue;
      const float* tall = from(n, c, p * k.stride_h - k.pad_h + r.begin, 0);
      if (r.end - r.begin > 1) {
        isa.larger_of(line, tall, tall + x.stride[2], in.w);
        for (int i = r.begin + 2; i < r.end; ++i)
          isa.keep_larger(line, from(n, c, p * k.stride_h - k.pad_h + i, 0), 1, in.w);
        tall = line;
      }
      for (int s = 0; s < k.kernel_w; ++s) {
        const Range q = columns[s];
        isa.keep_larger(row + q.begin, tall + q.begin * k.stride_w + s - k.pad_w, k.stride_w,
                        q.end - q.begin);
      }
    }
  }

  void pixels(int n, int p) const {  // one output row of a channels_last map
    const Range r = rows(p);
    for (int q = 0; q < out.w; ++q) {
      float* pixel = to(n, 0, p, q);
      if (halves) {
        const float *a = from(n, 0, 2 * p, 2 * q), *b = a + x.stride[2];
        isa.larger_of(pixel, a, a + x.stride[3], out.c);
        isa.keep_larger(pixel, b, 1, out.c);
        isa.keep_larger(pixel, b + x.stride[3], 1, out.c);
        continue;
      }
      std::fill(pixel, pixel + out.c, -std::numeric_limits<float>::infinity());
      const int w = q * k.stride_w - k.pad_w;
      for (int i = r.begin; i < r.end; ++i)
        for (int s = std::max(0, -w); s < std::min(k.kernel_w, in.w - w); ++s)
          isa.keep_larger(pixel, from(n, 0, p * k.stride_h - k.pad_h + i, w + s), 1, out.c);
    }
  }
};

}  // namespace

int CallList::add_arena(DType type, const std::int64_t (&stride)[4], std::int64_t offset) {
  if (offset < 0) throw std::invalid_argument("an offset into the arena is not negative");
  Place p{{}, offset, -1, {}};
  p.view.dtype = type;
  std::copy(stride, stride + 4, p.view.stride);
  places_.push_back(p);
  return static_cast<int>(places_.size()) - 1;
}

int CallList::add_slot(DType type, const std::int64_t (&stride)[4], int slot) {
  if (slot < 0) throw std::invalid_argument("a slot is not negative");
  const int number = add_arena(type, stride, 0);
  places_.back().slot = slot;
  slots_ = std::max(slots_, slot + 1);
  return number;
}

int CallList::add_planes(const Planes& planes, std::int64_t offset) {
  if (planes.n < 1 || planes.c < 1 || planes.h < 1 || planes.w < 1 || planes.pitch < planes.w)
    throw std::invalid_argument("planes have sizes, and a pitch of at least a row");
  const std::int64_t channel = planes.channel_floats();
  const int number = add_arena(DType::f32, {channel * planes.c, channel, planes.pitch, 1}, offset);
  places_.back().planes = planes;
  return number;
}

void CallList::check(int tensor) const {
  if (tensor < 0 || tensor >= static_cast<int>(places_.size()))
    throw std::invalid_argument("no tensor has number " + std::to_string(tensor));
}

void CallList::check_dense(int tensor, int dimension) const {
  check(tensor);
  const TensorView& v = places_[tensor].view;
  if (v.stride[dimension] != 1 || v.dtype != DType::f32)
    throw std::invalid_argument("a head's layers take dense float32");
}

TensorView CallList::view(const Frame& f, int tensor) const {
  const Place& p = places_[tensor];
  TensorView v = p.view;
  v.data = p.slot < 0 ? f.arena + p.offset : reinterpret_cast<void*>(f.slots[p.slot]);
  if (is_planes(tensor)) v.data = static_cast<float*>(v.data) + kPlaneMargin;
  return v;
}

void CallList::clear_around(const Frame& f, int y) const {
  const Planes& p = places_[y].planes;
  for (int n = 0; n < p.n; ++n) p.clear_around(static_cast<float*>(view(f, y).data), n, 0, p.c, 0, p.h);
}

void CallList::add_dgrad(const Dgrad& kernel, int packed, int dy, int dx) {
  check(packed), check(dy), check(dx);
  calls_.push_back([this, &kernel, packed, dy, dx](const Frame& f) {
    kernel.run(view(f, dy), floats(f, packed), view(f, dx), f.threads);
  });
}

void CallList::add_wgrad(const Wgrad& kernel, int x, int dy, int dw) {
  check(x), check(dy), check(dw);
  calls_.push_back([this, &kernel, x, dy, dw](const Frame& f) {
    const TensorView to = view(f, dw);
    kernel.run(view(f, x), view(f, dy), to.data, to.dtype, f.threads);
  });
}

void CallList::add_max_pool(const Window& k, const MapSize& in, const MapSize& out, int x, int y) {
  check(x), check(y);
  const TensorView &from = places_[x].view, &to = places_[y].view;
  const bool last = in.c > 1 && from.stride[1] == 1 && to.stride[1] == 1;
  if (!last && (from.stride[3] != 1 || to.stride[3] != 1))
    throw std::invalid_argument("max pools take dense rows or dense pixels");
  MaxPool pool{*best_isa(), k, in, out, {}, {}, {}, false, false};
  for (int s = 0; s < k.kernel_w; ++s) pool.columns.push_back(inside(out.w, k.stride_w, s - k.pad_w, in.w));
  pool.halves = k.kernel_h == 2 && k.kernel_w == 2 && k.stride_h == 2 && k.stride_w == 2 && !k.pad_h &&
                !k.pad_w && 2 * out.h <= in.h && 2 * out.w <= in.w;
  pool.narrow = pool.halves && !last && in.h == 2 * out.h && in.w == 2 * out.w &&
                2 * pool.isa.lanes % in.w == 0 && from.stride[2] == in.w && to.stride[2] == out.w &&
                from.stride[1] == std::int64_t(in.h) * in.w && to.stride[1] == std::int64_t(out.h) * out.w;
  calls_.push_back([this, pool, last, x, y](const Frame& f) {
    MaxPool now = pool;
    now.x = view(f, x), now.y = view(f, y);
    const int parts = last ? pool.out.h : pool.out.c;
    const Planes& planes = places_[y].planes;
    const std::int64_t size = std::int64_t(pool.out.n) * pool.out.c * pool.out.h * pool.out.w;
    run_team(size < kWorthATeam ? 1 : f.threads, [&](const Team& team) {
      std::vector<float> line(last ? 0 : static_cast<std::size_t>(pool.in.w));
      const std::int64_t all = std::int64_t(pool.out.n) * parts, end = team.end(all);
      for (std::int64_t i = team.begin(all); i < end;) {
        const int n = static_cast<int>(i / parts), begin = static_cast<int>(i % parts);
        const int here = static_cast<int>(std::min<std::int64_t>(end - i, parts - begin));
        i += here;
        if (last) {
          for (int p = begin; p < begin + here; ++p) now.pixels(n, p);
          continue;
        }
        now.channels(n, begin, begin + here, line.data());
        if (is_planes(y))
          planes.clear_around(static_cast<float*>(now.y.data), n, begin, begin + here, 0, pool.out.h);
      }
    });
  });
}

void CallList::add_average(const MapSize& size, int x, int y) {
  check_dense(x, 3), check(y);
  calls_.push_back([this, size, x, y](const Frame& f) {
    average_pixels(view(f, x), size, view(f, y));
    clear_around(f, y);
  });
}

void CallList::add_flatten(const MapSize& size, int x, int y) {
  check_dense(x, 3), check_dense(y, 1);
  calls_.push_back([this, size, x, y](const Frame& f) { flatten(view(f, x), size, view(f, y)); });
}

void CallList::add_linear(int weight, int bias, int images, int features, int outputs, int x, int y) {
  check_dense(weight, 1), check_dense(x, 1), check_dense(y, 1);
  if (bias >= 0) check_dense(bias, 1);
  calls_.push_back([=](const Frame& f) {
    const auto* const b = bias < 0 ? nullptr : static_cast<const float*>(view(f, bias).data);
    linear(view(f, x), static_cast<const float*>(view(f, weight).data), b, images, features, outputs,
           view(f, y), f.threads);
  });
}

void CallList::run(std::uintptr_t arena, const std::vector<std::uintptr_t>& slots, int threads) const {
  if (static_cast<int>(slots.size()) < slots_)
    throw std::invalid_argument("the list reads " + std::to_string(slots_) + " slots, got " +
                                std::to_string(slots.size()));
  const Frame frame{reinterpret_cast<char*>(arena), slots.data(), threads};
  for (const auto& call : calls_) call(frame);
}

}  // namespace sk
