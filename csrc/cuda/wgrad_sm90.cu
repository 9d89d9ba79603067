// dw[a,c] = sum over the pixels (n,h,w) of x:  dy[n, k, h - r, w - s] * x[n,c,h,w],   a: the live stripe (k,r,s)
//
// Hopper's own instructions, strides of 1: dw[stripe][c] = sum over pixels of P[stripe][pixel] * x[pixel][c], and P is never
// formed. Every thread gathers from dy the piece of P that wgmma takes from its registers, while the products before are
// under way; x is the right operand where it lies, rows along K, one copy for all warpgroups. Exact at one stripe: a block's
// stripes are of whatever taps they are.
//
// A block owns up to 192 stripes of consecutive filters, N channels and a share of the pixels. Three warpgroups compute, 64
// stripes each, sums in registers from the first pixel to the last. Of a fourth one a thread loads x and the patch of dy that a
// tile of pixels meets, and three warps list where in the patch every tap finds every pixel. Shares are added in their order
// by reduce(). backends/cuda_wgrad.py lays out blocks and tiles.
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/wgrad_gather/load.h"
#include "cuda/wgrad_gather/multiply.h"
#include "cuda/wgrad_gather/shared.h"

namespace sk::cuda {
namespace {

using namespace wgrad_gather;

// Row `row` of dw, or this split's share of it: channels 8 j + 2 t and the next from thread t of four.
template <class T, int N>
__device__ __forceinline__ void store(const Layout& l, const Call& call, int row, const float* d) {
  if (row < 0) return;
  const int channel = blockIdx.x * N, count = l.group_in - channel;
  const long long at = static_cast<long long>(row) * l.group_in + channel + threadIdx.x % 4 * 2;
  float* partial = call.partial + blockIdx.z * call.out_count + at;
  T* out = static_cast<T*>(call.out) + at;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
    if (8 * j < count) {
      if (call.partial)
        *reinterpret_cast<float2*>(partial + 8 * j) = {d[4 * j], d[4 * j + 1]};
      else
        *reinterpret_cast<std::uint32_t*>(out + 8 * j) = pack<T>(d[4 * j], d[4 * j + 1]);
    }
}

// `even` and `odd` are gathered in turn: one is read while the other is filled.
template <class T, class S>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const auto* stripes = reinterpret_cast<const Stripe*>(call.tables + l.entries) + phase_of(l, call).steps +
                        threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int rows[2] = {stripes[0].row, stripes[8].row};
  const Gatherer near = Gatherer::of<S>(stripes[0]), far = Gatherer::of<S>(stripes[8]);
  const Share share(l);
  const int steps = (share.end - share.begin) * S::Steps;
  const bool leader = threadIdx.x % 32 == 0;
  float acc[S::N / 2];
  Gathered even, odd;
  Cursor ring;
  wgmma_keep(acc);
  Shared s = shared_of<S>(l, 0);
  mbarrier_wait(s.ready, 0);
  gather(s.patch, s.lists, near, far, even);
  // Behind the last step its own tile is gathered once more: a branch would have the assembler serialize the products.
  const auto step = [&](Gathered& current, Gathered& next, int i, auto place) {
    constexpr int kPlace = decltype(place)::value;  // in its tile
    constexpr bool kLast = kPlace + 1 == S::Steps;
    multiply<T, S>(s.x + kPlace * kGathered * kRowBytes, i, current, acc);
    Mbarrier* read = s.read;
    if (kLast) {
      if (i + 1 < steps) ring.advance(l.slab);
      s = shared_of<S>(l, ring.stage);
      mbarrier_wait(s.ready, ring.parity);
    }
    gather(s.patch, s.lists + (kLast ? 0 : (kPlace + 1) * kGathered * 2), near, far, next);
    wgmma_wait<0>();
    if (kLast && leader) mbarrier_arrive(read);
  };
  int i = 0;
  for (; i + 1 < steps; i += 2)
    step(even, odd, i, Constant<0>()), step(odd, even, i + 1, Constant<S::Steps - 1>());
  if (S::Steps == 1 && i < steps) step(even, odd, i, Constant<0>());
  wgmma_keep(acc);
  store<T, S::N>(l, call, rows[0], acc);
  store<T, S::N>(l, call, rows[1], acc + 2);
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1) wgrad_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Phase& phase = phase_of(l, call);
  const int groups = phase.count / 64;  // of kGroups, those that have stripes
  if (threadIdx.x == 0) {
    for (int i = 0; i < l.slab; ++i) {
      const Shared s = shared_of<S>(l, i);
      mbarrier_init(s.ready, kFetchers + 1), mbarrier_init(s.read, 4 * groups);
    }
    mbarriers_ready();
  }
  for (int t = threadIdx.x; t < phase.tap_count; t += kThreads) {
    const int2 tap = reinterpret_cast<const int2*>(call.tables + l.lists + phase.taps)[t];
    shared_of<S>(l, 0).taps[t] = {tap.x, tap.y, -(tap.x * l.walk.in_w + tap.y), 0};
  }
  for (int i = threadIdx.x; i < l.slab * filter_chunks(l) * 64; i += kThreads) {
    unsigned char* chunk = shared_of<S>(l, 0).patch + i / 64 * l.pitch;  // patches follow each other
    *reinterpret_cast<uint4*>(chunk + first_zeros(l) * kRowBytes + i % 64 * 16) = {0, 0, 0, 0};
  }
  barrier();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kGroups) {
    give_registers<kLoader>();
    if (threadIdx.x == kGroups * kWarpgroup) load_tiles<S>(launch);
    if (threadIdx.x >= kFirstFetcher) list_tiles<S>(launch, threadIdx.x - kFirstFetcher);
  } else {
    take_registers<kComputer>();
    if (group < groups) compute<T, S>(launch);
  }
}

