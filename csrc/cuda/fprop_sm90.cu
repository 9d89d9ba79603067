// y[n,k,p,q] = finish( sum over the live stripes (k,(r,s)) of filter k, over c:  w[k,c,r,s] * x[n, c, p + r, q + s] )
//
// Hopper's own instructions: one GEMM of a patch of input pixels with all stripes of a tile of filters,
// z[pixel][stripe] = sum over c of x[pixel][c] * w[stripe][c], kept in x's type in shared memory, where every pixel of
// y adds up what its filter's stripes left for it. Executed work is exact at one stripe, but for the pixels of the
// halo and unused columns of a block.
//
// One warpgroup loads (the copy engine does: x with its halo once for all blocks of a segment, weights through a ring),
// two compute in turn: while one multiplies a block of columns, the other sums up its filters and stores them. No two
// write the same pixel of a filter, and sums have one order, so bits repeat. backends/cuda_wgmma.py lays out patch and
// columns.
#include "cuda/fprop_sm90.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/sum_sm90.h"
#include "cuda/tensor_map.h"
#include "cuda/tma.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kLoader = 40, kComputer = 232;  // registers a thread; (40 + 2 * 232) * 128 of 65536
static_assert(kLoader + 2 * kComputer <= kTradedRegisters);

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

// acc = the patch times one block of columns. A stage is given back when the products that read it are done, and so is
// x where this is the last that the warpgroup wants of it.
// Always whole chunks: behind the last channel both operands are zeros, and a branch between these instructions has the
// assembler run them one by one (its remark C7520, which a test looks for).
template <class T, int Tiles, int N>
__device__ inline void multiply(const Layout& l, const Shared& s, Cursor& ring, int turn, bool last,
                                float (&acc)[Tiles][N / 2]) {
  const int chunks = chunks_of(l), lane = threadIdx.x % 32;
  int before = 0;
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
      if (lane == 0 && last) mbarrier_arrive(s.x_empty + c - 1);
    }
    before = ring.stage;
    ring.advance(1, l.slab);
  }
}

template <int Tiles, int N>
__device__ inline void finish_products_of(const Layout& l, const Shared& s, int stage, bool last,
                                          float (&acc)[Tiles][N / 2]) {
  wgmma_wait<0>();
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  if (threadIdx.x % 32 == 0) {
    mbarrier_arrive(s.empty + stage);
    if (last) mbarrier_arrive(s.x_empty + chunks_of(l) - 1);
  }
}

// Bundles go to the two warpgroups alternately, over all items, and so do their turns to multiply: whoever waits for a
// phase of a barrier has to have seen the one before it end, or it takes that phase's parity for its own. A segment
// with one block has nothing for the other warpgroup, which gives x back for its part.
template <class T, int Tiles, int N>
__device__ inline void compute(const Launch& launch, const Shared& s, int group) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const auto* segments = reinterpret_cast<const Segment*>(call.tables + l.steps);
  const auto* blocks = reinterpret_cast<const Block*>(call.tables + l.entries);
  const int chunks = chunks_of(l), lane = threadIdx.x % 32;
  Cursor ring;
  Turns start{s.start, group};
  const Places<Tiles> places(l.walk);
  const Strides& strides = call.out_strides;
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(call.out) % 16 == 0 && (strides.n | strides.h | strides.w) % 8 == 0;
  const bool single = slots_of(l) == 1;  // then every block is a bundle
  int number = 0, turn = 0;
  for_each_item(l, call.tables, [&](const FilterTile& filters, const Tile& tile) {
    places.list(l.walk, tile, strides, s.offsets);
    for (int g = filters.segments; g < filters.segments_end; ++g, turn ^= 1) {
      const Segment segment = segments[g];
      bool mine = false;
      Block next = blocks[min(segment.blocks + ((number & 1) != group), segment.blocks_end - 1)];
      for (int i = segment.blocks; i < segment.blocks_end; ++i) {
        if ((number & 1) != group) {
          ring.advance(chunks, l.slab);
          number += single || blocks[i].last;
          continue;
        }
        const Block block = next;
        if (i + 2 < segment.blocks_end) next = blocks[i + 2];
        mine = true;
        number += block.last;
        const bool last = i + 2 >= segment.blocks_end;
        float acc[Tiles][N / 2];
        if (block.first) start.take();
        multiply<T, Tiles, N>(l, s, ring, turn, last, acc);
        if (block.last) {
          start.pass();
          load_table(l, call, block, *s.table);
        }
        finish_products_of<Tiles, N>(l, s, ring.before(l.slab), last, acc);
        put_products<T, Tiles, N>(acc,
                                  reinterpret_cast<T*>(s.products) + block.slot * N * kProductPitch<Tiles>);
        if (!block.last) continue;
        warpgroup_barrier(group);
        for (int first = -(block.channel % 8); first < block.count; first += kFilters) {
          if (checked(l))
            sum_filters<T, Tiles, true>(l, call, block, s, first);
          else
            sum_filters<T, Tiles, false>(l, call, block, s, first);
          warpgroup_barrier(group);
          store_filters<T, Tiles>(call, block, s, first, aligned);
          warpgroup_barrier(group);
        }
      }
      if (mine) continue;
      for (int c = 0; c < chunks; ++c) mbarrier_wait(s.x_full + c, turn);
      warp_barrier();  // every lane has seen the phase that the first one lets end
      if (lane == 0)
        for (int c = 0; c < chunks; ++c) mbarrier_arrive(s.x_empty + c);
    }
  });
}

template <class T, int Tiles, int N>
__global__ void __launch_bounds__(kThreads, 1) fprop_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  const int group = threadIdx.x / kWarpgroup;
  const Shared s = shared_of<Tiles, N>(l, group % 2);
  clear<Tiles>(l, s.x, s.products - kGuard * 2 - group % 2 * product_bytes<Tiles>(l));
  if (threadIdx.x == 0) {
    for (int c = 0; c < chunks_of(l); ++c) mbarrier_init(s.x_full + c, 1), mbarrier_init(s.x_empty + c, 8);
    for (int i = 0; i < l.slab; ++i) mbarrier_init(s.full + i, 1), mbarrier_init(s.empty + i, 4);
    for (int g = 0; g < 2; ++g) mbarrier_init(s.start + g, 4);
    mbarriers_ready();
  }
  stores_ready();
  barrier();
  if (group == 2) {
    give_registers<kLoader>();
    if (threadIdx.x == 2 * kWarpgroup) load<Tiles, N>(launch, s);
  } else {
    take_registers<kComputer>();
    compute<T, Tiles, N>(launch, s, group);
  }
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
  if (l.width == 96) return with(Constant<2>(), Constant<96>());
  if (l.width == 128) return with(Constant<1>(), Constant<128>());
  if (rows <= 64) return with(Constant<1>(), Constant<64>());
  if (rows <= 128) return with(Constant<2>(), Constant<64>());
  return with(Constant<4>(), Constant<64>());
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

// width: columns of a block, 64, 96 or 128; slab: stages of the ring; pitch: slots of a bundle; chunk: 2 where sums check
// that a row is of the patch, else 1.
int fprop_sm90(const Params& p, void* stream) {
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
