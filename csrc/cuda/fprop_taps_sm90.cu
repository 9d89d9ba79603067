// y[n,k,p,q] = finish( sum over the live stripes (k,(r,s)) of filter k, over c:  w[k,c,r,s] * x[n, c, p + r, q + s] )
//
// Hopper's own instructions, strides of 1. A step is a tap and at most N of its stripes: z[pixel][column] = sum over c of
// x[pixel + tap][c] * w[column][c], then y[pixel][k] += sum over columns of z[pixel][column] * (the column is filter k's).
// x is read by ldmatrix from wherever the tap is; pixels whose tap lies beside the image read a row of zeros. Sums of a
// product lie in registers as the next one wants its left operand, so z, rounded to x's type, never leaves them; the right
// operand of the second product is zeros and ones, which arrive with the weights.
//
// Sixteen columns are reserved for every `Serve` filters, and sixteen more take what is left over of any of them.
//
// Of the last warpgroup a thread loads weights through a ring (once, where the ring holds them all), and three warps load
// the patch of the next tile and list which of its rows every pixel reads in every step (tiles_sm90.h). The others compute,
// 64 pixels each, and never wait for one another: with few warps an instruction takes 4 to 5 cycles, so they have as few as
// possible. Sums of y stay in registers from the first step to the last, in one order, so bits repeat.
// backends/cuda_taps.py lays out steps and columns.
#include "cuda/fprop_taps/load.h"
#include "cuda/fprop_taps/multiply.h"
#include "cuda/fprop_taps/shared.h"
#include "cuda/fprop_taps/store.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

