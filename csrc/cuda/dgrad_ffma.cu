// dx[n,c,h,w] = sum over the live stripes (k,r,s):  w[k,c,r,s] * dy[n, k, h - r, w - s]
//
// Strict float32, exact at one stripe: filter and tap are one flat reduction index. A thread owns two pixels
// and sixteen channels, in registers from the first stripe to the last. A phase of the stride is a class with
// taps of its own.
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pipeline.h"
#include "cuda/planes.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 128, kChannels = 16;

struct Memory {
  int planes, weights, end;
};

__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.planes = round_up(patch_rows(l.walk) * int(sizeof(PatchRow)), 16);
  m.weights = m.planes + 2 * round_up(l.chunk * l.pitch * 4, 16);
  m.end = m.weights + 2 * l.slab * kChannels * 4;
  return m;
}

// totals += over the step's stripes: weights[stripe][channels] * planes[where[stripe]]. A step has a sum of
// its own: one running sum over all stripes is off by up to 1.3 times the budget (360 of them, float32).
__device__ inline void execute(const int* where, int stripes, const float* planes, const float* weights,
                               const int (&row)[2], float (&totals)[2][kChannels]) {
  float sums[2][kChannels] = {};
  for (int a = 0; a < stripes; ++a, weights += kChannels) {
    const float* plane = planes + where[a];
    const float dy[2] = {plane[row[0]], plane[row[1]]};
#pragma unroll
    for (int c = 0; c < kChannels; c += 4) {
      const float4 w = *reinterpret_cast<const float4*>(weights + c);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        sums[p][c] += w.x * dy[p], sums[p][c + 1] += w.y * dy[p];
        sums[p][c + 2] += w.z * dy[p], sums[p][c + 3] += w.w * dy[p];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
#pragma unroll
    for (int p = 0; p < 2; ++p) totals[p][c] += sums[p][c];
}

__global__ void __launch_bounds__(kThreads, 4) dgrad_ffma_kernel(Params params) {
  const Layout& l = params.layout;
  const Call& call = params.call;
  const Work work = work_of(l, call.tables);
  const Memory memory = memory_of(l);
  unsigned char* shared = shared_memory();
  auto* rows = reinterpret_cast<PatchRow*>(shared);
  auto* planes = reinterpret_cast<float*>(shared + memory.planes);
  auto* weights = reinterpret_cast<float*>(shared + memory.weights);
  const int patch_size = round_up(l.chunk * l.pitch, 4), slab_size = l.slab * kChannels;

  list_patch_rows<kThreads>(l.walk, work.tile, rows);
  const int row[2] = {row_of_pixel(l.walk, threadIdx.x), row_of_pixel(l.walk, threadIdx.x + kThreads)};
  barrier();

  const float* in = static_cast<const float*>(call.in) + work.group * l.group_in * call.in_strides.c;
  const int* where = call.tables + l.lists;
  float sums[2][kChannels] = {};
  const auto load = [&](const Step& step, int patch, int slab) {
    if (step.fresh)
      load_planes<kThreads>(l, rows, in, call.in_strides, step, l.chunk, planes + patch * patch_size);
    const float* from =
        static_cast<const float*>(call.weights) + static_cast<long long>(step.weights) * kChannels;
    load_linear<kThreads>(from, step.weight_units * kChannels, weights + slab * slab_size);
  };
  run_steps(work.step, work.end, load, [&](const Step& step, int patch, int slab) {
    const int* stripes = where + step.entries;
    execute(stripes, step.entries_end - step.entries, planes + patch * patch_size, weights + slab * slab_size,
            row, sums);
  });

  const int channels = min(kChannels, l.group_out - work.out), first = work.group * l.group_out + work.out;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const long long offset =
        offset_of_pixel(l.walk, work.tile, call.out_strides, threadIdx.x + p * kThreads, work.offset);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (offset >= 0 && c < channels)
        store_sum<float>(call, work.split, offset + (first + c) * call.out_strides.c, sums[p][c]);
  }
}

}  // namespace

int dgrad_ffma_bytes(const Layout& l) { return memory_of(l).end; }

int dgrad_ffma(const Params& p, void* stream) {
  return launch(dgrad_ffma_kernel, grid_of(p.layout), kThreads, dgrad_ffma_bytes(p.layout), stream, p);
}

}  // namespace sk::cuda
