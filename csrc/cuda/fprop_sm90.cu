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
#include "cuda/fprop_sm90.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/scatter_sm90.h"
#include "cuda/tensor_map.h"
#include "cuda/tma.h"

namespace sk::cuda {
namespace {

constexpr int kLoader = 40, kComputer = 232;  // registers a thread; (40 + 2 * 232) * 128 of 65536
static_assert(kLoader + kComputers * kComputer <= kTradedRegisters);

struct Launch {
  CUtensorMap phase[kMaxPhases];
  Params params;
};

// One thread loads everything, in the order in which it is multiplied: a block's weights, then what the columns of the block
// before add to.
template <int Tiles, int N>
__device__ inline void load(const Launch& launch, const Shared<N>& s, const Tables& tables) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const auto* records = reinterpret_cast<const Record<N>*>(call.tables + l.entries);
  const auto* weights = static_cast<const unsigned char*>(call.weights);
  constexpr int kBytes = kStageBytes<N>, kRecord = sizeof(Record<N>);
  const int chunks = chunks_of(l), patch_bytes = patch_rows(l.walk) * kRowBytes;
  Cursor ring, patch;
  const auto load_piece = [&](int block, int piece) {
    const bool last = piece == chunks;
    Mbarrier* full = s.full + ring.stage;
    mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);
    mbarrier_expect(full, kBytes + (last ? kRecord : 0));
    copy_bulk(s.ring + ring.stage * kBytes,
              weights + (static_cast<long long>(block) * (chunks + 1) + piece) * kBytes, kBytes, full);
    if (last) copy_bulk(s.records + ring.stage, records + block, kRecord, full);
    ring.advance(l.slab);
  };
  int before = -1;
  for (Stream at(l, tables); at.more(); at.next()) {
    for (int c = 0; c < chunks; ++c) {
      if (at.fresh) {
        const int chunk = patch.stage * chunks + c;
        mbarrier_wait(s.x_empty + chunk, patch.parity ^ 1);
        mbarrier_expect(s.x_full + chunk, patch_bytes);
        copy_box(s.x + chunk * kRows<Tiles> * kRowBytes, &launch.phase[at.segment.phase],
                 {{c * kChunk, at.group, at.tile.j + at.segment.origin_w, at.tile.i + at.segment.origin_h,
                   at.tile.n}},
                 s.x_full + chunk);
      }
      load_piece(at.block, c);
    }
    if (at.last()) patch.advance(patches_of(l));
    if (before >= 0) load_piece(before, chunks);
    before = at.block;
  }
  if (before >= 0) load_piece(before, chunks);
}

// acc = the patch times one block of columns; `chunks` is 0 where there is none. A stage is given back when the products that
// read it are done, and so is x where this is the last that is wanted of it; the last chunk stays under way, its stage is
// `ring` afterwards.
// Always whole chunks: behind the last channel both operands are zeros, and a branch between these instructions has the
// assembler run them one by one (its remark C7520, which a test looks for).
template <class T, int Tiles, int N>
__device__ __forceinline__ void multiply(const Layout& l, const Shared<N>& s, int chunks, const Cursor& patch,
                                         bool last, Cursor& ring, float (&acc)[Tiles][N / 2]) {
  // Between a chunk's products rather than behind them: 7 to 11 % of the time with two tiles; with one it loses as much.
  constexpr bool kAhead = Tiles > 1;
  const int lane = threadIdx.x % 32;
  const unsigned char* rows = s.x + uniform(threadIdx.x / kWarpgroup) * Tiles * 64 * kRowBytes;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  const auto arrived = [&](int chunk) {
    mbarrier_wait(s.x_full + chunk, patch.parity);
    mbarrier_wait(s.full + ring.stage, ring.parity);
  };
  if (chunks > 0) arrived(patch.stage * chunks);
  for (int c = 0; c < chunks; ++c) {
    const int chunk = patch.stage * chunks + c, stage = ring.stage;
    const std::uint64_t x = matrix_descriptor(shared_address(rows + chunk * kRows<Tiles> * kRowBytes));
    const std::uint64_t w = matrix_descriptor(shared_address(s.ring + stage * kStageBytes<N>));
    const auto start = [&](int k) {
#pragma unroll
      for (int t = 0; t < Tiles; ++t)  // 64 rows, or 16 channels, further in units of 16 bytes
        wgmma<T, N>(acc[t], x + t * (64 * kRowBytes / 16) + 2 * k, w + 2 * k, c + k);
    };
    // Gives the last chunk back and awaits the next one.
    const auto turn = [&] {
      if (c > 0) {
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(s.empty + (stage > 0 ? stage : l.slab) - 1);
        if (lane == 0 && last) mbarrier_arrive(s.x_empty + chunk - 1);
      }
      if (c + 1 < chunks) ring.advance(l.slab);
      arrived(patch.stage * chunks + min(c + 1, chunks - 1));
    };
    wgmma_fence();
    start(0), start(1), start(2);
    if constexpr (kAhead) wgmma_commit(), turn(), wgmma_fence();
    start(3);
    wgmma_commit();
    if constexpr (!kAhead) turn();
  }
}

// A block's first product, then the second one of the block before. There is none of it at first: then it
// is one of zeros and of what lies in the ring, whose y nobody uses, since a branch around these instructions would have the
// assembler run them one by one.
template <class T, int Tiles, int N>
__device__ inline void compute(const Launch& launch, const Shared<N>& s, const Tables& tables) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const int chunks = chunks_of(l), lane = threadIdx.x % 32;
  const Strides& strides = call.out_strides;
  const bool aligned = reinterpret_cast<std::uintptr_t>(call.out) % 16 == 0 &&
                       (strides.n | strides.h | strides.w | l.group_out) % 8 == 0;
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
    if (listed != at.item) pixels.list(l.walk, at.tile, strides, s.offsets);
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

template <class T, int Tiles, int N>
cudaError_t launch_one(const Launch& launch_, void* stream) {
  const Layout& l = launch_.params.layout;
  int processors = 0;
  const cudaError_t e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const long long items = static_cast<long long>(l.groups) * l.tiles_out * tiles(l.walk);
  if (items >= 1LL << 30) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(items < processors ? items : processors));
  return launch(fprop_sm90_kernel<T, Tiles, N>, grid, kThreads, memory_of<Tiles, N>(l).end, stream, launch_);
}

// Calls with<Tiles, N>() of the layout: 128 rows a tile, and columns of a block.
template <class With>
int with_instance(const Layout& l, const With& with) {
  if (l.width == 64)
    return l.pitch == 256 ? with(Constant<2>(), Constant<64>()) : with(Constant<1>(), Constant<64>());
  if (l.width == 96) return with(Constant<1>(), Constant<96>());
  if (l.width == 128) return with(Constant<1>(), Constant<128>());
  return with(Constant<1>(), Constant<192>());
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

// width: columns of a block, 64, 96, 128 or 192; pitch: rows of a patch, 256 (of 64 columns) or 128; slab: stages of the
// ring; chunk: patches of x at once.
int fprop_sm90(const Params& p, void* stream) {
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
