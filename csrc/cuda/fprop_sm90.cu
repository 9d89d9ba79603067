// y[n,k,p,q] = finish( sum over the live stripes (k,(r,s)) of filter k, over c:  w[k,c,r,s] * x[n, c, p + r, q + s] )
//
// Hopper's own instructions: one GEMM of a patch of input pixels with all stripes of a tile of filters,
// z[pixel][stripe] = sum over c of x[pixel][c] * w[stripe][c], whose epilogue adds each column, shifted by its tap,
// to sums[place][filter] in shared memory. Executed work is exact at one stripe, but for the pixels of the halo and
// the last block's unused columns.
//
// One warpgroup loads (the copy engine does: x with its halo once for all blocks of a segment, weights through a ring),
// two compute in turn: while one multiplies a block of columns, the other adds its own to the sums. Turns are in the
// order of the blocks, so bits repeat. backends/cuda_wgmma.py lays out patch and columns.
#include "cuda/fprop_sm90.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/merge_sm90.h"
#include "cuda/tensor_map.h"
#include "cuda/tma.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kLoader = 40, kComputer = 232;  // registers a thread; (40 + 2 * 232) * 128 of 65536

struct Launch {
  CUtensorMap phase[kMaxPhases];
  Params params;
};

// One thread loads everything, in the order in which it is multiplied.
template <int Tiles, int N>
__device__ inline void load(const Launch& launch, const Shared& s) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const auto* segments = reinterpret_cast<const Segment*>(call.tables + l.steps);
  const auto* weights = static_cast<const unsigned char*>(call.weights);
  const int chunks = chunks_of(l), patch_bytes = patch_rows(l.walk) * kRowBytes;
  Cursor ring;
  int turn = 0;  // of x
  for_each_item(l, call.tables, [&](const FilterTile& filters, const Tile& tile) {
    for (int g = filters.segments; g < filters.segments_end; ++g, turn ^= 1) {
      const Segment segment = segments[g];
      for (int block = segment.blocks; block < segment.blocks_end; ++block)
        for (int c = 0; c < chunks; ++c, ring.advance(1, l.slab)) {
          if (block == segment.blocks) {
            mbarrier_wait(s.x_empty + c, turn ^ 1);
            mbarrier_expect(s.x_full + c, patch_bytes);
            copy_box(
                s.x + c * Tiles * 64 * kRowBytes, &launch.phase[segment.phase],
                {{c * kChunk, filters.group, tile.j + segment.origin_w, tile.i + segment.origin_h, tile.n}},
                s.x_full + c);
          }
          mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);
          mbarrier_expect(s.full + ring.stage, N * kRowBytes);
          copy_bulk(s.weights + ring.stage * N * kRowBytes,
                    weights + (static_cast<long long>(block) * chunks + c) * N * kRowBytes, N * kRowBytes,
                    s.full + ring.stage);
        }
    }
  });
}

// acc = the patch times one block of columns. A stage is given back when the products that read it are done.
// Always whole chunks: behind the last channel both operands are zeros, and a branch between these instructions has the
// assembler run them one by one (its remark C7520, which a test looks for).
//
// One warpgroup after the other: whoever waits for a phase of a barrier has to have seen the one before it end, or it
// takes that phase's parity for its own.
template <class T, int Tiles, int N>
__device__ inline void multiply(const Layout& l, const Shared& s, Cursor& ring, int turn, Turns& start,
                                float (&acc)[Tiles][N / 2]) {
  const int chunks = chunks_of(l), lane = threadIdx.x % 32;
  int before = 0;
  start.take();
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  for (int c = 0; c < chunks; ++c) {
    mbarrier_wait(s.x_full + c, turn);
    mbarrier_wait(s.full + ring.stage, ring.parity);
    const std::uint64_t x = matrix_descriptor(shared_address(s.x + c * Tiles * 64 * kRowBytes));
    const std::uint64_t w = matrix_descriptor(shared_address(s.weights + ring.stage * N * kRowBytes));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
      for (int t = 0; t < Tiles; ++t)  // 64 rows, or 16 channels, further in units of 16 bytes
        wgmma<T, N>(acc[t], x + t * (64 * kRowBytes / 16) + 2 * k, w + 2 * k, c + k);
    wgmma_commit();
    if (c > 0) {
      wgmma_wait<1>();
      if (lane == 0) mbarrier_arrive(s.empty + before);
    }
    before = ring.stage;
    ring.advance(1, l.slab);
  }
  start.pass();
  wgmma_wait<0>();
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  if (lane == 0) mbarrier_arrive(s.empty + before);
}

// Finishes the sums of an item, and leaves zeros for the next.
template <class T>
__device__ inline void store(const Layout& l, const Call& call, const FilterTile& filters, const Tile& tile,
                             float* sums) {
  const Walk& w = l.walk;
  const Strides& s = call.out_strides;
  const int thread = threadIdx.x % kWarpgroup, pairs = (filters.count + 1) / 2, places = places_of(w);
  int lanes = 1;
  while (lanes < pairs && lanes < kWarpgroup) lanes *= 2;
  for (int pair = thread % lanes; pair < pairs; pair += lanes) {
    const Channels c = channels_of(call.finish, 2 * pair, filters.count, filters.channel, nullptr);
    int m = thread / lanes;
    int n = m / (w.patch_h * w.patch_w), i = m / w.patch_w % w.patch_h, j = m % w.patch_w;
    for (; m < places; m += kWarpgroup / lanes) {
      auto* place = reinterpret_cast<Pair<float>*>(sums + m * l.pitch + c.first);
      const float sum[2] = {place->first, place->second};
      *place = {0.f, 0.f};
      if (i < w.tile_h && j < w.tile_w && tile.n + n < w.images && tile.i + i < w.out_h &&
          tile.j + j < w.out_w)
        store_pair<T>(
            call, 0, c,
            (tile.n + n) * s.n + (tile.i + i) * s.h + (tile.j + j) * s.w + filters.channel + c.first, sum);
      j += kWarpgroup / lanes;
      while (j >= w.patch_w) j -= w.patch_w, ++i;
      while (i >= w.patch_h) i -= w.patch_h, ++n;
    }
  }
}

