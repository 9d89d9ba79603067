// stripe_kernels._cpu: pointers, strides and sizes in, nothing out. Everything that indexes memory is validated when a
// kernel object is built; a call then only names tensors whose shapes the caller checked against the plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bindings/gil.h"
#include "bindings/guard.h"
#include "bindings/list_function.h"
#include "bindings/probe.h"
#include "cpu/call_list.h"
#include "cpu/dgrad.h"
#include "cpu/fprop.h"
#include "cpu/fprop_filters.h"
#include "cpu/fprop_matrix.h"
#include "cpu/fprop_taps.h"
#include "cpu/isa/isa.h"
#include "cpu/lane_network.h"
#include "cpu/wgrad.h"

namespace py = pybind11;
using namespace sk;

namespace {

using Ints = std::vector<int>;
using Strides = std::array<std::int64_t, 4>;

void require(bool ok, const std::string& what) {
  if (!ok) throw py::value_error("stripe_kernels._cpu: " + what);
}

// (N, C, H, W, K, R, S, P, Q, stride_h, stride_w, pad_top, pad_left, dil_h, dil_w, groups)
ConvShape conv_shape(const Ints& v) {
  require(v.size() == 16, "a shape has 16 integers, got " + std::to_string(v.size()));
  const ConvShape s{v[0], v[1], v[2],  v[3],  v[4],  v[5],  v[6],  v[7],
                    v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
  for (int i : {s.C, s.K, s.R, s.S, s.stride_h, s.stride_w, s.dil_h, s.dil_w, s.groups})
    require(i > 0, "channels, filter extents, stride, dilation and groups are positive");
  for (int i : {s.N, s.H, s.W, s.P, s.Q, s.pad_top, s.pad_left})
    require(i >= 0, "sizes and padding are not negative");
  require(s.C % s.groups == 0 && s.K % s.groups == 0, "groups divide C and K");
  for (std::int64_t i : {std::int64_t(s.N) * s.P, (std::int64_t(s.P) + s.H) * s.stride_h,
                         (std::int64_t(s.Q) + s.W) * s.stride_w, std::int64_t(s.R) * s.dil_h + s.pad_top,
                         std::int64_t(s.S) * s.dil_w + s.pad_left})
    require(i < (1 << 30), "an extent exceeds 2^30");
  return s;
}

Stripes stripes(const ConvShape& s, Ints tap_ptr, Ints filter, Ints row) {
  Stripes st;
  st.groups = s.groups, st.taps = s.taps();
  const std::size_t a = filter.size();
  require(tap_ptr.size() == static_cast<std::size_t>(st.groups) * st.taps + 1,
          "tap_ptr has groups * taps + 1 entries");
  require(row.size() == a, "filter and row have one entry a stripe");
  require(tap_ptr.front() == 0 && tap_ptr.back() == static_cast<int>(a), "tap_ptr covers the stripes");
  std::vector<bool> seen(a, false);
  for (std::size_t i = 0; i + 1 < tap_ptr.size(); ++i) {
    require(tap_ptr[i] <= tap_ptr[i + 1] && tap_ptr[i + 1] <= static_cast<int>(a), "tap_ptr does not fall");
    for (int j = tap_ptr[i]; j < tap_ptr[i + 1]; ++j) {
      require(filter[j] >= 0 && filter[j] < s.group_k(), "a stripe's filter lies outside its group");
      require(j == tap_ptr[i] || filter[j] > filter[j - 1], "filters of a tap rise");
      require(row[j] >= 0 && row[j] < static_cast<int>(a) && !seen[row[j]], "rows are a permutation");
      seen[row[j]] = true;
    }
  }
  st.tap_ptr.assign(tap_ptr.begin(), tap_ptr.end());
  st.filter.assign(filter.begin(), filter.end());
  st.row.assign(row.begin(), row.end());
  return st;
}

const IsaKernels& isa(const std::string& name) {
  const IsaKernels* found = find_isa(name.c_str());
  require(found, "instruction set '" + name + "' is not available here");
  return *found;
}

// (mode, images, rows, filter_parts, window)
Tiling tiling(const Ints& v, const IsaKernels& k) {
  require(v.size() == 5, "a tiling has 5 integers");
  for (int i = 1; i < 5; ++i) require(v[i] >= 1, "a tiling's extents are positive");
  require(v[0] >= 0 && v[0] <= 2, "lane mode is 0, 1 or 2");
  const Tiling t{static_cast<LaneMode>(v[0]), v[1], v[2], v[3], v[4]};
  if (t.mode == LaneMode::pixels) require(t.images == 1, "pixel lanes take one image a block");
  if (t.mode == LaneMode::batch)
    require(t.images % k.lanes == 0 && t.images <= 64,
            "batch lanes take whole vectors of images, 64 at most");
  return t;
}

DType dtype(int code) {
  require(code >= 0 && code <= 2, "dtype code is 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(code);
}

TensorView view(std::uintptr_t p, int type, const Strides& s) {
  TensorView t;
  t.data = reinterpret_cast<void*>(p);
  t.dtype = dtype(type);
  for (int i = 0; i < 4; ++i) t.stride[i] = s[i];
  return t;
}

Epilogue epilogue(std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t residual, int type,
                  const Strides& strides, int activation) {
  require(activation >= 0 && activation <= 4, "activation code is 0 to 4");
  Epilogue e;
  e.scale = reinterpret_cast<const float*>(scale);
  e.shift = reinterpret_cast<const float*>(shift);
  if (residual) e.residual = view(residual, type, strides);
  e.activation = static_cast<Activation>(activation);
  return e;
}

template <class Kernel>
void add_fprop(CallList& list, const Kernel& k, std::uintptr_t packed, std::uintptr_t scale,
               std::uintptr_t shift, int activation, int x, int residual, int y) {
  list.add_fprop(k, reinterpret_cast<const float*>(packed), epilogue(scale, shift, 0, 0, {}, activation), x,
                 residual, y);
}

// fprop of either kind, with its whole epilogue.
template <class Kernel>
void run_fprop(const Kernel& k, int threads, std::uintptr_t x, int x_type, const Strides& xs,
               std::uintptr_t packed, std::uintptr_t y, int y_type, const Strides& ys, std::uintptr_t scale,
               std::uintptr_t shift, std::uintptr_t residual, const Strides& rs, int activation) {
  require(threads >= 1, "threads is positive");
  k.run(view(x, x_type, xs), reinterpret_cast<const float*>(packed), view(y, y_type, ys),
        epilogue(scale, shift, residual, y_type, rs, activation), threads);
}

float* floats(std::uintptr_t p) { return reinterpret_cast<float*>(p); }

// What lies behind a classifier's convolutions is small.
MapSize map_size(const std::array<int, 4>& v) {
  std::int64_t all = 1;
  for (int i : v) {
    require(i >= 1, "a map has pixels");
    require((all *= i) < (1 << 30), "a map exceeds 2^30");
  }
  return {v[0], v[1], v[2], v[3]};
}

// Their floats can be counted.
Planes planes(const std::array<int, 5>& v) {
  const auto [n, c, h, w, pitch] = v;
  require(n >= 1 && c >= 1 && h >= 1 && w >= 1 && pitch >= w,
          "planes have sizes, and a pitch of at least a row");
  require((1. * h * pitch + 2 * kPlaneMargin) * c * n < 0x1p60, "planes exceed 2^60 floats");
  return {v[0], v[1], v[2], v[3], v[4]};
}

template <class Kernel>
void pack_weight(const Kernel& k, std::uintptr_t weight, int type, std::uintptr_t packed) {
  k.pack_weight(reinterpret_cast<const void*>(weight), dtype(type), floats(packed));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  if (const char* reason = refuse_interpreter()) throw py::import_error(reason);
  m.doc() = "Stripe convolutions on the CPU. Raw pointers: use stripe_kernels.stripe_conv2d.";
  using Release = py::call_guard<GilReleased>;

  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const char* const* n = isa_names(); *n; ++n) names.emplace_back(*n);
        return names;
      },
      "Instruction sets this build has and this processor runs, best first.");
  m.def(
      "bf16_channels",
      [](const std::string& name) {
        const IsaKernels& k = isa(name);
        return k.matrix.add ? kMatrixChannels : k.paired[1][1] ? 2 : 0;
      },
      "Channels of bfloat16 that fprop multiplies at a time: 32 in matrices (FpropMatrix), 2 in pairs "
      "(Fprop); it "
      "then takes bfloat16 and a multiple of them only. 0: fprop is in float32.");
  m.def("lanes", [](const std::string& name) { return isa(name).lanes; }, "float32 lanes of a vector.");
  m.def(
      "multiply_adds_a_cycle", [](const std::string& name) { return multiply_adds_a_cycle(isa(name)); },
      "Vectors that a core of this machine begins in a cycle, measured in some 50 microseconds.");

