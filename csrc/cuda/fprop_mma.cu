// y[n,k,p,q] = finish( sum over the columns of filter k, over their taps (r,s), over c:  w[column,(r,s),c] *
// x[n, c, p + r, q + s] )
//
// Tensor cores, mma.sync: 16 pixels x 8 columns. A column is a filter or a part of it; eight columns with
// like taps make a block, whose accumulators stay in registers through all taps and channels. A tap executes
// the blocks that live there, a warp-uniform choice. Parts of a filter meet in the epilogue.
// backends/cuda_columns.py cuts the columns and says what it gains.
//
// A warp owns 32 pixels and all columns of the tile: its A fragments then serve every live block of a tap.
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pipeline.h"
#include "cuda/rows.h"
#include "cuda/tile_store.h"

namespace sk::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 2;  // 16-pixel tiles of a warp
constexpr int kPixels = 16 * kRows * kWarps;
constexpr int kFragment = 512;  // bytes: 8 columns x 64 bytes of channels, in the order lanes read them

struct Entry {
  int row, blocks;  // offset of the tap in the patch; bit b: block b lives
};

struct Memory {
  int patch, patch_size, weights, slab_size, offsets, end;
};

// The sums take the place of the patches once these are done with.
template <int Blocks>
struct Sums {
  static constexpr int pitch = 8 * Blocks + 8;  // eight rows of a fragment in different banks
  static constexpr int bytes = kPixels * pitch * 4;
};

template <int Blocks>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.offsets = round_up(patch_rows(l.walk) * int(sizeof(PatchRow)), 16);
  m.patch = m.offsets + kPixels * 8;
  m.patch_size = patch_rows(l.walk) * l.pitch;
  m.slab_size = l.slab * kFragment;
  m.weights = m.patch + 2 * m.patch_size;
  m.end = m.weights + 2 * m.slab_size + kFragment;  // the prefetch reads one fragment past the last
  if (m.end < m.patch + Sums<Blocks>::bytes) m.end = m.patch + Sums<Blocks>::bytes;
  return m;
}

// acc[.][b] += pixels[.] * weights[b] for the live blocks b, 64 bytes of channels.
template <class T, int Blocks>
__device__ inline void multiply(const unsigned char* const (&pixels)[kRows], int at, int live,
                                const unsigned char*& weights, uint4& next, float (&acc)[kRows][Blocks][4]) {
  std::uint32_t a[kRows][2][4];
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      load_matrices(a[m][k], pixels[m] + at + 32 * k);
      if constexpr (sizeof(T) == 4)
        for (std::uint32_t& word : a[m][k]) word = to_tf32(word);
    }
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    if (!(live >> b & 1)) continue;
    const uint4 w = next;
    weights += kFragment;
    next = *reinterpret_cast<const uint4*>(weights);  // on its way while this block is multiplied
    const std::uint32_t low[2] = {w.x, w.y}, high[2] = {w.z, w.w};
#pragma unroll
    for (int m = 0; m < kRows; ++m) mma<T>(acc[m][b], a[m][0], low);
#pragma unroll
    for (int m = 0; m < kRows; ++m) mma<T>(acc[m][b], a[m][1], high);
  }
}

template <class T, int Blocks>
__device__ inline void execute(const Layout& l, const Entry* entries, const Step& step,
                               const unsigned char* patch, const unsigned char* slab, const int (&row)[kRows],
                               float (&acc)[kRows][Blocks][4]) {
  const int bytes = min(l.chunk, l.group_in - step.channel) * int(sizeof(T));
  const unsigned char* weights = slab + threadIdx.x % 32 * 16;
  uint4 next = *reinterpret_cast<const uint4*>(weights);
  for (int e = step.entries; e < step.entries_end; ++e) {
    const Entry entry = entries[e];
    const unsigned char* pixels[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) pixels[m] = patch + row[m] + entry.row * l.pitch;
    for (int at = 0; at < bytes; at += 64) multiply<T, Blocks>(pixels, at, entry.blocks, weights, next, acc);
  }
}

