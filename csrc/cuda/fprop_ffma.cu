// y[n,k,p,q] = finish( sum over the live taps (r,s) of filter k, over c:  w[k,c,r,s] * x[n, c, p + r, q + s]
// )
//
// Strict float32, exact at one filter: a tap multiplies its live filters only. A thread owns two pixels. Up
// to eight filters of a tap are summed over a chunk of channels in registers, then added to the tile's sums
// in shared memory: filters cannot keep registers of their own, since which of them live changes with every
// tap.
#include "cuda/epilogue.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pipeline.h"
#include "cuda/planes.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 128, kPixels = 2 * kThreads;
constexpr int kSumPitch = kPixels + 1;  // both ways of reading the sums are free of bank conflicts

struct Entry {
  int row, filters, count, unused;  // offset of the tap in the patch; its live filters in the lists
};

struct Memory {
  int planes, weights, sums, end;
};

__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.planes = round_up(patch_rows(l.walk) * int(sizeof(PatchRow)), 16);
  m.weights = m.planes + 2 * round_up(l.chunk * l.pitch * 4, 16);
  m.sums = m.weights + 2 * l.slab * l.chunk * 4;
  m.end = m.sums + l.tile_out * kSumPitch * 4;
  return m;
}

// sums[f] += over c: weights[f][c] * planes[c], for F filters of one tap.
template <int F>
__device__ inline void multiply(const Layout& l, const float* const (&pixel)[2], const float* weights,
                                const int* filters, float* sums) {
  float acc[F][2] = {};
  for (int c = 0; c < l.chunk; c += 4) {
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      for (int p = 0; p < 2; ++p) x[p][i] = pixel[p][(c + i) * l.pitch];
#pragma unroll
    for (int f = 0; f < F; ++f) {
      const float4 w = *reinterpret_cast<const float4*>(weights + f * l.chunk + c);
#pragma unroll
      for (int p = 0; p < 2; ++p) acc[f][p] = dot4(w, x[p], acc[f][p]);
    }
  }
#pragma unroll
  for (int f = 0; f < F; ++f) {
    float* sum = sums + filters[f] * kSumPitch + threadIdx.x;
    sum[0] += acc[f][0], sum[kThreads] += acc[f][1];
  }
}

__device__ inline void execute(const Layout& l, const int* tables, const Step& step, const float* planes,
                               const float* weights, const int (&row)[2], float* sums) {
  const Entry* entries = reinterpret_cast<const Entry*>(tables + l.entries);
  for (int e = step.entries; e < step.entries_end; ++e) {
    const Entry entry = entries[e];
    const float* pixel[2] = {planes + row[0] + entry.row, planes + row[1] + entry.row};
    const int* filters = tables + l.lists + entry.filters;
    int left = entry.count;
    const auto block = [&](auto width) {
      constexpr int F = decltype(width)::value;
      multiply<F>(l, pixel, weights, filters, sums);
      weights += F * l.chunk, filters += F, left -= F;
    };
    while (left >= 8) block(Constant<8>());
    if (left >= 4) block(Constant<4>());
    if (left >= 2) block(Constant<2>());
    if (left >= 1) block(Constant<1>());
  }
}

// Lanes follow what is contiguous in y: pixels, or filters.
__device__ inline void write(const Layout& l, const Call& call, const Work& work, const long long* offsets,
                             const float* sums) {
  const int filters = min(l.tile_out, l.group_out - work.out), first = work.group * l.group_out + work.out;
  if (call.out_strides.c != 1) {
    for (int p = threadIdx.x; p < kPixels; p += kThreads)
      for (int f = 0; f < filters && offsets[p] >= 0; ++f)
        store<float>(call, work.split, first + f, offsets[p] + (first + f) * call.out_strides.c,
                     sums[f * kSumPitch + p]);
    return;
  }
  for (int f = threadIdx.x % 32; f < filters; f += 32)
    for (int p = threadIdx.x / 32; p < kPixels; p += kThreads / 32)
      if (offsets[p] >= 0)
        store<float>(call, work.split, first + f, offsets[p] + first + f, sums[f * kSumPitch + p]);
}

__global__ void __launch_bounds__(kThreads, 4) fprop_ffma_kernel(Params params) {
  const Layout& l = params.layout;
  const Call& call = params.call;
  const Work work = work_of(l, call.tables);
  const Memory memory = memory_of(l);
  unsigned char* shared = shared_memory();
  auto* rows = reinterpret_cast<PatchRow*>(shared);
  auto* planes = reinterpret_cast<float*>(shared + memory.planes);
  auto* weights = reinterpret_cast<float*>(shared + memory.weights);
  auto* sums = reinterpret_cast<float*>(shared + memory.sums);
  const int patch_size = round_up(l.chunk * l.pitch, 4), slab_size = l.slab * l.chunk;

  list_patch_rows<kThreads>(l.walk, work.tile, rows);
  for (int i = threadIdx.x; i < l.tile_out * kSumPitch; i += kThreads) sums[i] = 0.f;
  const int row[2] = {row_of_pixel(l.walk, threadIdx.x), row_of_pixel(l.walk, threadIdx.x + kThreads)};
  barrier();

  const float* in = static_cast<const float*>(call.in) + work.group * l.group_in * call.in_strides.c;
  const auto load = [&](const Step& step, int patch, int slab) {
    if (step.fresh)
      load_planes<kThreads>(l, rows, in, call.in_strides, step, l.chunk, planes + patch * patch_size);
    const float* from =
        static_cast<const float*>(call.weights) + static_cast<long long>(step.weights) * l.chunk;
    load_linear<kThreads>(from, step.weight_units * l.chunk, weights + slab * slab_size);
  };
  run_steps(work.step, work.end, load, [&](const Step& step, int patch, int slab) {
    execute(l, call.tables, step, planes + patch * patch_size, weights + slab * slab_size, row, sums);
  });

  barrier();
  auto* offsets = reinterpret_cast<long long*>(planes);
  for (int p = threadIdx.x; p < kPixels; p += kThreads)
    offsets[p] = offset_of_pixel(l.walk, work.tile, call.out_strides, p, work.offset);
  barrier();
  write(l, call, work, offsets, sums);
}

}  // namespace

int fprop_ffma_bytes(const Layout& l) { return memory_of(l).end; }

int fprop_ffma(const Params& p, void* stream) {
  return launch(fprop_ffma_kernel, grid_of(p.layout), kThreads, fprop_ffma_bytes(p.layout), stream, p);
}

}  // namespace sk::cuda