  py::class_<Fprop>(m, "Fprop")
      .def(py::init([](const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
                       const Ints& tile, const std::string& name) {
        const ConvShape s = conv_shape(shape);
        const bool paired = isa(name).paired[1][1] != nullptr;
        require(!paired || s.group_c() % 2 == 0,
                "'" + name + "' multiplies pairs of channels: C/groups is even");
        return new Fprop(s, stripes(s, tap_ptr, filter, row), tiling(tile, isa(name)), isa(name), paired);
      }))
      .def_property_readonly("packed_floats", &Fprop::packed_floats)
      .def_property_readonly("plane_pitch", &Fprop::plane_pitch)
      .def("pack_weight", &pack_weight<Fprop>, Release())
      .def("run", &run_fprop<Fprop>, Release());

  py::class_<FpropMatrix>(m, "FpropMatrix")
      .def(py::init([](const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
                       const Ints& tile, const std::string& name) {
        const ConvShape s = conv_shape(shape);
        require(isa(name).matrix.add, "'" + name + "' has no matrix registers");
        require(s.group_c() % kMatrixChannels == 0,
                "'" + name + "' multiplies channels in 32s: C/groups is a multiple");
        return new FpropMatrix(s, stripes(s, tap_ptr, filter, row), tiling(tile, isa(name)), isa(name));
      }))
      .def_property_readonly("packed_floats", &FpropMatrix::packed_floats)
      .def("pack_weight", &pack_weight<FpropMatrix>, Release())
      .def("run", &run_fprop<FpropMatrix>, Release());

