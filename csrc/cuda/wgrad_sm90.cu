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
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ring.h"
#include "cuda/tensor_map.h"
#include "cuda/tiles_sm90.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kGroups = 3;  // warpgroups that compute
constexpr int kThreads = (kGroups + 1) * kWarpgroup, kFirstFetcher = kThreads - kFetchers;
constexpr int kLoader = 56, kComputer = 152;  // registers a thread
static_assert(kLoader + kGroups * kComputer <= 4 * 128);
constexpr int kStep = 64;  // pixels that are gathered at once, for four products

// An instance: channels of a block, and pixels of a tile.
template <int N_, int Pixels_>
struct Shape {
  static constexpr int N = N_, Pixels = Pixels_;
  static constexpr int Steps = Pixels / kStep;
  // Of a tap's list, in bytes: those of four taps in a row lie in different banks.
  static constexpr int ListPitch = Pixels * 2 + 32;
};

// at: of its filter in a patch, in bytes from a pixel's first; tap: of the block's; row: of dw, -1 where there is no stripe.
struct alignas(16) Stripe {
  int at, tap, row, pad;
};

// A pixel (h, w) of x meets dy at (h - i, w - j), `rows` rows of the patch from where it would lie itself.
struct alignas(16) Tap {
  int i, j, rows, pad;
};

struct Launch {
  CUtensorMap x, dy;
  Params params;
};

struct Memory {
  int x, patch, patch_size, lists, lists_size, taps, barriers, end;
};

// Of dy's patch: 64s of filters, and the first of eight rows of zeros, one for each of the swizzle's. A pixel whose tap meets
// no dy reads the one that has the banks of its own.
__host__ __device__ inline int filter_chunks(const Layout& l) { return l.tile_out / kRowChannels; }
__host__ __device__ inline int first_zeros(const Layout& l) { return l.pitch / kRowBytes - 8; }

template <class S>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  const int stages = l.slab;
  Memory m;
  m.x = 0;
  m.patch = stages * S::Pixels * S::N * 2;
  m.patch_size = filter_chunks(l) * l.pitch;
  m.lists = m.patch + stages * m.patch_size;
  m.lists_size = most_steps(l) * S::ListPitch;
  m.taps = m.lists + stages * m.lists_size;
  m.barriers = m.taps + most_steps(l) * static_cast<int>(sizeof(Tap));
  m.end = m.barriers + 2 * stages * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// Of one stage of the ring, but for the taps.
struct Shared {
  unsigned char *x, *patch, *lists;
  Tap* taps;
  Mbarrier *ready, *read;
};

template <class S>
__device__ inline Shared shared_of(const Layout& l, int stage) {
  const Memory m = memory_of<S>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  return {base + m.x + stage * S::Pixels * S::N * 2,
          base + m.patch + stage * m.patch_size,
          base + m.lists + stage * m.lists_size,
          reinterpret_cast<Tap*>(base + m.taps),
          barriers + stage,
          barriers + l.slab + stage};
}

__device__ inline const Phase& phase_of(const Layout& l, const Call& call) {
  return reinterpret_cast<const Phase*>(call.tables + l.steps)[blockIdx.y];
}

// This block's tiles of pixels: the first shares have one more where they do not come out even.
struct Share {
  int begin, end;

  __device__ explicit Share(const Layout& l) {
    const int split = blockIdx.z, each = l.walk.tiles_n / l.splits, more = l.walk.tiles_n % l.splits;
    begin = split * each + min(split, more), end = begin + each + (split < more);
  }
};

// Calls load(tile, stage) for every tile, once its stage is free.
template <class S, class Load>
__device__ inline void for_each_tile(const Layout& l, const Call& call, const Load& load) {
  const auto* tiles = reinterpret_cast<const PixelTile*>(call.tables + l.items);
  const Share share(l);
  Cursor ring;
  PixelTile next = tiles[share.begin];
  for (int i = share.begin; i < share.end; ++i) {
    const PixelTile tile = next;
    next = tiles[min(i + 1, share.end - 1)];
    const Shared s = shared_of<S>(l, ring.stage);
    if (threadIdx.x % 32 == 0)
      mbarrier_wait(s.read, ring.parity ^ 1);  // one lane: who waits takes turns from who computes
    load(tile, s);
    ring.advance(l.slab);
  }
}

