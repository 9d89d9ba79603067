// stripe_kernels._cuda: pointers, strides and sizes in, nothing out. The layout and the tables a kernel
// indexes memory by are validated when it is built; a call then only names tensors whose shapes the caller
// checked against the plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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
  void (*check)(const TableCheck&, const Layout&);
};

const Spec kSpecs[] = {
    {"fprop_ffma", fprop_ffma, fprop_ffma_bytes, [](const TableCheck& t, const Layout&) { t.fprop_ffma(); }},
    {"dgrad_ffma", dgrad_ffma, dgrad_ffma_bytes, [](const TableCheck& t, const Layout&) { t.dgrad_ffma(); }},
    {"wgrad_ffma", wgrad_ffma, wgrad_ffma_bytes,
     [](const TableCheck& t, const Layout& l) { t.wgrad(8, 1, 8, l.groups * l.group_out); }},
    {"fprop_mma", fprop_mma, fprop_mma_bytes, [](const TableCheck& t, const Layout&) { t.fprop_mma(); }},
    {"dgrad_mma", dgrad_mma, dgrad_mma_bytes, [](const TableCheck& t, const Layout&) { t.dgrad_mma(); }},
    {"wgrad_mma", wgrad_mma, wgrad_mma_bytes,
     [](const TableCheck& t, const Layout& l) { t.wgrad(4, 8, 8, l.slab); }},
    {"fprop_sm90", fprop_sm90, fprop_sm90_bytes, [](const TableCheck& t, const Layout&) { t.fprop_sm90(); }},
    {"fprop_taps_sm90", fprop_taps_sm90, fprop_taps_sm90_bytes,
     [](const TableCheck& t, const Layout&) { t.fprop_taps_sm90(); }},
    {"dgrad_sm90", dgrad_sm90, dgrad_sm90_bytes, [](const TableCheck& t, const Layout&) { t.dgrad_sm90(); }},
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
    spec.check(TableCheck(params.layout, tables), params.layout);
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
  py::class_<Kernel>(m, "Kernel")
      .def(py::init<const std::string&, int, const Ints&, const Ints&>())
      .def("run", &Kernel::run);
}
