// y[n,k,p,q] = finish( sum over the taps (r,s) that a tile of filters keeps, over c:  w[k,c,r,s] * x[n, c, p + r, q + s] )
//
// Hopper's own instructions, strides of 1, few channels. Whole filters, tap by tap: a stripe that is dead where another filter
// of the tile lives is multiplied as zeros, which at up to 128 channels is cheaper than to sort stripes. Both operands lie in
// shared memory, where a product of 64 columns runs at the tensor cores' rate: x as a patch of whole rows, what is beside the
// image among them, so that a tap is so many rows further, and the left operand begins there. 64 consecutive positions of a
// patch are a block; those at the ends of its rows whose taps lie in the next one are computed and not stored.
//
// A multiprocessor stays with its tile of filters, whose weights stay in shared memory. Three warpgroups compute: a block at a
// time has the tensor cores, in turns, while the blocks before are stored. A thread of a fourth loads patches through a ring. Sums
// stay in registers from the first tap to the last, in one order, so bits repeat. backends/cuda_whole.py lays it out.
#include "cuda/fprop_whole/load.h"
#include "cuda/fprop_whole/shared.h"
#include "cuda/fprop_whole/store.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

using namespace fprop_whole;

// y += x times those 64 channels of weights.
template <class T, int N>
__device__ __forceinline__ void multiply(std::uint64_t x, std::uint64_t w, float (&y)[N / 2]) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<T, N>(y, x + 2 * k, w + 2 * k, 1);
  wgmma_commit();
}

template <class T, int N>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Shared s = shared_of<N>(l);
  const FilterTile filters = filter_tile_of(l, call.tables);
  const int taps = filters.taps_end - filters.taps, chunks = chunks_of(l);
  const int warp = uniform(threadIdx.x / 32), group = warp / 4;
  const bool leader = threadIdx.x % 32 == 0;
  const bool aligned = moves_eights(l, call);
  const auto release = [&](int buffer) {
    if (leader && buffer >= 0) mbarrier_arrive(s.read + buffer);
  };
  const std::uint64_t weights = matrix_descriptor(shared_address(s.weights));
  Cursor ring;
  int next = group;         // which block of the tile is this warpgroup's next one
  int parity = group == 0;  // of its turn: the first block of all need not wait
  bool waits = true;        // for weights
  for_each_tile(l, [&](const PositionTile& tile) {
    const int blocks = (tile.count + kBlock - 1) / kBlock;
    if (next >= blocks) {
      for (int c = 0; c < chunks; ++c) {  // a patch comes back from all, in its own round
        mbarrier_wait(s.ready + ring.stage, ring.parity);
        release(ring.stage);
        ring.advance(buffers_of(l));
      }
      next -= blocks;
      return;
    }
    const int first = tile.shift + next * kBlock;
    float y[1][N / 2] = {};
    wgmma_keep(y[0]);
    mbarrier_wait(s.ready + ring.stage, ring.parity);
    mbarrier_wait(s.turn + group, parity);
    parity ^= 1;
    const auto pass = [&] {
      if (leader) mbarrier_arrive(s.turn + (group + 1) % kGroups);
    };
    int held = -1;  // a buffer that products may still read
    for (int c = 0; c < chunks; ++c) {
      if (c > 0) mbarrier_wait(s.ready + ring.stage, ring.parity);
      const std::uint64_t x =
          matrix_descriptor(shared_address(s.patches + ring.stage * l.pitch) + first * kRowBytes);
      for (int tap = 0; tap < taps; ++tap) {
        if (waits) mbarrier_wait(s.kept + tap, 0);
        if (tap + 1 == taps && c + 1 == chunks) pass();  // the tensor cores are busy while the next one wakes
        multiply<T, N>(x + s.taps[tap] * (kRowBytes >> 4),
                       weights + (tap * chunks + c) * (N * kRowBytes >> 4), y[0]);
        wgmma_wait<1>();
        release(held);
        held = -1;
      }
      release(held);
      held = ring.stage;
      ring.advance(buffers_of(l));
    }
    if (taps == 0) pass();
    wgmma_wait<0>();
    wgmma_keep(y[0]);
    release(held);
    waits = false;
    next += kGroups - blocks;
    store<T, N>(l, call, s, tile, filters.channel, filters.count, first + warp % 4 * 16, aligned, y);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    fprop_whole_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Shared s = shared_of<N>(l);
  const FilterTile filters = filter_tile_of(l, call.tables);
  if (threadIdx.x == 0) {
    for (int i = 0; i < l.slab; ++i) mbarrier_init(s.kept + i, 1);
    for (int i = 0; i < buffers_of(l); ++i) mbarrier_init(s.ready + i, 1), mbarrier_init(s.read + i, kWarps);
    for (int i = 0; i < kGroups; ++i) mbarrier_init(s.turn + i, 4);
    mbarriers_ready();
  }
  for (int i = threadIdx.x; i < N; i += kThreads) {
    const bool exists = i < filters.count;
    s.scale[i] = exists ? scale_of(call.finish, filters.channel + i) : 0.f;
    s.shift[i] = exists ? shift_of(call.finish, filters.channel + i) : 0.f;
  }
  for (int i = threadIdx.x; i < filters.taps_end - filters.taps; i += kThreads)
    s.taps[i] = call.tables[l.entries + filters.taps + i];
  barrier();
  if (threadIdx.x / kWarpgroup == kGroups) {
    give_registers<kLoader>();
    if (threadIdx.x == kGroups * kWarpgroup) load<N>(launch);
  } else {
    take_registers<kComputer>();
    compute<T, N>(launch);
  }
}

// Calls with(Constant<N>()) of the filters of a tile.
template <class With>
int with_filters(const Layout& l, const With& with) {
  return with_constant<64, 128>(l.width, with);
}

}  // namespace

int fprop_whole_sm90_bytes(const Layout& l) {
  return with_filters(l, [&](auto n) { return memory_of<decltype(n)::value>(l).end; });
}

// width, tile_out: filters of a tile, 64 or 128; slab: most taps of one; pitch: bytes of a patch of 64 channels, with what
// the positions that are not stored read; of the walk tile_w: columns of y of a band, tiles_w: bands, row_h: positions from a
// tile to the next, tiles_h: tiles of a band, patch_h and patch_w: of a patch, load_h: buffers, load_w: blocks of a tile.
int fprop_whole_sm90(const Params& p, void* stream) {
  const Layout& l = p.layout;
  const int filter_tiles = filter_tiles_of(l), tiles = tiles_of(l.walk);
  Launch launch_ = {};
  launch_.params = p;
  TensorMaps maps;
  if (tiles > 0) maps.phase(l, p.call, 0, 0, &launch_.x);
  if (maps.error() != cudaSuccess) return maps.error();
  int processors = 0;
  const cudaError_t e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const int share = processors > filter_tiles ? processors / filter_tiles : 1;
  const dim3 grid(static_cast<unsigned>(filter_tiles * (tiles < share ? tiles : share)));
  return with_type_of_16_bits(l.dtype, [&](auto type) {
    return with_filters(l, [&](auto n) {
      constexpr int N = decltype(n)::value;
      return launch(fprop_whole_sm90_kernel<decltype(type), N>, grid, kThreads, memory_of<N>(l).end, stream,
                    launch_);
    });
  });
}

}  // namespace sk::cuda
