// dw[a,c] = sum over the pixels (n,p,q):  dy[n,k,p,q] * x[n, c, p + r, q + s],   a: the live stripe (k,r,s)
//
// Strict float32, exact at one stripe. Each of a block's warps owns up to eight stripes of one tap, its lanes
// two channels each, in registers over all the tiles of its split; splits are summed in a fixed order by
// reduce().
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/planes.h"

namespace sk::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kPixels = 128;
constexpr int kStripes = 8, kSlots = kWarps * kStripes, kChannels = 64;
constexpr int kPixelPitch = kPixels + 4;

// items: {group, origin_h, origin_w, 0} a block; entries: row of the tap, a warp; lists: {a or -1, k} a
// stripe.
struct Block {
  int group, origin_h, origin_w, unused;
};

struct Memory {
  int offsets, pixel_rows, planes, dy, end;
};

__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.offsets = round_up(patch_rows(l.walk) * int(sizeof(PatchRow)), 16);
  m.pixel_rows = m.offsets + kPixels * 8;
  m.planes = m.pixel_rows + kPixels * 4;
  m.dy = m.planes + round_up(kChannels * l.pitch * 4, 16);
  m.end = m.dy + kSlots * kPixelPitch * 4;
  return m;
}

// dy of the block's stripes, pixel by pixel. Lanes follow what is contiguous in dy.
__device__ inline void load_dy(const float* dy, const Strides& s, const long long* offsets,
                               const int* stripes, float* to) {
  const bool along_channels = s.c == 1;
  for (int i = threadIdx.x; i < kSlots * kPixels; i += kThreads) {
    const int slot = along_channels ? i % kSlots : i / kPixels, p = along_channels ? i / kSlots : i % kPixels;
    const bool valid = offsets[p] >= 0 && stripes[2 * slot] >= 0;
    copy_async<4>(to + slot * kPixelPitch + p, valid ? dy + offsets[p] + stripes[2 * slot + 1] * s.c : dy,
                  valid);
  }
}

// A stripe's sum over all pixels so far, and what rounding took from it: one plain running sum over a million
// pixels would lose digits.
struct Total {
  float sum, lost;

  __device__ void add(float value) {
    const float next = value - lost, total = sum + next;
    lost = (total - sum) - next;
    sum = total;
  }
};

__device__ inline void execute(const float* planes, int pitch, const int* pixel_rows, const float* dy,
                               Total (&totals)[kStripes][2]) {
  for (int first = 0; first < kPixels; first += 64) {
    float sums[kStripes][2] = {};
    for (int p = first; p < first + 64; p += 4) {
      float x[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        for (int c = 0; c < 2; ++c) x[c][i] = planes[c * 32 * pitch + pixel_rows[p + i]];
#pragma unroll
      for (int a = 0; a < kStripes; ++a) {
        const float4 d = *reinterpret_cast<const float4*>(dy + a * kPixelPitch + p);
#pragma unroll
        for (int c = 0; c < 2; ++c) sums[a][c] = dot4(d, x[c], sums[a][c]);
      }
    }
#pragma unroll
    for (int a = 0; a < kStripes; ++a)
#pragma unroll
      for (int c = 0; c < 2; ++c) totals[a][c].add(sums[a][c]);
  }
}

__global__ void __launch_bounds__(kThreads, 2) wgrad_ffma_kernel(Params params) {
  const Layout& l = params.layout;
  const Call& call = params.call;
  const Memory memory = memory_of(l);
  unsigned char* shared = shared_memory();
  auto* rows = reinterpret_cast<PatchRow*>(shared);
  auto* offsets = reinterpret_cast<long long*>(shared + memory.offsets);
  auto* pixel_rows = reinterpret_cast<int*>(shared + memory.pixel_rows);
  auto* planes = reinterpret_cast<float*>(shared + memory.planes);
  auto* dy = reinterpret_cast<float*>(shared + memory.dy);

  const Block block = reinterpret_cast<const Block*>(call.tables + l.items)[blockIdx.y];
  const int* stripes = call.tables + l.lists + blockIdx.y * kSlots * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = blockIdx.x * kChannels;
  const int tap = call.tables[l.entries + blockIdx.y * kWarps + warp];
  const float* in = static_cast<const float*>(call.in) + block.group * l.group_in * call.in_strides.c;
  for (int p = threadIdx.x; p < kPixels; p += kThreads) pixel_rows[p] = row_of_pixel(l.walk, p);

  Total totals[kStripes][2] = {};
  const int count = tiles(l.walk), split = blockIdx.z;
  const int begin = static_cast<int>(static_cast<long long>(count) * split / l.splits);
  const int end = static_cast<int>(static_cast<long long>(count) * (split + 1) / l.splits);
  for (int t = begin; t < end; ++t) {
    const Tile tile = tile_of(l.walk, t);
    barrier();
    list_patch_rows<kThreads>(l.walk, tile, rows);
    for (int p = threadIdx.x; p < kPixels; p += kThreads)
      offsets[p] = offset_of_pixel(l.walk, tile, call.out_strides, p, call.tables + l.classes);
    barrier();
    for (int half = 0; half < kChannels; half += 32) {
      const Step step = {block.origin_h, block.origin_w, channel + half, 1, 0, 0, 0, 0};
      load_planes<kThreads>(l, rows, in, call.in_strides, step, 32, planes + half * l.pitch);
    }
    load_dy(static_cast<const float*>(call.weights), call.out_strides, offsets, stripes, dy);
    copies_commit();
    copies_wait();
    barrier();
    execute(planes + lane * l.pitch + tap, l.pitch, pixel_rows, dy + warp * kStripes * kPixelPitch, totals);
  }

#pragma unroll
  for (int a = 0; a < kStripes; ++a) {
    const int row = stripes[2 * (warp * kStripes + a)];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int at = channel + lane + 32 * c;
      if (row >= 0 && at < l.group_in)
        store_sum<float>(call, split, static_cast<long long>(row) * l.group_in + at, totals[a][c].sum);
    }
  }
}

}  // namespace

int wgrad_ffma_bytes(const Layout& l) { return memory_of(l).end; }

// tiles_out: blocks of stripes, over all groups.
int wgrad_ffma(const Params& p, void* stream) {
  const dim3 grid((p.layout.group_in + kChannels - 1) / kChannels, p.layout.tiles_out, p.layout.splits);
  return launch(wgrad_ffma_kernel, grid, kThreads, wgrad_ffma_bytes(p.layout), stream, p);
}

}  // namespace sk::cuda
