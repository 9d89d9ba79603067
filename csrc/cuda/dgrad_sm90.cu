// dx[n,c,h,w] = sum over the live stripes (k,r,s):  w[k,c,r,s] * dy[n, k, h - r, w - s]
//
// Hopper's own instructions: dx[pixel][c] = sum over stripes of P[pixel][stripe] * w[stripe][c], and P is never formed. A
// tile keeps dy of its pixels, halo and all filters, in shared memory; every thread gathers the piece of P that wgmma
// takes from its registers, while the product before is under way. Exact at one stripe, but for each tap's list, which
// is filled up to a multiple of 8. Sums stay in registers from the first stripe to the last.
//
// Two warpgroups compute, 64 pixels each. Of a third one a thread loads weights through a ring and three warps load the
// patch and the lists of the next tile. backends/cuda_gather.py lays out tiles and lists.
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/tiles_sm90.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kLoader = 72, kComputer = 216;  // registers a thread
static_assert(kLoader + 2 * kComputer <= kTradedRegisters);
constexpr int kPixels = 128;  // of a tile
constexpr int kStripes = 64;  // of a step: four products' worth
constexpr int kColumns = 64;  // channels of a row of weights in shared memory: 128 bytes, swizzled

// What eight stripes share.
struct Tap {
  unsigned bit;  // of those in a pixel's `met`
  int offset;    // bytes in the patch, from the pixel to the one that the tap reads
};
// 64 stripes, and weights of the same number. Thread t of four finds those it gathers in at[.][t]: for each eight of them
// two offsets in bytes from a pixel of the patch.
struct alignas(16) StripeStep {
  int4 at[4][4];
  Tap taps[8];
};

struct Launch {
  CUtensorMap weights, dy;
  Params params;
};

// What a tile needs beside its patch: how many steps and the first channel of dx, and of every pixel
// where in the patch it would lie itself, in bytes, which taps meet dy, and where its dx is.
struct Header {
  int steps, channel;
};
struct alignas(16) Pixel {
  int base;
  unsigned met;
  long long offset;  // -1 where there is none
};

struct Memory {
  int weights, patch, patch_size, steps, pixels, headers, barriers, end;
};

template <int N>
constexpr int kStagePitch =
    N * 2 + 16;  // bytes between pixels that wait to be stored: eight begin in different banks

template <int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  const int buffers = buffers_of(l), patch = patch_chunks(l) * l.pitch, stage = kPixels * kStagePitch<N>;
  Memory m;
  m.weights = 0;
  m.patch = l.slab * kStripes * N * 2;
  m.patch_size = round_up(patch > stage ? patch : stage, 1024);
  m.steps = m.patch + buffers * m.patch_size;
  m.pixels = m.steps + buffers * most_steps(l) * static_cast<int>(sizeof(StripeStep));
  m.headers = m.pixels + buffers * kPixels * static_cast<int>(sizeof(Pixel));
  m.barriers = m.headers + buffers * static_cast<int>(sizeof(Header));
  m.end = m.barriers + (2 * l.slab + 4) * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// full, empty: of the weights' ring; ready, read: of the tiles' buffers.
struct Shared {
  unsigned char *weights, *patch;
  StripeStep* steps;
  Pixel* pixels;
  Header* header;
  Mbarrier *full, *empty, *ready, *read;
};

template <int N>
__device__ inline Shared shared_of(const Layout& l, int buffer) {
  const Memory m = memory_of<N>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  return {base + m.weights,
          base + m.patch + buffer * m.patch_size,
          reinterpret_cast<StripeStep*>(base + m.steps) + buffer * most_steps(l),
          reinterpret_cast<Pixel*>(base + m.pixels) + buffer * kPixels,
          reinterpret_cast<Header*>(base + m.headers) + buffer,
          barriers,
          barriers + l.slab,
          barriers + 2 * l.slab + buffer,
          barriers + 2 * l.slab + 2 + buffer};
}

// Calls item(tile, phase, tile of channels, buffer, parity) for every item of this block.
template <class Item>
__device__ inline void for_each_item(const Layout& l, const int* tables, const Item& item) {
  const auto* tiles = reinterpret_cast<const PixelTile*>(tables + l.items);
  const auto* phases = reinterpret_cast<const Phase*>(tables + l.steps);
  const int items = l.walk.tiles_n * l.tiles_out, step = static_cast<int>(gridDim.x);
  int buffer = 0, parity = 0;
  PixelTile next = tiles[static_cast<int>(blockIdx.x) / l.tiles_out];
  for (int i = blockIdx.x; i < items; i += step) {
    const PixelTile tile = next;
    next = tiles[min(i + step, items - 1) / l.tiles_out];
    item(tile, phases[tile.phase], i % l.tiles_out, buffer, parity);
    if (++buffer == buffers_of(l)) buffer = 0, parity ^= 1;
  }
}