template <class S>
__device__ inline void load_tiles(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Phase phase = phase_of(l, launch.params.call);
  const int chunks = filter_chunks(l), channel = phase.group * l.group_in + blockIdx.x * S::N;
  for_each_tile<S>(l, launch.params.call, [&](const PixelTile& tile, const Shared& s) {
    mbarrier_expect(s.ready, S::Pixels * S::N * 2 + patch_bytes(l, chunks));
    copy_patch(l, chunks, &launch.dy, tile, phase.channel, s.patch, s.ready);
#pragma unroll
    for (int c = 0; c < S::N; c += kRowChannels)
      copy_box(s.x + c * S::Pixels * 2, &launch.x, {{channel + c, tile.first, 0, 0, 0}}, s.ready);
  });
}

// A pixel of x: the row of the patch where it would lie itself. One that does not exist meets nothing.
struct Pixel {
  int i, j, row;

  __device__ Pixel(const Walk& w, const PixelTile& tile, const Phase& phase, int mine) {
    const Tile p = pixel_of(tile, phase, mine);
    i = p.n < w.images ? p.i : -(1 << 30), j = p.j;
    row = (p.n * w.in_h + p.i) * w.in_w + p.j - tile.low;
  }

  // Where a tap finds it, in bytes and with the swizzle of its row.
  __device__ std::uint32_t place(const Walk& w, const Tap& tap, int zeros) const {
    const int met = row + tap.rows, own = met & 7;
    return (meets(w, i - tap.i, j - tap.j) ? met : zeros + own) * kRowBytes | own << 4;
  }
};

// The places of every tap, as threads gather them: of 16 pixels thread t of four takes 2t, 2t + 1, 2t + 8 and 2t + 9. A lane
// lists two neighbours, a warp every third tap.
template <class S>
__device__ inline void list_places(const Layout& l, const PixelTile& tile, const Phase& phase,
                                   const Shared& s, int thread) {
  const int zeros = first_zeros(l);
#pragma unroll 1
  for (int pair = thread % 32; pair < S::Pixels / 2; pair += 32) {
    const Pixel first(l.walk, tile, phase, 2 * pair), second(l.walk, tile, phase, 2 * pair + 1);
    unsigned char* to = s.lists + (pair / 8 * 8 + pair % 4 * 2 + pair % 8 / 4) * 4;
#pragma unroll 1
    for (int t = thread / 32; t < phase.tap_count; t += kFetchers / 32) {
      const Tap tap = s.taps[t];
      *reinterpret_cast<std::uint32_t*>(to + t * S::ListPitch) =
          first.place(l.walk, tap, zeros) | second.place(l.walk, tap, zeros) << 16;
    }
  }
}

template <class S>
__device__ inline void list_tiles(const Launch& launch, int thread) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Phase phase = phase_of(l, call);
  for_each_tile<S>(l, call, [&](const PixelTile& tile, const Shared& s) {
    warp_barrier();
    list_places<S>(l, tile, phase, s, thread);
    mbarrier_arrive(s.ready);
  });
}

// Of one of the two stripes that a thread gathers: its chunk of the patch and its filter's place in a row, once for each of
// a pair of pixels, and where the list of its tap begins for this thread.
struct Gatherer {
  std::uint32_t chunk, filter;
  int list;

  template <class S>
  static __device__ Gatherer of(const Stripe& stripe) {
    const std::uint32_t filter = stripe.at & (kRowBytes - 1), chunk = stripe.at - filter;
    return {chunk << 16 | chunk, filter << 16 | filter,
            stripe.tap * S::ListPitch + static_cast<int>(threadIdx.x) % 4 * 8};
  }
};

using Operand = std::uint32_t[kStep / 16][4];