// Calls with(Shape()) of the layout.
template <class With>
int with_shape(const Layout& l, const With& with) {
  return with_constant<64, 128>(l.width, [&](auto n) {
    return with_constant<64, 128>(l.walk.tile_n, [&](auto pixels) {
      return with(Shape<decltype(n)::value, decltype(pixels)::value>());
    });
  });
}

}  // namespace

int wgrad_sm90_bytes(const Layout& l) {
  return with_shape(l, [&](auto shape) { return memory_of<decltype(shape)>(l).end; });
}

// Pixels of the walk are those of x, and what is "in" is dy, as in dgrad. width: channels of a block, 64 or 128; tile_out:
// filters of a patch; tiles_out: blocks of stripes, over all groups; slab: stages of the ring; chunk: rows of the largest
// patch; pitch: bytes from 64 filters of a patch to the next; of the walk tile_n: pixels of a tile, 64 or 128, patch_w: most
// taps of a block, load_w: rows of dy that are copied at once.
int wgrad_sm90(const Params& p, void* stream) {
  const Layout& l = p.layout;
  const Walk& w = l.walk;
  Launch launch_ = {};
  launch_.params = p;
  TensorMaps maps;
  maps.matrix(l.dtype, p.call.in, w.images * w.out_h * w.out_w, l.groups * l.group_in, w.tile_n, &launch_.x);
  maps.matrix(l.dtype, p.call.weights, w.images * w.in_h * w.in_w, l.groups * l.group_out, w.load_w,
              &launch_.dy);
  if (maps.error() != cudaSuccess) return maps.error();
  return with_type_of_16_bits(l.dtype, [&](auto type) {
    return with_shape(l, [&](auto shape) {
      using S = decltype(shape);
      const dim3 grid((l.group_in + S::N - 1) / S::N, l.tiles_out, l.splits);
      return launch(wgrad_sm90_kernel<decltype(type), S>, grid, kThreads, memory_of<S>(l).end, stream,
                    launch_);
    });
  });
}

}  // namespace sk::cuda