__device__ inline void list_pixels(const Layout& l, const Call& call, const PixelTile& tile,
                                   const Phase& phase, Pixel* pixels, int thread) {
  const Walk& w = l.walk;
  const auto* taps = reinterpret_cast<const int2*>(call.tables + l.lists + phase.taps);
  for (int mine = thread; mine < kPixels; mine += kFetchers) {
    const Tile p = pixel_of(tile, phase, mine);
    Pixel pixel = {((p.n * w.in_h + p.i) * w.in_w + p.j - tile.low) * kRowBytes, 0,
                   offset_of_pixel(w, phase, call.out_strides, p)};
    if (p.n < w.images)
      for (int t = 0; t < phase.tap_count; ++t)
        pixel.met |= static_cast<unsigned>(meets(w, p.i - taps[t].x, p.j - taps[t].y)) << t;
    pixels[mine] = pixel;
  }
}

template <int N>
__device__ inline void load_tiles(const Launch& launch, int thread) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  int first = -1, second = -1;  // phases whose steps the buffers hold
  for_each_item(
      l, call.tables, [&](const PixelTile& tile, const Phase& phase, int channels, int buffer, int parity) {
        const Shared s = shared_of<N>(l, buffer);
        mbarrier_wait(s.read, parity ^ 1);
        load_patch(l, patch_chunks(l), &launch.dy, tile, phase.group, s.patch, s.ready, thread);
        if ((buffer ? second : first) != tile.phase) {
          constexpr int kPieces = sizeof(StripeStep) / 16;
          const auto* steps = reinterpret_cast<const uint4*>(call.tables + l.entries) + phase.steps * kPieces;
          for (int i = thread; i < (phase.steps_end - phase.steps) * kPieces; i += kFetchers)
            reinterpret_cast<uint4*>(s.steps)[i] = steps[i];
        }
        if (buffer)
          second = tile.phase;
        else
          first = tile.phase;
        list_pixels(l, call, tile, phase, s.pixels, thread);
        if (thread == 0)
          *s.header = {phase.steps_end - phase.steps, phase.group * l.group_out + channels * N};
        mbarrier_arrive(s.ready);
      });
}

template <int N>
__device__ inline void load_weights(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Shared s = shared_of<N>(l, 0);
  int stage = 0, parity = 0;
  for_each_item(l, launch.params.call.tables,
                [&](const PixelTile&, const Phase& phase, int channels, int, int) {
                  for (int step = phase.steps; step < phase.steps_end; ++step) {
                    mbarrier_wait(s.empty + stage, parity ^ 1);
                    mbarrier_expect(s.full + stage, kStripes * N * 2);
#pragma unroll
                    for (int c = 0; c < N; c += kColumns)
                      copy_box(s.weights + (stage * N + c) * kStripes * 2, &launch.weights,
                               {{channels * N + c, step * kStripes, 0, 0, 0}}, s.full + stage);
                    if (++stage == l.slab) stage = 0, parity ^= 1;
                  }
                });
}

// Of the two pixels a thread gathers for.
struct Gatherer {
  int base[2], zeros;
  unsigned met[2];
};

// The piece of P of one step: of pixels g and g + 8 of a warp's 16, what thread t of four holds of four products.
__device__ inline void gather(const Shared& s, const Gatherer& pixels, const StripeStep& step,
                              std::uint32_t (&a)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int4 at = step.at[k][threadIdx.x % 4];
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const Tap tap = step.taps[2 * k + eight];
      const int first = eight ? at.z : at.x, second = eight ? at.w : at.y;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = pixels.met[half] & tap.bit ? pixels.base[half] + tap.offset : pixels.zeros;
        const int swizzle = row >> 3 & 0x70;
        const std::uint32_t low =
            *reinterpret_cast<const std::uint16_t*>(s.patch + ((row + first) ^ swizzle));
        const std::uint32_t high =
            *reinterpret_cast<const std::uint16_t*>(s.patch + ((row + second) ^ swizzle));
        a[k][2 * eight + half] = low | high << 16;
      }
    }
  }
}

// Starts the products of a step; a belongs to them until they are waited for.
template <class T, int N>
__device__ __forceinline__ void multiply(const unsigned char* weights, int accumulate,
                                         std::uint32_t (&a)[4][4], float (&acc)[N / 2]) {
  const std::uint64_t w = column_descriptor(shared_address(weights), kStripes);
  constexpr int kNext = 16 * 128 / 16;  // 16 rows further in units of 16 bytes
  wgmma_fence();
  wgmma_registers<T, N, true>(acc, a[0], w, accumulate);
  wgmma_registers<T, N, true>(acc, a[1], w + kNext, 1);
  wgmma_registers<T, N, true>(acc, a[2], w + 2 * kNext, 1);
  wgmma_registers<T, N, true>(acc, a[3], w + 3 * kNext, 1);
  wgmma_commit();
}

// 16 columns of a warp's 16 pixels at a time to shared memory (no loop: wgmma_keep() says why).
template <class T, int... J>
__device__ __forceinline__ void put_rows(const float* acc, unsigned char* row,
                                         std::integer_sequence<int, J...>) {
  (..., [&](const float* d, unsigned char* to) {
    const std::uint32_t pairs[4] = {pack<T>(d[0], d[1]), pack<T>(d[2], d[3]), pack<T>(d[4], d[5]),
                                    pack<T>(d[6], d[7])};
    store_matrices(to, pairs);
  }(acc + 8 * J, row + 32 * J));
}

