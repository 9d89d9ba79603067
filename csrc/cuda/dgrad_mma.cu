// dx[n,c,h,w] = sum over the live stripes (k,r,s):  w[k,c,r,s] * dy[n, k, h - r, w - s]
//
// Tensor cores, mma.sync: 16 channels x 8 pixels, reduced over the flat list of live stripes, exact at one
// stripe but for the rounding of each list to 16 (8 for tf32). A stripe's values of dy are gathered from the
// patch as the tensor core wants them: every lane reads its own filters and taps. Skipping (tap, 16 filters)
// blocks instead would execute .36 to .51 of the dense work at density .1 (simulated).
//
// A warp owns 64 pixels and all channels of the tile, in registers from the first stripe to the last. The
// order of the list is chosen so that the four stripes of a gather lie in different banks.
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pipeline.h"
#include "cuda/rows.h"
#include "cuda/tile_store.h"

namespace sk::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 8;  // 8-pixel columns of a warp
constexpr int kPixels = 8 * kColumns * kWarps;
constexpr int kFragment = 512;  // bytes: 16 channels x one unit of stripes, in the order lanes read them

// Stripes a lane gathers for one unit.
template <class T>
constexpr int kOwn = 8 / sizeof(T);

struct Memory {
  int patch, patch_size, weights, slab_size, offsets, end;
};

template <int Tiles>
struct Sums {
  static constexpr int pitch = 16 * Tiles + 4;  // what a warp spills at once lies in different banks
  static constexpr int bytes = kPixels * pitch * 4;
};

template <int Tiles>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.offsets = round_up(patch_rows(l.walk) * int(sizeof(PatchRow)), 16);
  m.patch = m.offsets + kPixels * 8;
  m.patch_size = patch_rows(l.walk) * l.pitch;
  m.slab_size = l.slab * Tiles * kFragment;
  m.weights = m.patch + 2 * m.patch_size;
  m.end = m.weights + 2 * m.slab_size;
  if (m.end < m.patch + Sums<Tiles>::bytes) m.end = m.patch + Sums<Tiles>::bytes;
  return m;
}

// The B fragment of one pixel: the values of the lane's stripes.
template <class T>
__device__ inline void gather(const unsigned char* pixel, const int (&where)[kOwn<T>],
                              std::uint32_t (&b)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (sizeof(T) == 4) {
      b[half] = to_tf32(*reinterpret_cast<const std::uint32_t*>(pixel + where[half]));
    } else {
      const std::uint32_t low = *reinterpret_cast<const std::uint16_t*>(pixel + where[2 * half]);
      const std::uint32_t high = *reinterpret_cast<const std::uint16_t*>(pixel + where[2 * half + 1]);
      b[half] = low | high << 16;
    }
  }
}

// acc += weights * dy for `units` units of stripes; where[unit][t][own] is an offset in the patch.
template <class T, int Tiles>
__device__ inline void execute(int units, const int* where, const unsigned char* patch,
                               const unsigned char* slab, const int (&row)[kColumns],
                               float (&acc)[Tiles][kColumns][4]) {
  where += threadIdx.x % 4 * kOwn<T>;
  slab += threadIdx.x % 32 * 16;
  for (int u = 0; u < units; ++u, where += 4 * kOwn<T>, slab += Tiles * kFragment) {
    int own[kOwn<T>];
#pragma unroll
    for (int i = 0; i < kOwn<T>; ++i) own[i] = where[i];
    std::uint32_t a[Tiles][4];
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      const uint4 w = *reinterpret_cast<const uint4*>(slab + m * kFragment);
      a[m][0] = w.x, a[m][1] = w.y, a[m][2] = w.z, a[m][3] = w.w;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      std::uint32_t b[2];
      gather<T>(patch + row[j], own, b);
#pragma unroll
      for (int m = 0; m < Tiles; ++m) mma<T>(acc[m][j], a[m], b);
    }
  }
}

// Accumulators to sums[pixel][channel].
template <int Tiles>
__device__ inline void spill(const float (&acc)[Tiles][kColumns][4], float* sums) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < Tiles; ++m)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[((warp * kColumns + j) * 8 + 2 * t + i % 2) * Sums<Tiles>::pitch + 16 * m + g + i / 2 * 8] =
            acc[m][j][i];
}

template <class T, int Tiles>
__global__ void __launch_bounds__(kThreads, 2) dgrad_mma_kernel(Params params) {
  const Layout& l = params.layout;
  const Call& call = params.call;
  const Work work = work_of(l, call.tables);
  const Memory memory = memory_of<Tiles>(l);
  unsigned char* shared = shared_memory();
  auto* rows = reinterpret_cast<PatchRow*>(shared);
  auto* offsets = reinterpret_cast<long long*>(shared + memory.offsets);
  unsigned char *patch = shared + memory.patch, *weights = shared + memory.weights;

  list_patch_rows<kThreads>(l.walk, work.tile, rows);
  for (int m = threadIdx.x; m < kPixels; m += kThreads)
    offsets[m] = offset_of_pixel(l.walk, work.tile, call.out_strides, m, work.offset);
  int row[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    row[j] = row_of_pixel(l.walk, (threadIdx.x / 32 * kColumns + j) * 8 + threadIdx.x % 32 / 4) * l.pitch;
  barrier();

  float acc[Tiles][kColumns][4] = {};
  const T* in = static_cast<const T*>(call.in) + work.group * l.group_in;
  const auto* packed = static_cast<const unsigned char*>(call.weights);
  const int* where = call.tables + l.lists;
  constexpr int kUnit = Tiles * kFragment;
  const auto load = [&](const Step& step, int half, int slab) {
    if (step.fresh)
      load_patch<T, kThreads>(l, rows, in, call.in_strides, step, patch + half * memory.patch_size);
    load_units<kUnit, kThreads>(packed + static_cast<long long>(step.weights) * kUnit, step.weight_units,
                                weights + slab * memory.slab_size);
  };
  run_steps(work.step, work.end, load, [&](const Step& step, int half, int slab) {
    execute<T, Tiles>(step.weight_units, where + step.entries, patch + half * memory.patch_size,
                      weights + slab * memory.slab_size, row, acc);
  });

  barrier();
  auto* sums = reinterpret_cast<float*>(patch);
  spill<Tiles>(acc, sums);
  barrier();
  store_tile<T, kThreads>(call, work.split, sums, Sums<Tiles>::pitch, kPixels, offsets,
                          work.group * l.group_out + work.out, min(l.tile_out, l.group_out - work.out),
                          nullptr);
}

}  // namespace

int dgrad_mma_bytes(const Layout& l) {
  return with_constant<2, 4>(l.width, [&](auto width) { return memory_of<decltype(width)::value>(l).end; });
}

// width: tiles of 16 channels, 2 or 4.
int dgrad_mma(const Params& p, void* stream) {
  const Layout& l = p.layout;
  return with_type(l.dtype, [&](auto type) {
    return with_constant<2, 4>(l.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      return launch(dgrad_mma_kernel<decltype(type), kWidth>, grid_of(l), kThreads, memory_of<kWidth>(l).end,
                    stream, p);
    });
  });
}

}  // namespace sk::cuda