// The piece of P of 64 pixels: of stripes g and g + 8 of a warp's 16, what thread t of four holds of four products.
__device__ __forceinline__ void gather(const unsigned char* patch, const unsigned char* lists,
                                       const Gatherer& near, const Gatherer& far, Operand& a) {
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Gatherer& stripe = half ? far : near;
      const uint2 places = *reinterpret_cast<const uint2*>(lists + stripe.list + k * 32);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const std::uint32_t pair = ((eight ? places.y : places.x) + stripe.chunk) ^ stripe.filter;
        const std::uint32_t low = *reinterpret_cast<const std::uint16_t*>(patch + (pair & 0xffff));
        const std::uint32_t high = *reinterpret_cast<const std::uint16_t*>(patch + (pair >> 16));
        a[k][2 * eight + half] = low | high << 16;
      }
    }
}

// Starts the products of a step; a belongs to them until they are waited for.
template <class T, class S>
__device__ __forceinline__ void multiply(const unsigned char* x, int accumulate, Operand& a,
                                         float (&acc)[S::N / 2]) {
  const std::uint64_t b = column_descriptor(shared_address(x), S::Pixels);
  constexpr int kNext = 16 * kRowBytes / 16;  // 16 rows further in units of 16 bytes
  // All of it is in registers before the fence: the assembler would gather on between the products.
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
    for (std::uint32_t& pair : a[k]) asm volatile("" : "+r"(pair)::"memory");
  wgmma_fence();
  wgmma_registers<T, S::N, true>(acc, a[0], b, accumulate);
  wgmma_registers<T, S::N, true>(acc, a[1], b + kNext, 1);
  wgmma_registers<T, S::N, true>(acc, a[2], b + 2 * kNext, 1);
  wgmma_registers<T, S::N, true>(acc, a[3], b + 3 * kNext, 1);
  wgmma_commit();
}

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
  Operand even, odd;
  Cursor ring;
  wgmma_keep(acc);
  Shared s = shared_of<S>(l, 0);
  mbarrier_wait(s.ready, 0);
  gather(s.patch, s.lists, near, far, even);
  // Behind the last step its own tile is gathered once more: a branch would have the assembler serialize the products.
  const auto step = [&](Operand& current, Operand& next, int i, auto place) {
    constexpr int kPlace = decltype(place)::value;  // in its tile
    constexpr bool kLast = kPlace + 1 == S::Steps;
    multiply<T, S>(s.x + kPlace * kStep * kRowBytes, i, current, acc);
    Mbarrier* read = s.read;
    if (kLast) {
      if (i + 1 < steps) ring.advance(l.slab);
      s = shared_of<S>(l, ring.stage);
      mbarrier_wait(s.ready, ring.parity);
    }
    gather(s.patch, s.lists + (kLast ? 0 : (kPlace + 1) * kStep * 2), near, far, next);
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

template <int N, class With>
int with_pixels(const Layout& l, const With& with) {
  return l.walk.tile_n == 64 ? with(Shape<N, 64>()) : with(Shape<N, 128>());
}
template <class With>
int with_shape(const Layout& l, const With& with) {
  return l.width == 64 ? with_pixels<64>(l, with) : with_pixels<128>(l, with);
}

template <class T>
int launch_type(const Params& p, void* stream) {
  const Layout& l = p.layout;
  const Walk& w = l.walk;
  Launch launch_ = {};
  launch_.params = p;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t e = tensor_map_encoder(&encode);
  if (e == cudaSuccess)
    e = encode_matrix(encode, l.dtype, p.call.in, w.images * w.out_h * w.out_w, l.groups * l.group_in,
                      w.tile_n, &launch_.x);
  if (e == cudaSuccess)
    e = encode_matrix(encode, l.dtype, p.call.weights, w.images * w.in_h * w.in_w, l.groups * l.group_out,
                      w.load_w, &launch_.dy);
  if (e != cudaSuccess) return e;
  return with_shape(l, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid((l.group_in + S::N - 1) / S::N, l.tiles_out, l.splits);
    return launch(wgrad_sm90_kernel<T, S>, grid, kThreads, memory_of<S>(l).end, stream, launch_);
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
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