// Accumulators to sums[pixel][column]; the padding columns become zero: parts a filter does not have point
// there.
template <int Blocks>
__device__ inline void spill(const float (&acc)[kRows][Blocks][4], float* sums) {
  constexpr int pitch = Sums<Blocks>::pitch;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* row = sums + ((warp * kRows + m) * 16 + 8 * half + g) * pitch + 2 * t;
#pragma unroll
      for (int b = 0; b < Blocks; ++b)
        *reinterpret_cast<Pair<float>*>(row + 8 * b) = {acc[m][b][2 * half], acc[m][b][2 * half + 1]};
      *reinterpret_cast<Pair<float>*>(row + 8 * Blocks) = {0.f, 0.f};
    }
}

template <class T, int Blocks>
__global__ void __launch_bounds__(kThreads, 2) fprop_mma_kernel(Params params) {
  const Layout& l = params.layout;
  const Call& call = params.call;
  const Work work = work_of(l, call.tables);
  const Memory memory = memory_of<Blocks>(l);
  unsigned char* shared = shared_memory();
  auto* rows = reinterpret_cast<PatchRow*>(shared);
  auto* offsets = reinterpret_cast<long long*>(shared + memory.offsets);
  unsigned char *patch = shared + memory.patch, *weights = shared + memory.weights;

  list_patch_rows<kThreads>(l.walk, work.tile, rows);
  for (int m = threadIdx.x; m < kPixels; m += kThreads)
    offsets[m] = offset_of_pixel(l.walk, work.tile, call.out_strides, m, work.offset);
  const int lane = threadIdx.x % 32;
  int row[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m)
    row[m] = row_of_pixel(l.walk, (threadIdx.x / 32 * kRows + m) * 16 + lane % 16) * l.pitch + lane / 16 * 16;
  barrier();

  float acc[kRows][Blocks][4] = {};
  const T* in = static_cast<const T*>(call.in) + work.group * l.group_in;
  const auto* packed = static_cast<const unsigned char*>(call.weights);
  const auto* entries = reinterpret_cast<const Entry*>(call.tables + l.entries);
  const auto load = [&](const Step& step, int half, int slab) {
    if (step.fresh)
      load_patch<T, kThreads>(l, rows, in, call.in_strides, step, patch + half * memory.patch_size);
    load_units<kFragment, kThreads>(packed + static_cast<long long>(step.weights) * kFragment,
                                    step.weight_units, weights + slab * memory.slab_size);
  };
  run_steps(work.step, work.end, load, [&](const Step& step, int half, int slab) {
    execute<T, Blocks>(l, entries, step, patch + half * memory.patch_size, weights + slab * memory.slab_size,
                       row, acc);
  });

  barrier();
  auto* sums = reinterpret_cast<float*>(patch);
  spill<Blocks>(acc, sums);
  barrier();
  const int* columns = call.tables + l.lists + blockIdx.y * (4 + kMaxParts * l.tile_out);
  store_tile<T, kThreads>(call, work.split, sums, Sums<Blocks>::pitch, kPixels, offsets,
                          work.group * l.group_out + work.out, min(l.tile_out, l.group_out - work.out),
                          columns);
}

}  // namespace

int fprop_mma_bytes(const Layout& l) {
  return with_constant<8, 16>(l.width, [&](auto width) { return memory_of<decltype(width)::value>(l).end; });
}

// width: blocks of eight columns, 8 or 16.
int fprop_mma(const Params& p, void* stream) {
  const Layout& l = p.layout;
  return with_type(l.dtype, [&](auto type) {
    return with_constant<8, 16>(l.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      return launch(fprop_mma_kernel<decltype(type), kWidth>, grid_of(l), kThreads, memory_of<kWidth>(l).end,
                    stream, p);
    });
  });
}

}  // namespace sk::cuda
