// y[n,k,p,q] = finish( sum over the live stripes (k,(r,s)) of filter k, over c:  w[k,c,r,s] * x[n, c, p + r, q + s] )
//
// Hopper's own instructions, and two products. z[pixel][column] = sum over c of x[pixel][c] * w[column][c] multiplies a
// patch of input pixels, halo included, with all stripes of a tile of filters, eight columns a tap; z is kept in x's type in
// shared memory. y[pixel][k] = sum over columns of z[pixel + tap of the column][column] * (the column is filter k's) then
// moves every column to its filter and its pixel: the left operand is read row by row from wherever the tap is, taps that
// read beside the image read a row of zeros, and the right one is a matrix of zeros and ones, which arrives with the
// weights. Executed work is exact at eight stripes of a tap, and the second product costs 64 / C of the first.
//
// One warpgroup loads (the copy engine does: x with its halo once for all blocks of a segment, weights through a ring), two
// compute, half of the pixels each. While the first product of a block is under way the second one of the block before is
// prepared, and follows it. Sums of y stay in registers from a bundle's first block to its last, in one order, so bits
// repeat. backends/cuda_stripes.py lays out patch and columns.
#include "cuda/fprop_stripes/load.h"
#include "cuda/fprop_stripes/multiply.h"
#include "cuda/fprop_stripes/scatter.h"
#include "cuda/fprop_stripes/shared.h"
#include "cuda/fprop_stripes/store.h"
#include "cuda/fprop_stripes/stream.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

namespace sk::cuda {
namespace {

using namespace fprop_stripes;

constexpr int kLoader = 40, kComputer = 232;  // registers a thread; (40 + 2 * 232) * 128 of 65536
static_assert(kLoader + kComputers * kComputer <= kTradedRegisters);

// A block's first product, then the second one of the block before. There is none of it at first: then it
// is one of zeros and of what lies in the ring, whose y nobody uses, since a branch around these instructions would have the
// assembler run them one by one.
template <class T, int Tiles, int N>
__device__ inline void compute(const Launch& launch, const Shared<N>& s, const Tables& tables) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const int chunks = chunks_of(l), lane = threadIdx.x % 32;
  const bool aligned = moves_eights(l, call);
  Cursor ring, patch;
  Pixels<Tiles> pixels(l.walk);
  float acc[Tiles][N / 2], y[Tiles][32];
  std::uint32_t a[Tiles][N / 16][4];
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(y[t]);
  bool any = false;  // block before
  int listed = -1;
  for (Stream at(l, tables);; at.next()) {
    const bool more = uniform(at.more()), last = uniform(at.last());
    multiply<T, Tiles, N>(l, s, more ? chunks : 0, patch, last, ring, acc);
    const int stage = ring.stage;
    if (more) ring.advance(l.slab);
    mbarrier_wait(s.full + ring.stage, ring.parity);
    const Record<N>& record = s.records[ring.stage];
    gather<Tiles, N>(s.products, pixels, record, a);
    const Block before = record.block;
    const int accumulate = uniform(!before.first);
    const bool finished = any && uniform(before.last);
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
    scatter<T, Tiles, N>(a, s.ring + ring.stage * kStageBytes<N>, accumulate, y);
    if (lane == 0 && more) {
      mbarrier_arrive(s.empty + stage);
      if (last) mbarrier_arrive(s.x_empty + patch.stage * chunks + chunks - 1);
    }
    computers_barrier();  // nobody reads the products of the block before any more
    if (finished) {
      wgmma_wait<0>();
#pragma unroll
      for (int t = 0; t < Tiles; ++t) wgmma_keep(y[t]);
      finish_sums<T, Tiles>(call.finish, before, s.offsets, y);
      store<T, Tiles>(call, before, s.offsets, aligned, s.products, y);
      if (!more) break;  // in here: behind it the assembler would wait for y before products are put away
    }
    put_products<T, Tiles, N>(acc, s.products);
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < Tiles; ++t) wgmma_keep(y[t]);
    if (any) {
      if (lane == 0) mbarrier_arrive(s.empty + ring.stage);
      ring.advance(l.slab);
    }
    if (at.fresh)
      pixels.meet(l.walk, at.tile, at.segment, reinterpret_cast<const int2*>(tables.lists + at.segment.taps));
    if (listed != at.item) pixels.list(l.walk, at.tile, call.out_strides, s.offsets);
    listed = at.item, any = true;
    if (last) patch.advance(patches_of(l));
    computers_barrier();  // all rows of the products are there
  }
}