// dx of a warp's 16 pixels, by way of the patch, in whole rows.
template <class T, int N>
__device__ __forceinline__ void store(const Layout& l, const Call& call, const Shared& s,
                                      const float (&acc)[N / 2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* rows = s.patch + warp * 16 * kStagePitch<N>;
  put_rows<T>(acc, rows + lane % 16 * kStagePitch<N> + lane / 16 * 16,
              std::make_integer_sequence<int, N / 16>());
  warp_barrier();
  constexpr int kPieces = N / 8;  // of a pixel, 16 bytes each
  const int channel = s.header->channel, end = (channel / l.group_out + 1) * l.group_out;
  T* dx = static_cast<T*>(call.out) + channel;
#pragma unroll 4
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int pixel = i / kPieces, c = i % kPieces * 8;
    const long long offset = s.pixels[warp * 16 + pixel].offset;
    const uint4 piece = *reinterpret_cast<const uint4*>(rows + pixel * kStagePitch<N> + c * 2);
    if (offset >= 0 && channel + c < end) *reinterpret_cast<uint4*>(dx + offset + c) = piece;
  }
}

// `even` and `odd` are gathered in turn: one is read while the other is filled.
template <class T, int N>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  int stage = 0, ring = 0;
  for_each_item(l, call.tables, [&](const PixelTile&, const Phase&, int, int buffer, int parity) {
    const Shared s = shared_of<N>(l, buffer);
    mbarrier_wait(s.ready, parity);
    const int count = s.header->steps;
    const Pixel near = s.pixels[row], far = s.pixels[row + 8];
    const Gatherer pixels = {{near.base, far.base}, zeros_of(l), {near.met, far.met}};
    float acc[N / 2];
    std::uint32_t even[4][4], odd[4][4];
    wgmma_keep(acc);
    gather(s, pixels, s.steps[0], even);
    int i = 0;
    for (; i + 1 < count; i += 2) {
      mbarrier_wait(s.full + stage, ring);
      multiply<T, N>(s.weights + stage * kStripes * N * 2, i, even, acc);
      gather(s, pixels, s.steps[i + 1], odd);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(s.empty + stage);
      if (++stage == l.slab) stage = 0, ring ^= 1;

      mbarrier_wait(s.full + stage, ring);
      multiply<T, N>(s.weights + stage * kStripes * N * 2, 1, odd, acc);
      gather(s, pixels, s.steps[min(i + 2, count - 1)], even);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(s.empty + stage);
      if (++stage == l.slab) stage = 0, ring ^= 1;
    }
    if (i < count) {
      mbarrier_wait(s.full + stage, ring);
      multiply<T, N>(s.weights + stage * kStripes * N * 2, i, even, acc);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(s.empty + stage);
      if (++stage == l.slab) stage = 0, ring ^= 1;
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

template <class With>
int with_columns(const Layout& l, const With& with) {
  if (l.width == 64) return with(Constant<64>());
  if (l.width == 128) return with(Constant<128>());
  return with(Constant<256>());
}

template <class T>
int launch_type(const Params& p, void* stream) {
  const Layout& l = p.layout;
  Launch launch_ = {};
  launch_.params = p;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t e = tensor_map_encoder(&encode);
  const int rows = (l.lists - l.entries) / static_cast<int>(sizeof(StripeStep) / 4) * kStripes;
  if (e == cudaSuccess)
    e = encode_matrix(encode, l.dtype, p.call.weights, rows, l.group_out, kStripes, &launch_.weights);
  const int pixels = l.walk.images * l.walk.in_h * l.walk.in_w;
  if (e == cudaSuccess)
    e = encode_matrix(encode, l.dtype, p.call.in, pixels, l.groups * l.group_in, l.walk.load_w, &launch_.dy);
  if (e != cudaSuccess) return e;
  int processors = 0;
  e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const long long items = static_cast<long long>(l.walk.tiles_n) * l.tiles_out;
  const dim3 grid(static_cast<unsigned>(items < processors ? items : processors));
  return with_columns(l, [&](auto n) {
    constexpr int N = decltype(n)::value;
    return launch(dgrad_sm90_kernel<T, N>, grid, kThreads, memory_of<N>(l).end, stream, launch_);
  });
}

}  // namespace

int dgrad_sm90_bytes(const Layout& l) {
  return with_columns(l, [&](auto n) { return memory_of<decltype(n)::value>(l).end; });
}

// width: channels of a block, 64, 128 or 256; slab: stages of the ring; chunk: rows of the largest patch; pitch: bytes from
// 64 filters of a patch to the next; of the walk patch_w: most steps of a phase, load_h: buffers of tiles, load_w: rows of
// dy that are copied at once.
int dgrad_sm90(const Params& p, void* stream) {
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