  py::class_<FpropFilters>(m, "FpropFilters")
      .def(py::init([](const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
                       const Ints& tile, const std::string& name) {
        const ConvShape s = conv_shape(shape);
        require(tile.size() == 2 && tile[0] >= 1 && tile[1] >= 1, "filter lanes take (images, filter_parts)");
        return new FpropFilters(s, stripes(s, tap_ptr, filter, row), tile[0], tile[1], isa(name));
      }))
      .def_property_readonly("packed_floats", &FpropFilters::packed_floats)
      .def("pack_weight", &pack_weight<FpropFilters>, Release())
      .def("run", &run_fprop<FpropFilters>, Release());

  py::class_<FpropTaps>(m, "FpropTaps")
      .def(py::init([](const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
                       const Ints& tile, const std::string& name) {
        const ConvShape s = conv_shape(shape);
        require(tile.size() == 1 && tile[0] >= 1, "pairs of filters take (rows,)");
        return new FpropTaps(s, stripes(s, tap_ptr, filter, row), tile[0], isa(name));
      }))
      .def_property_readonly("packed_floats", &FpropTaps::packed_floats)
      .def("pack_weight", &pack_weight<FpropTaps>, Release())
      .def("run", &run_fprop<FpropTaps>, Release());

  py::class_<Dgrad>(m, "Dgrad")
      .def(py::init([](const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
                       const Ints& tile, const std::string& name) {
        const ConvShape s = conv_shape(shape);
        return new Dgrad(s, stripes(s, tap_ptr, filter, row), tiling(tile, isa(name)), isa(name));
      }))
      .def_property_readonly("packed_floats", &Dgrad::packed_floats)
      .def("pack_weight", &pack_weight<Dgrad>, Release())
      .def(
          "run",
          [](const Dgrad& k, int threads, std::uintptr_t dy, int dy_type, const Strides& dys,
             std::uintptr_t packed, std::uintptr_t dx, int dx_type, const Strides& dxs) {
            require(threads >= 1, "threads is positive");
            k.run(view(dy, dy_type, dys), floats(packed), view(dx, dx_type, dxs), threads);
          },
          Release());