namespace sk::cuda {
namespace {

using namespace fprop_taps;

// z of a step is multiplied together with the second product of the step before: while the latter ends, z is rounded. What
// products read is loaded, and what comes through the ring is waited for, while others are under way.
template <class T, class S>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane % 16;
  const int stages = S::Chunks == 1 ? 1 : stages_of<S>(l);
  const int kept = kept_stages<S>(l, call.tables), all = kept ? kept : l.slab;
  const bool aligned = moves_eights(l, call);
  Cursor ring;
  bool waits = true;
  const bool leader = lane == 0, gives = leader && !kept;
  for_each_item(l, call.tables, [&](const PixelTile&, const Phase&, int buffer, int parity) {
    const Shared s = shared_of<S>(l, buffer);
    const auto await_stage = [&] {
      if (waits) mbarrier_wait(s.full + ring.stage, ring.parity);
    };
    // Gives a stage back, if it is one, that nothing reads any more.
    const auto release = [&](int stage) {
      if (gives && stage >= 0) mbarrier_arrive(s.empty + stage);
    };
    mbarrier_wait(s.ready, parity);
    const int count = s.header->steps;
    float y[S::Bundles][S::Serve / 2], z[S::Columns / 2];
    Rounded<S> rounded, another;
    Operand<S> even, odd;
#pragma unroll
    for (int b = 0; b < S::Bundles; ++b) wgmma_keep(y[b]);
    wgmma_keep(z);

    // The left operand: in which row of the patch a step finds the pixel that this lane names, loaded a step before the
    // pixel is, and where in bytes.
    const auto row_of = [&](int step) { return s.rows[min(step, count - 1) * kPixels + row]; };
    int next = row_of(0);
    const auto place = [&] { return next * kRowBytes + (lane & 16 ^ (next & 7) << 4); };
    int at = place();
    load_pixels<S>(s.patch, at, 0, even);
    next = row_of(1);
    await_stage();

    int last = -1;                  // stage of the first product
    int summing = -1, summed = -1;  // stages of ones: that were multiplied last, and before
    std::uint64_t ones = 0;         // that are multiplied next
    // Phase 1 of step i, z: add() is issued behind its first product. `first` holds what the step begins with; `second` does for the
    // next one, if there is one product a step.
    const auto first_product = [&](Operand<S>& first, Operand<S>& second, int i, const auto& add) {
      const unsigned char* patch = s.patch;
      const auto stage = [&](int number, const auto& beside) {
        const std::uint64_t w = matrix_descriptor(shared_address(s.ring + ring.stage * S::Stage));
#pragma unroll
        for (int p = 0; p < S::Products; ++p) {
          Operand<S>& current = p % 2 ? second : first;
          Operand<S>& behind = p % 2 ? first : second;
          const int chunk = p / S::Parts, part = p % S::Parts;
          if (p == 0 && !S::Overlaps) beside();
          multiply<T, S>(current, w + chunk * (S::Piece >> 4) + part * (8 / S::Parts), number + p, z);
          if (p == 0 && S::Overlaps) beside();
          if (!S::Overlaps) {
            wgmma_wait<1>();
            if (p == 0) release(number == 0 ? summing : last);
          }
          if (part + 1 == S::Parts) patch += l.pitch;
          if (p + 1 == S::Products) {
            last = ring.stage;
            ring.advance(all);
            await_stage();
            if (number + 1 == stages) at = place(), patch = s.patch;
          }
          load_pixels<S>(patch, at, (part + 1) % S::Parts, behind);
        }
      };
      stage(0, add);
      if constexpr (S::Chunks > 1)
        for (int number = 1; number < stages; ++number) stage(number, [] {});
      next = row_of(i + 2);
      ones = sixteens_descriptor(shared_address(s.ring + ring.stage * S::Stage));
    };
    // Phase 2: z is there and is rounded. `pending` second products are not waited for.
    const auto round_sums = [&](auto pending, Rounded<S>& to, int i) {
      const int of_ones = ring.stage;
      ring.advance(all);
      if (i + 1 < count) await_stage();
      wgmma_wait<decltype(pending)::value>();
      wgmma_keep(z);
      round<T, S>(z, to);
      release(last);
      if (S::Overlaps) release(summed);
      summed = summing, summing = of_ones;
    };
    // Both, with phase 3 of the step before: its rounded sums are added to y.
    constexpr auto bundles = std::make_integer_sequence<int, S::Bundles>();
    const auto step = [&](auto pending, Operand<S>& first, Operand<S>& second, const Rounded<S>& from,
                          Rounded<S>& to, int i) {
      first_product(first, second, i, [&] { add_columns<T, S>(from, ones, i - 1, y, bundles); });
      round_sums(pending, to, i);
    };
    constexpr Constant<0> none;
    constexpr Constant<1> one;
    first_product(even, odd, 0, [] {});
    round_sums(none, rounded, 0);
    int i = 1;
    if constexpr (S::Overlaps) {
      for (; i + 1 < count; i += 2)
        step(one, odd, even, rounded, another, i), step(one, even, odd, another, rounded, i + 1);
      if (i < count) step(none, odd, even, rounded, rounded, i);
    } else {
      for (; i < count; ++i) step(none, even, odd, rounded, rounded, i);
    }
    add_columns<T, S>(rounded, ones, count - 1, y, bundles);
    wgmma_wait<0>();
    if (S::Overlaps) release(summed);
    release(summing);
    waits = !kept;
#pragma unroll
    for (int b = 0; b < S::Bundles; ++b) wgmma_keep(y[b]);
    const int mine = fresh_thread() / 32;
    store<T, S>(call, *s.header, s.offsets + mine * 16, aligned, s.sums + mine * kStageBytes, y,
                std::make_integer_sequence<int, S::Filters / 32>());
    if (leader) mbarrier_arrive(s.read);
  });
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1) fprop_taps_sm90_kernel(const __grid_constant__ Launch launch) {
  const Layout& l = launch.params.layout;
  constexpr int kFirstFetcher = kThreads - kFetchers;
  if (threadIdx.x == 0) {
    const Shared s = shared_of<S>(l, 0);
    for (int i = 0; i < l.slab; ++i) mbarrier_init(s.full + i, 1), mbarrier_init(s.empty + i, kWarps);
    for (int i = 0; i < buffers_of(l); ++i)
      mbarrier_init(s.ready + i, kFetchers + 1), mbarrier_init(s.read + i, kWarps);
    mbarriers_ready();
  }
  if (threadIdx.x >= kFirstFetcher)
    prefetch_tables(l, launch.params.call.tables, threadIdx.x - kFirstFetcher);
  barrier();
  if (threadIdx.x / kWarpgroup == kGroups) {
    give_registers<kLoader>();
    if (threadIdx.x == kGroups * kWarpgroup) load_weights<S>(launch);
    if (threadIdx.x >= kFirstFetcher) load_tiles<S>(launch, threadIdx.x - kFirstFetcher);
  } else {
    take_registers<kComputer>();
    compute<T, S>(launch);
  }
}

// Calls with(Shape()) of the layout.
template <int Chunks, class With>
int with_chunks(const Layout& l, const With& with) {
  if (l.tile_out == 64) return with(Shape<64, 64, Chunks>());
  return l.width == 64 ? with(Shape<128, 64, Chunks>()) : with(Shape<128, 128, Chunks>());
}
template <class With>
int with_shape(const Layout& l, const With& with) {
  return patch_chunks(l) == 1 ? with_chunks<1>(l, with) : with_chunks<2>(l, with);
}

}  // namespace

int fprop_taps_sm90_bytes(const Layout& l) {
  return with_shape(l, [&](auto shape) { return memory_of<decltype(shape)>(l).end; });
}

// width: filters that share 16 columns, 64 or 128; tile_out: filters of a tile, as many or 128; slab: stages of the ring;
// chunk: rows of the largest patch; pitch: bytes from 64 channels of a patch to the next; of the walk patch_w: most steps of
// a tile of filters, row_w: steps of all, load_h: buffers of tiles, load_w: rows of x that are copied at once.
int fprop_taps_sm90(const Params& p, void* stream) {
  const Layout& l = p.layout;
  Launch launch = {};
  launch.params = p;
  TensorMaps maps;
  const int pixels = l.walk.images * l.walk.in_h * l.walk.in_w;
  maps.matrix(l.dtype, p.call.in, pixels, l.groups * l.group_in, l.walk.load_w, &launch.x);
  if (maps.error() != cudaSuccess) return maps.error();
  const long long items = static_cast<long long>(l.walk.tiles_n) * l.tiles_out;
  return with_type_of_16_bits(l.dtype, [&](auto type) {
    return with_shape(l, [&](auto shape) {
      using S = decltype(shape);
      return launch_persistent(fprop_taps_sm90_kernel<decltype(type), S>, items, kThreads,
                               memory_of<S>(l).end, stream, launch);
    });
  });
}

}  // namespace sk::cuda