// Blocks go to the two warpgroups alternately, over all items. The last block of a segment gives x back in its turn:
// by then every block before it has been multiplied.
template <class T, int Tiles, int N>
__device__ inline void compute(const Launch& launch, const Shared& s, int group) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const auto* segments = reinterpret_cast<const Segment*>(call.tables + l.steps);
  const int chunks = chunks_of(l), lane = threadIdx.x % 32;
  Cursor ring;
  Turns start{s.start, group}, merging{s.turn, group};
  int number = 0, turn = 0;
  for_each_item(l, call.tables, [&](const FilterTile& filters, const Tile& tile) {
    int left = filters.blocks;
    for (int g = filters.segments; g < filters.segments_end; ++g, turn ^= 1) {
      const Segment segment = segments[g];
      for (int block = segment.blocks; block < segment.blocks_end; ++block) {
        --left;
        if ((number++ & 1) != group) {
          ring.advance(chunks, l.slab);
          continue;
        }
        float acc[Tiles][N / 2];
        multiply<T, Tiles, N>(l, s, ring, turn, start, acc);
        merging.take();
        if (block + 1 == segment.blocks_end && lane == 0)
          for (int c = 0; c < chunks; ++c) mbarrier_arrive(s.x_empty + c);
        merge<Tiles, N>(l, acc, call.tables + l.lists + block * N, call.tables[l.entries + block], s.sums,
                        group);
        if (left == 0) store<T>(l, call, filters, tile, s.sums);
        merging.pass();
      }
    }
    if (filters.blocks == 0 && (number++ & 1) == group) {
      start.take(), start.pass();
      merging.take();
      store<T>(l, call, filters, tile, s.sums);
      merging.pass();
    }
  });
}

template <class T, int Tiles, int N>
__global__ void __launch_bounds__(kThreads, 1) fprop_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  const Shared s = shared_of<Tiles, N>(l);
  const int group = threadIdx.x / kWarpgroup;
  for (int i = threadIdx.x; i < places_of(l.walk) * l.pitch + kWarpgroup; i += kThreads) s.sums[i] = 0.f;
  if (threadIdx.x == 0) {
    for (int c = 0; c < chunks_of(l); ++c) mbarrier_init(s.x_full + c, 1), mbarrier_init(s.x_empty + c, 4);
    for (int i = 0; i < l.slab; ++i) mbarrier_init(s.full + i, 1), mbarrier_init(s.empty + i, 4);
    for (int g = 0; g < 2; ++g) mbarrier_init(s.start + g, 4), mbarrier_init(s.turn + g, 4);
    mbarriers_ready();
  }
  barrier();
  if (group == 2) {
    give_registers<kLoader>();
    if (threadIdx.x == 2 * kWarpgroup) load<Tiles, N>(launch, s);
  } else {
    take_registers<kComputer>();
    compute<T, Tiles, N>(launch, s, group);
  }
}

cudaError_t multiprocessors(int* count) {
  int device;
  const cudaError_t e = cudaGetDevice(&device);
  return e != cudaSuccess ? e : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <class T, int Tiles, int N>
cudaError_t launch_one(const Launch& launch_, void* stream) {
  const Layout& l = launch_.params.layout;
  int processors = 0;
  const cudaError_t e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const long long items = static_cast<long long>(l.groups) * l.tiles_out * tiles(l.walk);
  const dim3 grid(static_cast<unsigned>(items < processors ? items : processors));
  return launch(fprop_sm90_kernel<T, Tiles, N>, grid, kThreads, memory_of<Tiles, N>(l).end, stream, launch_);
}

// Calls with<Tiles, N>() of the layout: rows of the patch in 64s, and columns of a block.
template <class With>
int with_instance(const Layout& l, const With& with) {
  const int rows = patch_rows(l.walk);
  if (l.width == 64) return with(Constant<4>(), Constant<64>());
  if (l.width == 128 && rows <= 64) return with(Constant<1>(), Constant<128>());
  if (l.width == 128) return with(Constant<2>(), Constant<128>());
  return with(Constant<1>(), Constant<256>());
}

template <class T>
int launch_type(const Params& p, void* stream) {
  Launch launch_ = {};
  launch_.params = p;
  const Walk& w = p.layout.walk;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t e = tensor_map_encoder(&encode);
  for (int h = 0; h < w.in_step_h && h < w.in_h; ++h)
    for (int v = 0; v < w.in_step_w && v < w.in_w; ++v)
      if (e == cudaSuccess)
        e = encode_phase(encode, p.layout, p.call, h, v, &launch_.phase[h * w.in_step_w + v]);
  if (e != cudaSuccess) return e;
  return with_instance(p.layout, [&](auto t, auto n) {
    return launch_one<T, decltype(t)::value, decltype(n)::value>(launch_, stream);
  });
}

}  // namespace

int fprop_sm90_bytes(const Layout& l) {
  return with_instance(
      l, [&](auto t, auto n) { return memory_of<decltype(t)::value, decltype(n)::value>(l).end; });
}

// width: columns of a block, 64, 128 or 256; slab: stages of the ring.
int fprop_sm90(const Params& p, void* stream) {
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