  py::class_<Wgrad>(m, "Wgrad")
      .def(py::init([](const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
                       int chunk_pixels, const std::string& name) {
        const ConvShape s = conv_shape(shape);
        require(chunk_pixels > 0, "chunk_pixels is positive");
        return new Wgrad(s, stripes(s, tap_ptr, filter, row), chunk_pixels, isa(name));
      }))
      .def(
          "run",
          [](const Wgrad& k, int threads, std::uintptr_t x, int x_type, const Strides& xs, std::uintptr_t dy,
             int dy_type, const Strides& dys, std::uintptr_t dw, int dw_type) {
            require(threads >= 1, "threads is positive");
            k.run(view(x, x_type, xs), view(dy, dy_type, dys), reinterpret_cast<void*>(dw), dtype(dw_type),
                  threads);
          },
          Release());

  py::class_<LaneNetwork>(m, "LaneNetwork")
      .def(py::init([](int images, int parts, const std::string& name) {
        require(images > 0 && images <= 64 && images % isa(name).lanes == 0,
                "blocks are whole vectors of images, 64 at most");
        require(parts > 0, "parts is positive");
        return new LaneNetwork(images, parts, isa(name));
      }))
      .def("channel_floats", &LaneNetwork::channel_floats)
      .def("add_activation", &LaneNetwork::add_activation)
      .def("add_conv",
           [](LaneNetwork& n, const Ints& shape, const Ints& tap_ptr, const Ints& filter, const Ints& row,
              std::uintptr_t weight, std::uintptr_t scale, std::uintptr_t shift, int activation, int x,
              int residual, int y) {
             const ConvShape s = conv_shape(shape);
             const Epilogue e = epilogue(scale, shift, 0, 0, {}, activation);
             n.add_conv(s, stripes(s, tap_ptr, filter, row), floats(weight), e.scale, e.shift, e.activation,
                        x, residual, y);
           })
      .def("add_pool",
           [](LaneNetwork& n, int kind, const std::array<int, 6>& v, int x, int y) {
             require(kind >= 0 && kind <= 2,
                     "pool kind is 0 (max), 1 (average) or 2 (average with padding counted)");
             require(v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] > 0 && v[4] >= 0 && v[5] >= 0,
                     "a pool's extents are positive");
             n.add_pool(static_cast<Pool>(kind), {v[0], v[1], v[2], v[3], v[4], v[5]}, x, y);
           })
      .def("add_pointwise",
           [](LaneNetwork& n, std::uintptr_t scale, std::uintptr_t shift, int activation, int x, int residual,
              int y) {
             const Epilogue e = epilogue(scale, shift, 0, 0, {}, activation);
             n.add_pointwise(e.scale, e.shift, e.activation, x, residual, y);
           })
      .def(
          "run",
          [](const LaneNetwork& k, int threads, std::uintptr_t x, int x_type, const Strides& xs, int n,
             int input, std::uintptr_t y, int y_type, const Strides& ys, int output) {
            require(n >= 0 && threads >= 1, "n is not negative and threads is positive");
            k.run(view(x, x_type, xs), n, input, view(y, y_type, ys), output, threads);
          },
          Release())
      .def_property_readonly("bytes_per_thread", &LaneNetwork::bytes_per_thread);

  py::class_<CallList>(m, "CallList")
      .def(py::init<>())
      .def("add_arena",
           [](CallList& l, int type, const Strides& s, std::int64_t offset) {
             return l.add_arena(dtype(type), {s[0], s[1], s[2], s[3]}, offset);
           })
      .def("add_slot",
           [](CallList& l, int type, const Strides& s, int slot) {
             require(slot < (1 << 30), "a slot's number exceeds 2^30");
             return l.add_slot(dtype(type), {s[0], s[1], s[2], s[3]}, slot);
           })
      .def("add_planes", [](CallList& l, const std::array<int, 5>& v,
                            std::int64_t offset) { return l.add_planes(planes(v), offset); })
      .def_static("planes_floats", [](const std::array<int, 5>& v) { return planes(v).floats(); })
      .def("add_fprop", &add_fprop<Fprop>, py::keep_alive<1, 2>())
      .def("add_fprop", &add_fprop<FpropMatrix>, py::keep_alive<1, 2>())
      .def("add_fprop", &add_fprop<FpropFilters>, py::keep_alive<1, 2>())
      .def("add_fprop", &add_fprop<FpropTaps>, py::keep_alive<1, 2>())
      .def("add_pack", &CallList::add_pack<Fprop>, py::keep_alive<1, 2>())
      .def("add_pack", &CallList::add_pack<FpropMatrix>, py::keep_alive<1, 2>())
      .def("add_pack", &CallList::add_pack<FpropFilters>, py::keep_alive<1, 2>())
      .def("add_pack", &CallList::add_pack<FpropTaps>, py::keep_alive<1, 2>())
      .def("add_pack", &CallList::add_pack<Dgrad>, py::keep_alive<1, 2>())
      .def("add_packed_fprop", &CallList::add_packed_fprop<Fprop>, py::keep_alive<1, 2>())
      .def("add_packed_fprop", &CallList::add_packed_fprop<FpropMatrix>, py::keep_alive<1, 2>())
      .def("add_packed_fprop", &CallList::add_packed_fprop<FpropFilters>, py::keep_alive<1, 2>())
      .def("add_packed_fprop", &CallList::add_packed_fprop<FpropTaps>, py::keep_alive<1, 2>())
      .def("add_dgrad", &CallList::add_dgrad, py::keep_alive<1, 2>())
      .def("add_wgrad", &CallList::add_wgrad, py::keep_alive<1, 2>())
      .def("add_max_pool",
           [](CallList& l, const std::array<int, 6>& v, const std::array<int, 4>& in,
              const std::array<int, 4>& out, int x, int y) {
             require(v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] > 0 && v[4] >= 0 && v[5] >= 0,
                     "a pool's extents are positive");
             for (int i : in) require(i >= 0, "sizes are not negative");
             for (int i : out) require(i >= 0, "sizes are not negative");
             require(in[0] == out[0] && in[1] == out[1], "a pool keeps its images and channels");
             for (int i : {0, 1})
               for (std::int64_t reach :
                    {std::int64_t(out[2 + i]) * v[2 + i] + v[i], std::int64_t(in[2 + i]) + v[4 + i]})
                 require(reach < (1 << 30), "an extent exceeds 2^30");
             l.add_max_pool({v[0], v[1], v[2], v[3], v[4], v[5]}, {in[0], in[1], in[2], in[3]},
                            {out[0], out[1], out[2], out[3]}, x, y);
           })
      .def("add_average", [](CallList& l, const std::array<int, 4>& size, int x,
                             int y) { l.add_average(map_size(size), x, y); })
      .def("add_flatten", [](CallList& l, const std::array<int, 4>& size, int x,
                             int y) { l.add_flatten(map_size(size), x, y); })
      .def("add_linear",
           [](CallList& l, int weight, int bias, const std::array<int, 3>& v, int x, int y) {
             for (int i : v) require(i >= 0, "sizes are not negative");
             l.add_linear(weight, bias, v[0], v[1], v[2], x, y);
           })
      .def(
          "run",
          [](const CallList& l, int threads, std::uintptr_t arena, const std::vector<std::uintptr_t>& slots) {
            require(threads >= 1, "threads is positive");
            l.run(arena, slots, threads);
          },
          Release());

  m.def(
      "usable_exchange", [](const py::object& o) { return usable_exchange(o) != nullptr; },
      "Whether list_function and guard can see tensors through it.");
  m.def(
      "list_function",
      [](py::object list, py::object held, py::object tensor, py::object exchange, int threads,
         const py::tuple& inputs, py::tuple outputs, py::tuple parameters, py::object arena, bool keep) {
        return as_function(std::make_shared<ListFunction>(
            std::move(list), std::move(held), Tensors(std::move(tensor), std::move(exchange)), threads,
            inputs, std::move(outputs), std::move(parameters), std::move(arena), keep));
      },
      "A CallList as a function of tensors (bindings/list_function.h).");
  m.def(
      "guard",
      [](py::object function, py::tuple rest, const std::array<py::object, 5>& conditions, py::object tensor,
         py::object exchange, const py::tuple& inputs, const py::tuple& parameters) {
        const auto& [types, silent, denied, same, empty] = conditions;
        const Conditions c{types, silent, denied, same, empty};
        for (const auto& pair : c.same)
          require(PyTuple_CheckExact(pair.ptr()) && PyTuple_GET_SIZE(pair.ptr()) == 2,
                  "a function comes with what it returns");
        for (const auto& dict : c.empty) require(PyDict_Check(dict.ptr()), "only dicts are empty");
        return as_function(std::make_shared<Guard>(std::move(function), std::move(rest), c,
                                                   Tensors(std::move(tensor), std::move(exchange)), inputs,
                                                   parameters));
      },
      "A function where nothing but it is needed, else NotImplemented (bindings/guard.h).");
}
