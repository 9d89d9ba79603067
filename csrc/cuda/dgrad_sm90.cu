// dx[n,c,h,w] = sum over the live stripes (k,r,s):  w[k,c,r,s] * dy[n, k, h - r, w - s]
//
// Hopper's own instructions: dx[pixel][c] = sum over stripes of P[pixel][stripe] * w[stripe][c], and P is never formed. A
// tile keeps dy of its pixels, halo and all filters, in shared memory; every thread gathers the piece of P that wgmma
// takes from its registers, while the product before is under way. Exact at one stripe, but for each tap's list, which
// is filled up to a multiple of 8. Sums stay in registers from the first stripe to the last.
//
// Two warpgroups compute, 64 pixels each. Of a third one a thread loads weights through a ring and three warps load the
// patch and the lists of the next tile. backends/cuda_gather.py lays out tiles and lists.
#include "cuda/dgrad_gather/load.h"
#include "cuda/dgrad_gather/multiply.h"
#include "cuda/dgrad_gather/shared.h"
#include "cuda/dgrad_gather/store.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ring.h"
#include "cuda/tensor_map.h"

namespace sk::cuda {
namespace {

using namespace dgrad_gather;

// `even` and `odd` are gathered in turn: one is read while the other is filled.
template <class T, int N>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  Cursor ring;
  for_each_item(l, call.tables, [&](const PixelTile&, const Phase&, int, int buffer, int parity) {
    const Shared s = shared_of<N>(l, buffer);
    mbarrier_wait(s.ready, parity);
    const int count = s.header->steps;
    const Pixel near = s.pixels[row], far = s.pixels[row + 8];
    const Gatherer pixels = {{near.base, far.base}, zeros_of(l), {near.met, far.met}};
    float acc[N / 2];
    Gathered even, odd;
    wgmma_keep(acc);
    gather(s, pixels, s.steps[0], even);
    int i = 0;
    for (; i + 1 < count; i += 2) {
      mbarrier_wait(s.full + ring.stage, ring.parity);
      multiply<T, N>(s.weights + ring.stage * kStripes * N * 2, i, even, acc);
      gather(s, pixels, s.steps[i + 1], odd);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(s.empty + ring.stage);
      ring.advance(l.slab);

      mbarrier_wait(s.full + ring.stage, ring.parity);
      multiply<T, N>(s.weights + ring.stage * kStripes * N * 2, 1, odd, acc);
      gather(s, pixels, s.steps[min(i + 2, count - 1)], even);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(s.empty + ring.stage);
      ring.advance(l.slab);
    }
    if (i < count) {
      mbarrier_wait(s.full + ring.stage, ring.parity);
      multiply<T, N>(s.weights + ring.stage * kStripes * N * 2, i, even, acc);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(s.empty + ring.stage);
      ring.advance(l.slab);
    }
    wgmma_keep(acc);
    computers_barrier();  // nobody reads the patch any more
    store<T, N>(l, call, s, acc);
    warp_barrier();
    if (lane == 0) mbarrier_arrive(s.read);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1) dgrad_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  if (threadIdx.x == 0) {
    const Shared s = shared_of<N>(l, 0);
    for (int i = 0; i < l.slab; ++i) mbarrier_init(s.full + i, 1), mbarrier_init(s.empty + i, 8);
    for (int i = 0; i < buffers_of(l); ++i)
      mbarrier_init(s.ready + i, kFetchers + 1), mbarrier_init(s.read + i, 8);
    mbarriers_ready();
  }
  barrier();
  if (threadIdx.x / kWarpgroup == 2) {
    give_registers<kLoader>();
    if (threadIdx.x == 2 * kWarpgroup) load_weights<N>(launch);
    if (threadIdx.x >= kThreads - kFetchers) load_tiles<N>(launch, threadIdx.x - (kThreads - kFetchers));
  } else {
    take_registers<kComputer>();
    compute<T, N>(launch);
  }
}

// Calls with(Constant<N>()) of the channels of a block.
template <class With>
int with_channels(const Layout& l, const With& with) {
  return with_constant<64, 128, 256>(l.width, with);
}

}  // namespace

int dgrad_sm90_bytes(const Layout& l) {
  return with_channels(l, [&](auto n) { return memory_of<decltype(n)::value>(l).end; });
}

// width: channels of a block, 64, 128 or 256; slab: stages of the ring; chunk: rows of the largest patch; pitch: bytes from
// 64 filters of a patch to the next; of the walk patch_w: most steps of a phase, load_h: buffers of tiles, load_w: rows of
// dy that are copied at once.
int dgrad_sm90(const Params& p, void* stream) {
  const Layout& l = p.layout;
  const int steps = (l.lists - l.entries) / static_cast<int>(sizeof(StripeStep) / 4);
  const int pixels = l.walk.images * l.walk.in_h * l.walk.in_w;
  Launch launch = {};
  launch.params = p;
  TensorMaps maps;
  maps.matrix(l.dtype, p.call.weights, steps * kStripes, l.group_out, kStripes, &launch.weights);
  maps.matrix(l.dtype, p.call.in, pixels, l.groups * l.group_in, l.walk.load_w, &launch.dy);
  if (maps.error() != cudaSuccess) return maps.error();
  const long long items = static_cast<long long>(l.walk.tiles_n) * l.tiles_out;
  return with_type_of_16_bits(l.dtype, [&](auto type) {
    return with_channels(l, [&](auto n) {
      constexpr int N = decltype(n)::value;
      return launch_persistent(dgrad_sm90_kernel<decltype(type), N>, items, kThreads, memory_of<N>(l).end,
                               stream, launch);
    });
  });
}

}  // namespace sk::cuda