// Zeros for what nobody writes: the row behind every plane of the products, and the rows of x behind the patch.
template <int Tiles, int N>
__device__ inline void clear(const Layout& l, const Shared<N>& s) {
  for (int i = threadIdx.x; i < kPlanes<N> * kRowBytes / 16; i += kThreads)
    *reinterpret_cast<uint4*>(s.products + i / 8 * kPlaneBytes<Tiles> + kRows<Tiles> * kRowBytes +
                              i % 8 * 16) = {0, 0, 0, 0};
  const int behind = patch_rows(l.walk) * kRowBytes, rows = kRows<Tiles> * kRowBytes;
  for (int c = 0; c < patches_of(l) * chunks_of(l); ++c)
    for (int i = behind + threadIdx.x * 16; i < rows; i += kThreads * 16)
      *reinterpret_cast<uint4*>(s.x + c * rows + i) = {0, 0, 0, 0};
}

template <class T, int Tiles, int N>
__global__ void __launch_bounds__(kThreads, 1) fprop_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  const Shared<N> s = shared_of<Tiles, N>(l);
  const Tables tables = tables_of(l, launch.params.call.tables, s.tables);
  copy_tables(l, launch.params.call.tables, s.tables);
  clear<Tiles, N>(l, s);
  if (threadIdx.x == 0) {
    constexpr int kWarps = kComputers * 4;
    for (int c = 0; c < patches_of(l) * chunks_of(l); ++c)
      mbarrier_init(s.x_full + c, 1), mbarrier_init(s.x_empty + c, kWarps);
    for (int i = 0; i < l.slab; ++i) mbarrier_init(s.full + i, 1), mbarrier_init(s.empty + i, kWarps);
    mbarriers_ready();
  }
  stores_ready();
  barrier();
  if (threadIdx.x / kWarpgroup == kComputers) {
    give_registers<kLoader>();
    if (threadIdx.x % kWarpgroup == 0) load<Tiles, N>(launch, s, tables);
  } else {
    take_registers<kComputer>();
    compute<T, Tiles, N>(launch, s, tables);
  }
}

// Calls with(Constant<Tiles>(), Constant<N>()) of the layout: 64s of rows of a warpgroup, and columns of a block.
template <class With>
int with_instance(const Layout& l, const With& with) {
  if (l.width == 64 && l.pitch == 256) return with(Constant<2>(), Constant<64>());
  return with_constant<64, 96, 128, 192>(l.width, [&](auto n) { return with(Constant<1>(), n); });
}

}  // namespace

int fprop_sm90_bytes(const Layout& l) {
  return with_instance(
      l, [&](auto t, auto n) { return memory_of<decltype(t)::value, decltype(n)::value>(l).end; });
}

// width: columns of a block, 64, 96, 128 or 192; pitch: rows of a patch, 256 (of 64 columns) or 128; slab: stages of the
// ring; chunk: patches of x at once.
int fprop_sm90(const Params& p, void* stream) {
  const Layout& l = p.layout;
  const Walk& w = l.walk;
  Launch launch = {};
  launch.params = p;
  TensorMaps maps;
  for (int h = 0; h < w.in_step_h && h < w.in_h; ++h)
    for (int v = 0; v < w.in_step_w && v < w.in_w; ++v)
      maps.phase(l, p.call, h, v, &launch.phase[h * w.in_step_w + v]);
  if (maps.error() != cudaSuccess) return maps.error();
  const long long items = static_cast<long long>(l.groups) * l.tiles_out * tiles(w);
  if (items >= 1LL << 30) return cudaErrorInvalidValue;
  return with_type_of_16_bits(l.dtype, [&](auto type) {
    return with_instance(l, [&](auto t, auto n) {
      constexpr int kTiles = decltype(t)::value, N = decltype(n)::value;
      return launch_persistent(fprop_sm90_kernel<decltype(type), kTiles, N>, items, kThreads,
                               memory_of<kTiles, N>(l).end, stream, launch);
    });
  });
}

}  // namespace sk::cuda
