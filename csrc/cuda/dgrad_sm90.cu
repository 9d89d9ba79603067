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
#include "cuda/mbarrier.h"
#include "cuda/tensor_map.h"
#include "cuda/tma.h"
#include "cuda/walk.h"
#include "cuda/warpgroup.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kLoader = 72, kComputer = 216;  // registers a thread
static_assert(kLoader + 2 * kComputer <= kTradedRegisters);
constexpr int kPixels = 128;   // of a tile
constexpr int kStripes = 64;   // of a step: four products' worth
constexpr int kColumns = 64;   // channels of a row of weights in shared memory: 128 bytes, swizzled
constexpr int kFetchers = 96;  // threads that load patches

// The tables.
struct PixelTile {
  int phase;
  int first;      // pixel, of all images of the phase
  int low, rows;  // of the patch: pixels of dy, of all images
  int n, i, j;    // of the first pixel
  int pad;
};
struct Phase {
  int group, h0, w0;  // the phase's pixels of dx: (h0 + i * step, w0 + j * step)
  int rows, columns;
  int taps, tap_count;  // in the lists: i and j of pixel (p, q) = (i, j) - tap of dy
  int steps, steps_end;
  int pad[3];
};
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

// patch: [64 filters][pixel][128 bytes, swizzled], l.pitch bytes from 64 filters to the next; the row behind the pixels of
// each holds zeros. What a tile needs beside it: how many steps and the first channel of dx, and of every pixel
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

__host__ __device__ inline int chunks_of(const Layout& l) { return (l.group_in + kColumns - 1) / kColumns; }
// Where the row of zeros lies: behind the rows that boxes fill.
__host__ __device__ inline int zeros_of(const Layout& l) {
  const int box = l.walk.load_w;
  return (l.chunk + box - 1) / box * box * kColumns * 2;
}
__host__ __device__ inline int most_steps(const Layout& l) { return l.walk.patch_w; }
__host__ __device__ inline int buffers_of(const Layout& l) { return l.walk.load_h; }  // of tiles: 1 or 2

template <int N>
constexpr int kStagePitch =
    N * 2 + 16;  // bytes between pixels that wait to be stored: eight begin in different banks

template <int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  const int buffers = buffers_of(l), patch = chunks_of(l) * l.pitch, stage = kPixels * kStagePitch<N>;
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

// dy of the tile into the patch (one thread), zeros behind.
__device__ inline void load_patch(const Launch& launch, const PixelTile& tile, const Phase& phase,
                                  const Shared& s, int thread) {
  const Layout& l = launch.params.layout;
  const int chunks = chunks_of(l), box = l.walk.load_w, boxes = (l.chunk + box - 1) / box;
  if (thread == 0) {
    stores_ready();  // what was done here before comes before what the copy engine does
    mbarrier_expect(s.ready, chunks * boxes * box * kColumns * 2);
    for (int c = 0; c < chunks; ++c)
      for (int b = 0; b < boxes; ++b)
        copy_box(s.patch + c * l.pitch + b * box * kColumns * 2, &launch.dy,
                 {{phase.group * l.group_in + c * kColumns, tile.low + b * box, 0, 0, 0}}, s.ready);
  }
  for (int i = thread; i < chunks * 8; i += kFetchers)
    *reinterpret_cast<uint4*>(s.patch + i / 8 * l.pitch + zeros_of(l) + i % 8 * 16) = {0, 0, 0, 0};
}

// x / d of small numbers: exact below 2^20, since a quotient lies half a divisor's share from the next.
__device__ inline int divide(int x, float reciprocal) { return static_cast<int>((x + 0.5f) * reciprocal); }

__device__ inline void list_pixels(const Layout& l, const Call& call, const PixelTile& tile,
                                   const Phase& phase, const Shared& s, int thread) {
  const Walk& w = l.walk;
  const auto* taps = reinterpret_cast<const int2*>(call.tables + l.lists + phase.taps);
  const float columns = 1.f / phase.columns, rows = 1.f / phase.rows;
  for (int mine = thread; mine < kPixels; mine += kFetchers) {
    const int down = divide(tile.j + mine, columns), j = tile.j + mine - down * phase.columns;
    const int images = divide(tile.i + down, rows), i = tile.i + down - images * phase.rows,
              n = tile.n + images;
    const Strides& o = call.out_strides;
    Pixel pixel = {((n * w.in_h + i) * w.in_w + j - tile.low) * kColumns * 2, 0, -1};
    if (n < w.images) {
      pixel.offset = n * o.n + (phase.h0 + i * w.out_step_h) * o.h + (phase.w0 + j * w.out_step_w) * o.w;
      for (int t = 0; t < phase.tap_count; ++t) {
        const int p = i - taps[t].x, q = j - taps[t].y;
        const bool inside = static_cast<unsigned>(p) < static_cast<unsigned>(w.in_h) &&
                            static_cast<unsigned>(q) < static_cast<unsigned>(w.in_w);
        pixel.met |= static_cast<unsigned>(inside) << t;
      }
    }
    s.pixels[mine] = pixel;
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
        load_patch(launch, tile, phase, s, thread);
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
        list_pixels(l, call, tile, phase, s, thread);
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
