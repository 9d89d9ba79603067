// stripe_kernels._cuda: pointers, strides and sizes in, nothing out. The layout and the tables a kernel
// indexes memory by are validated when it is built; a call then only names tensors whose shapes the caller
// checked against the plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/cuda_check.h"
#include "bindings/gil.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace py = pybind11;
using namespace sk;
using namespace sk::cuda;

namespace {

using Ints = std::vector<int>;
using Offsets = std::array<long long, 4>;

void require(bool ok, const std::string& what) {
  if (!ok) throw py::value_error("stripe_kernels._cuda: " + what);
}

void succeed(int error, const std::string& what) {
  if (error) throw std::runtime_error("stripe_kernels._cuda: " + what + ": CUDA error " + error_text(error));
}

Layout layout_of(const Ints& v) {
  Layout l;
  static_assert(std::is_trivially_copyable_v<Layout> && sizeof(Layout) % sizeof(int) == 0);
  require(v.size() == sizeof l / sizeof(int), "a layout has " + std::to_string(sizeof l / sizeof(int)) +
                                                  " integers, got " + std::to_string(v.size()));
  std::memcpy(&l, v.data(), sizeof l);
  const Walk& w = l.walk;
  for (int i : {w.tile_n,    w.tile_h,  w.tile_w,  w.out_step_h, w.out_step_w, w.in_step_h,
                w.in_step_w, w.patch_h, w.patch_w, w.load_h,     w.load_w,     w.row_h,
                w.row_w,     w.classes, l.groups,  l.group_in,   l.group_out,  l.tile_out,
                l.tiles_out, l.chunk,   l.pitch,   l.splits})
    require(i > 0, "extents, steps, channels and splits are positive");
  for (int i : {w.images, w.tiles_n, w.tiles_h, w.tiles_w, w.out_h, w.out_w, w.in_h, w.in_w, l.slab})
    require(i >= 0, "sizes are not negative");
  require(((w.tile_h - 1) * w.row_h + 1) <= w.patch_h && ((w.tile_w - 1) * w.row_w + 1) <= w.patch_w,
          "a tile reads past its patch");
  require(static_cast<long long>(l.groups) * l.tiles_out <= 65535, "more than 65535 blocks of channels");
  require(static_cast<long long>(w.classes) * l.splits <= 65535, "more than 65535 classes and splits");
  return l;
}

struct Spec {
  const char* name;
  Launcher launch;
  int (*bytes)(const Layout&);
  void (TableCheck::*check)() const;
};

const Spec kSpecs[] = {
    {"fprop_ffma", fprop_ffma, fprop_ffma_bytes, &TableCheck::fprop_ffma},
    {"dgrad_ffma", dgrad_ffma, dgrad_ffma_bytes, &TableCheck::dgrad_ffma},
    {"wgrad_ffma", wgrad_ffma, wgrad_ffma_bytes, &TableCheck::wgrad_ffma},
    {"fprop_mma", fprop_mma, fprop_mma_bytes, &TableCheck::fprop_mma},
    {"dgrad_mma", dgrad_mma, dgrad_mma_bytes, &TableCheck::dgrad_mma},
    {"wgrad_mma", wgrad_mma, wgrad_mma_bytes, &TableCheck::wgrad_mma},
    {"fprop_sm90", fprop_sm90, fprop_sm90_bytes, &TableCheck::fprop_sm90},
    {"fprop_taps_sm90", fprop_taps_sm90, fprop_taps_sm90_bytes, &TableCheck::fprop_taps_sm90},
    {"fprop_whole_sm90", fprop_whole_sm90, fprop_whole_sm90_bytes, &TableCheck::fprop_whole_sm90},
    {"dgrad_sm90", dgrad_sm90, dgrad_sm90_bytes, &TableCheck::dgrad_sm90},
    {"wgrad_sm90", wgrad_sm90, wgrad_sm90_bytes, &TableCheck::wgrad_sm90},
};

const Spec& spec_of(const std::string& name) {
  for (const Spec& s : kSpecs)
    if (name == s.name) return s;
  throw py::value_error("stripe_kernels._cuda: no kernel " + name);
}

DType dtype_of(int code) {
  require(code >= 0 && code <= 2, "dtype code is 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(code);
}

Finish finish_of(std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t residual, int activation) {
  require(activation >= 0 && activation <= 4, "activation code is 0 to 4");
  return {reinterpret_cast<const float*>(scale), reinterpret_cast<const float*>(shift),
          reinterpret_cast<const void*>(residual), static_cast<Activation>(activation)};
}

struct Kernel {
  Spec spec;
  Params params{};

  Kernel(const std::string& name, int dtype, const Ints& layout, const Ints& tables) : spec(spec_of(name)) {
    params.layout = layout_of(layout);
    params.layout.dtype = dtype_of(dtype);
    (TableCheck(params.layout, tables).*spec.check)();
  }

  void run(std::uintptr_t stream, std::uintptr_t tables, std::uintptr_t in, const Offsets& in_strides,
           std::uintptr_t weights, std::uintptr_t out, const Offsets& out_strides, std::uintptr_t partial,
           long long out_count, std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t residual,
           int activation) const {
    require((partial != 0) == (params.layout.splits > 1),
            "splits need a place for their shares, and only they");
    Params p = params;
    p.call.tables = reinterpret_cast<const int*>(tables);
    p.call.in = reinterpret_cast<const void*>(in);
    p.call.in_strides = {in_strides[0], in_strides[1], in_strides[2], in_strides[3]};
    p.call.weights = reinterpret_cast<const void*>(weights);
    p.call.out = reinterpret_cast<void*>(out);
    p.call.out_strides = {out_strides[0], out_strides[1], out_strides[2], out_strides[3]};
    p.call.partial = reinterpret_cast<float*>(partial);
    p.call.out_count = out_count;
    p.call.finish = finish_of(scale, shift, residual, activation);
    succeed(spec.launch(p, reinterpret_cast<void*>(stream)), spec.name);
  }
};

void run_reduce(std::uintptr_t stream, std::uintptr_t partial, int splits, std::uintptr_t out, int dtype,
                long long count, int channels, long long channel_stride, std::uintptr_t scale,
                std::uintptr_t shift, std::uintptr_t residual, int activation) {
  require(splits > 0 && count >= 0 && channels > 0 && channel_stride > 0,
          "splits, channels and strides are positive");
  Reduction r{};
  r.partial = reinterpret_cast<const float*>(partial);
  r.out = reinterpret_cast<void*>(out);
  r.count = count, r.channel_stride = channel_stride;
  r.splits = splits, r.channels = channels, r.dtype = dtype_of(dtype);
  r.finish = finish_of(scale, shift, residual, activation);
  succeed(reduce(r, reinterpret_cast<void*>(stream)), "reduce");
}

void run_copy_rows(std::uintptr_t stream, std::uintptr_t values, std::uintptr_t row, std::uintptr_t out,
                   long long count, long long bytes) {
  require(count >= 0 && bytes >= 0 && bytes % 16 == 0 && values % 16 == 0 && out % 16 == 0,
          "rows come in pieces of 16 bytes");
  succeed(copy_rows({reinterpret_cast<const void*>(values), reinterpret_cast<const int*>(row),
                     reinterpret_cast<void*>(out), count, bytes / 16},
                    reinterpret_cast<void*>(stream)),
          "copy_rows");
}

using Pairs = std::vector<std::array<int, 2>>;

template <std::size_t Most>
int copy_shifts(const Pairs& from, Shift (&to)[Most]) {
  require(from.size() <= Most, std::to_string(from.size()) + " taps, at most " + std::to_string(Most));
  for (std::size_t i = 0; i < from.size(); ++i) {
    require(std::abs(from[i][0]) < 32768 && std::abs(from[i][1]) < 32768, "a tap's shift has 16 bits");
    to[i] = {static_cast<short>(from[i][0]), static_cast<short>(from[i][1])};
  }
  return static_cast<int>(from.size());
}

// sizes: rows, maps, images, out_h, out_w, map_h, map_w, filters, width.
void run_stripe_sum(std::uintptr_t stream, int dtype, std::uintptr_t z, long long pitch, std::uintptr_t out,
                    const Offsets& out_strides, std::uintptr_t tables, const std::array<int, 9>& sizes,
                    const Pairs& shifts, std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t residual,
                    int activation) {
  require(pitch > 0 && pitch <= INT_MAX, "a row of z has 1 to 2^31 - 1 values");
  StripeSum t{};
  t.z = reinterpret_cast<const void*>(z), t.out = reinterpret_cast<void*>(out);
  t.tables = reinterpret_cast<const int*>(tables), t.pitch = static_cast<int>(pitch);
  t.out_strides = {out_strides[0], out_strides[1], out_strides[2], out_strides[3]};
  t.finish = finish_of(scale, shift, residual, activation);
  t.rows = sizes[0], t.maps = sizes[1];
  t.images = sizes[2], t.out_h = sizes[3], t.out_w = sizes[4], t.map_h = sizes[5], t.map_w = sizes[6];
  t.filters = sizes[7], t.width = sizes[8], t.dtype = dtype_of(dtype);
  t.shift_count = copy_shifts(shifts, t.shifts);
  require(t.images >= 0 && t.out_h > 0 && t.out_w > 0 && t.filters > 0 && t.width > 0,
          "a sum's sizes are positive");
  require(1LL * t.images * t.out_h * t.out_w <= INT_MAX - 128, "more pixels than 32 bits number");
  succeed(stripe_sum(t, reinterpret_cast<void*>(stream)), "stripe_sum");
}

// sizes: row_bytes, ranges, places, tap_of, images, rows, columns, out_h, out_w, pieces, tile, most_rows, splits.
void run_stripe_spread(std::uintptr_t stream, int dtype, std::uintptr_t dy, std::uintptr_t p,
                       std::uintptr_t tables, long long pitch, long long pixel_bytes, long long first_byte,
                       const std::array<int, 13>& sizes, const Pairs& taps) {
  StripeSpread t{};
  t.dy = reinterpret_cast<const void*>(dy), t.p = reinterpret_cast<void*>(p);
  t.tables = reinterpret_cast<const int*>(tables), t.pitch = pitch;
  t.pixel_bytes = pixel_bytes, t.first_byte = first_byte, t.row_bytes = sizes[0];
  t.ranges = sizes[1], t.places = sizes[2], t.tap_of = sizes[3];
  t.images = sizes[4], t.rows = sizes[5], t.columns = sizes[6], t.out_h = sizes[7], t.out_w = sizes[8];
  t.pieces = sizes[9], t.tile = sizes[10], t.most_rows = sizes[11], t.splits = sizes[12],
  t.dtype = dtype_of(dtype);
  t.tap_count = copy_shifts(taps, t.taps);
  require(t.row_bytes > 0 && t.images >= 0 && t.rows > 0 && t.columns > 0 && t.pieces > 0 &&
              t.most_rows >= 0 && t.splits > 0 && t.splits <= 65535,
          "a spread's sizes are positive");
  require(t.tile == 32 || t.tile == 64 || t.tile == 128, "a tile has 32, 64 or 128 pixels");
  require((t.row_bytes | pixel_bytes | first_byte | dy | p) % 16 == 0 && pitch * size_of(t.dtype) % 16 == 0,
          "a spread moves pieces of 16 bytes");
  require(1LL * t.images * t.rows * t.columns <= INT_MAX - t.tile, "more pixels than 32 bits number");
  succeed(stripe_spread(t, reinterpret_cast<void*>(stream)), "stripe_spread");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  if (const char* reason = refuse_interpreter()) throw py::import_error(reason);
  m.doc() = "Stripe convolutions on NVIDIA GPUs. Raw pointers: use stripe_kernels.stripe_conv2d.";
  m.def(
      "devices",
      [] {
        int count = 0;
        succeed(device_count(&count), "devices");
        return count;
      },
      "Number of GPUs; RuntimeError with the driver's message where there is none.");
  m.def(
      "shared_bytes",
      [](const std::string& name, int dtype, const Ints& layout) {
        Layout l = layout_of(layout);
        l.dtype = dtype_of(dtype);
        return spec_of(name).bytes(l);
      },
      "Shared memory a block of this kernel needs with this layout.");
  m.def("reduce", &run_reduce);
  m.def("copy_rows", &run_copy_rows);
  m.def("stripe_sum", &run_stripe_sum);
  m.def("stripe_spread", &run_stripe_spread);
  py::class_<Kernel>(m, "Kernel")
      .def(py::init<const std::string&, int, const Ints&, const Ints&>())
      .def("run", &Kernel::run);
}
