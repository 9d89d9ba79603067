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
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ring.h"
#include "cuda/tensor_map.h"
#include "cuda/tiles_sm90.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kStageBytes = 2048;  // 64 sums of eight pixels

constexpr int kGroups = 3;  // warpgroups that compute, 64 pixels each
constexpr int kPixels = 64 * kGroups, kWarps = 4 * kGroups, kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kLoader = 56, kComputer = 152;  // registers a thread
static_assert(kLoader + kGroups * kComputer <= 4 * 128);

// An instance: filters of a tile, filters that share 16 columns, and 64s of channels in a stage of the ring.
template <int Filters_, int Serve_, int Chunks_>
struct Shape {
  static constexpr int Filters = Filters_, Serve = Serve_, Chunks = Chunks_;
  static constexpr int Bundles = Filters / Serve;
  static constexpr int Columns = 16 * (Bundles + 1);
  static constexpr int Piece = Columns * kRowBytes;  // weights of 64 channels of a step
  static constexpr int Ones = Serve * 32;            // bytes of 16 columns' ones
  // A stage of the ring holds pieces, or all ones of a step.
  static constexpr int Stage = Chunks * Piece > 2 * Bundles* Ones ? Chunks * Piece : 2 * Bundles * Ones;
  static constexpr int Parts = Filters == 64 ? 1 : 2;  // products of 64 channels: registers hold no more
  static constexpr int Products = Chunks * Parts;      // of a stage
  static constexpr bool Overlaps = Products == 1;      // registers hold z of two steps, rounded
};

struct Launch {
  CUtensorMap x;
  Params params;
};

struct Header {
  int steps, channel, count, pad;
};

struct Memory {
  int ring, patch, patch_size, sums, rows, offsets, headers, barriers, end;
};

// Stages of weights a step.
template <class S>
__host__ __device__ inline int stages_of(const Layout& l) {
  return (patch_chunks(l) + S::Chunks - 1) / S::Chunks;
}

// patch: zeros where there are no channels. rows: of the patch, [step][pixel]. offsets: of the pixels of y.
template <class S>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  const int buffers = buffers_of(l);
  Memory m;
  m.ring = 0;
  m.patch = l.slab * S::Stage;
  m.patch_size = stages_of<S>(l) * S::Chunks * l.pitch;
  m.sums = m.patch + buffers * m.patch_size;
  m.rows = m.sums + kWarps * kStageBytes;
  m.offsets = m.rows + buffers * most_steps(l) * kPixels * 2;
  m.headers = m.offsets + buffers * kPixels * 8;
  m.barriers = m.headers + buffers * static_cast<int>(sizeof(Header));
  m.end = m.barriers + (2 * l.slab + 4) * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// full, empty: of the ring; ready, read: of the tiles' buffers.
struct Shared {
  unsigned char *ring, *patch, *sums;
  std::uint16_t* rows;
  long long* offsets;
  Header* header;
  Mbarrier *full, *empty, *ready, *read;
};

template <class S>
__device__ inline Shared shared_of(const Layout& l, int buffer) {
  const Memory m = memory_of<S>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  return {base + m.ring,
          base + m.patch + buffer * m.patch_size,
          base + m.sums,
          reinterpret_cast<std::uint16_t*>(base + m.rows) + buffer * most_steps(l) * kPixels,
          reinterpret_cast<long long*>(base + m.offsets) + buffer * kPixels,
          reinterpret_cast<Header*>(base + m.headers) + buffer,
          barriers,
          barriers + l.slab,
          barriers + 2 * l.slab + buffer,
          barriers + 2 * l.slab + 2 + buffer};
}

// Calls item(tile, phase, buffer, parity) for every item of this block: a tile of pixels and one of filters. Both are found
// from the item's number, so that they are loaded at once: a GPU's caches are cold when a kernel begins.
template <class Item>
__device__ inline void for_each_item(const Layout& l, const int* tables, const Item& item) {
  const auto* tiles = reinterpret_cast<const PixelTile*>(tables + l.items);
  const auto* phases = reinterpret_cast<const Phase*>(tables + l.steps);
  const int items = l.walk.tiles_n * l.tiles_out, of_group = items / l.groups;
  int buffer = 0, parity = 0;
  for (int i = blockIdx.x; i < items; i += static_cast<int>(gridDim.x)) {
    item(tiles[i / l.tiles_out], phases[i / of_group * l.tiles_out + i % l.tiles_out], buffer, parity);
    if (++buffer == buffers_of(l)) buffer = 0, parity ^= 1;
  }
}

template <class S>
__device__ inline void load_tiles(const Launch& launch, int thread) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Walk& w = l.walk;
  const int zeros = zeros_of(l) / kRowBytes;
  for_each_item(l, call.tables, [&](const PixelTile& tile, const Phase& phase, int buffer, int parity) {
    const Shared s = shared_of<S>(l, buffer);
    if (thread % 32 == 0)
      mbarrier_wait(s.read, parity ^ 1);  // one lane: who waits takes turns from who computes
    warp_barrier();
    load_patch(l, stages_of<S>(l) * S::Chunks, &launch.x, tile, phase.group, s.patch, s.ready, thread);
    const auto* taps = reinterpret_cast<const int2*>(call.tables + l.entries) + phase.steps;
    const int steps = phase.steps_end - phase.steps;
#pragma unroll 1
    for (int mine = thread; mine < kPixels; mine += kFetchers) {
      const Tile p = pixel_of(tile, phase, mine);
      s.offsets[mine] = offset_of_pixel(w, phase, call.out_strides, p);
      const int first = (p.n * w.in_h + p.i) * w.in_w + p.j - tile.low;
      const bool exists = p.n < w.images;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int2 tap = taps[step];
        const bool met = exists && meets(w, p.i + tap.x, p.j + tap.y);
        s.rows[step * kPixels + mine] =
            static_cast<std::uint16_t>(met ? first + tap.x * w.in_w + tap.y : zeros);
      }
    }
    if (thread == 0) *s.header = {steps, phase.channel, phase.count, 0};
    mbarrier_arrive(s.ready);
  });
}

// Stages of all steps, where they are the same for all items and the ring holds them; else 0.
template <class S>
__device__ inline int kept_stages(const Layout& l, const int* tables) {
  if (l.groups * l.tiles_out > 1) return 0;
  const int stages = reinterpret_cast<const Phase*>(tables + l.steps)->steps_end * (stages_of<S>(l) + 1);
  return stages <= l.slab ? stages : 0;
}

template <class S>
__device__ inline void load_weights(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Shared s = shared_of<S>(l, 0);
  const int stages = stages_of<S>(l) + 1, kept = kept_stages<S>(l, call.tables);
  Cursor ring;
  bool first = true;
  for_each_item(l, call.tables, [&](const PixelTile&, const Phase& phase, int, int) {
    if (kept && !first) return;
    first = false;
    const auto* from = static_cast<const unsigned char*>(call.weights) +
                       static_cast<long long>(phase.steps) * stages * S::Stage;
    for (int step = phase.steps; step < phase.steps_end; ++step)
      for (int stage = 0; stage < stages; ++stage, from += S::Stage) {
        const int bytes = stage + 1 < stages ? S::Chunks * S::Piece : 2 * S::Bundles * S::Ones;
        mbarrier_wait(s.empty + ring.stage, ring.parity ^ 1);
        mbarrier_expect(s.full + ring.stage, bytes);
        copy_bulk(s.ring + ring.stage * S::Stage, from, bytes, s.full + ring.stage);
        ring.advance(l.slab);
      }
  });
}

// Channels of a warpgroup's pixels, 64 or 32 at once, as wgmma takes them from registers.
template <class S>
using Operand = std::uint32_t[4 / S::Parts][4];

// z as wgmma takes it from registers.
template <class S>
using Rounded = std::uint32_t[S::Columns / 16][4];

// at: of the pixel that a lane names, the address of its first 16 bytes (lanes 16 on: second).
template <class S>
__device__ __forceinline__ void load_pixels(const unsigned char* patch, int at, int part, Operand<S>& a) {
#pragma unroll
  for (int k = 0; k < 4 / S::Parts; ++k) load_matrices(a[k], patch + (at ^ (part * (4 / S::Parts) + k) * 32));
}

// z (+)= a times those channels of weights.
template <class T, class S>
__device__ __forceinline__ void multiply(const Operand<S>& a, std::uint64_t w, int accumulate,
                                         float (&z)[S::Columns / 2]) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4 / S::Parts; ++k)
    wgmma_registers<T, S::Columns, false>(z, a[k], w + 2 * k, accumulate + k);
  wgmma_commit();
}

// y (+)= z times ones: of every bundle its own columns', then those of what is left over.
template <class T, class S, int... B>
__device__ __forceinline__ void add_columns(const Rounded<S>& z, std::uint64_t ones, int accumulate,
                                            float (&y)[S::Bundles][S::Serve / 2],
                                            std::integer_sequence<int, B...>) {
  constexpr int kNext = S::Ones >> 4;
  wgmma_fence();
  (..., (wgmma_registers<T, S::Serve, false>(y[B], z[B], ones + 2 * B * kNext, accumulate),
         wgmma_registers<T, S::Serve, false>(y[B], z[S::Bundles], ones + (2 * B + 1) * kNext, 1)));
  wgmma_commit();
}

// Where 16-byte piece p of eight rows of 64 sums lies: four rows in different banks.
__device__ inline int place_of(int row, int piece) { return row * 256 + ((piece ^ (row & 3) << 1) << 4); }

// Eight rows of a warp's 16 to shared memory: row g, columns 8 j + 2 q and the next from lane 4 g + q.
__device__ __forceinline__ void put_sums(const float* y, unsigned char* sums) {
  const int lane = fresh_thread() % 32, row = lane / 4, q = lane % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    *reinterpret_cast<float2*>(sums + place_of(row, 2 * j + q / 2) + q % 2 * 8) = {y[4 * j], y[4 * j + 1]};
}

// y = activation(sum * scale + shift + residual) of 64 filters of eight pixels, from what put_sums left: eight filters of a
// pixel a lane, twice. aligned: eight filters of every pixel begin at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void finish_sums(const Call& call, int channel, int count,
                                            const long long* offsets, bool aligned,
                                            const unsigned char* sums) {
  const Finish& f = call.finish;
  const int lane = fresh_thread() % 32, first = lane % 8 * 8, mine = min(8, count - first);
  if (mine <= 0) return;
  channel += first;
  const bool whole = aligned && mine == 8;
#pragma unroll 1
  for (int row = lane / 8; row < 8; row += 4) {
    const long long offset = offsets[row];
    if (offset < 0) continue;
    float y[1][8];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float4*>(y[0] + 4 * half) =
          *reinterpret_cast<const float4*>(sums + place_of(row, lane % 8 * 2 + half));
    const auto each = [&](const auto& change) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < mine) change(k, y[0][k]);
    };
    if (f.scale) each([scale = f.scale + channel](int k, float& value) { value *= scale[k]; });
    if (f.shift) each([shift = f.shift + channel](int k, float& value) { value += shift[k]; });
    if (f.residual) {
      const T* residual = static_cast<const T*>(f.residual) + offset + channel;
      if (whole) {
        const uint4 values = *reinterpret_cast<const uint4*>(residual);
        const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int k = 0; k < 8; ++k)
          y[0][k] += widen(T{static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2))});
      } else {
        each([&](int k, float& value) { value += widen(residual[k]); });
      }
    }
    activate(y, f.activation);
    const std::uint32_t pairs[4] = {pack<T>(y[0][0], y[0][1]), pack<T>(y[0][2], y[0][3]),
                                    pack<T>(y[0][4], y[0][5]), pack<T>(y[0][6], y[0][7])};
    T* to = static_cast<T*>(call.out) + offset + channel;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < mine) to[k] = T{static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2))};
    }
  }
}

// What is in registers is put away in turns; all else is the same code, which is fetched once. The header is a copy: behind
// the last barrier of the warp the next tile's may take its place.
template <class T, class S, int... B>
__device__ __forceinline__ void store(const Call& call, Header header, const long long* offsets, bool aligned,
                                      unsigned char* sums, const float (&y)[S::Bundles][S::Serve / 2],
                                      std::integer_sequence<int, B...>) {
#pragma unroll 1
  for (int b = 0; b < 2 * S::Filters / 64; ++b) {
    if (b / 2 * 64 >= header.count) break;
    (...,
     (b == B ? put_sums(&y[B / 2 * 64 / S::Serve][B / 2 * 64 % S::Serve / 2 + B % 2 * 2], sums) : void()));
    warp_barrier();
    finish_sums<T>(call, header.channel + b / 2 * 64, header.count - b / 2 * 64, offsets + b % 2 * 8, aligned,
                   sums);
    warp_barrier();
  }
}

// z of a step is multiplied together with the second product of the step before: while the latter ends, z is rounded. What
// products read is loaded, and what comes through the ring is waited for, while others are under way.
template <class T, class S>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane % 16;
  const int stages = S::Chunks == 1 ? 1 : stages_of<S>(l);
  const int kept = kept_stages<S>(l, call.tables), all = kept ? kept : l.slab;
  const Strides& strides = call.out_strides;
  const bool aligned = reinterpret_cast<std::uintptr_t>(call.out) % 16 == 0 &&
                       (strides.n | strides.h | strides.w | l.group_out) % 8 == 0;
  Cursor ring;
  bool waits = true;
  const bool leader = lane == 0, gives = leader && !kept;
  for_each_item(l, call.tables, [&](const PixelTile&, const Phase&, int buffer, int parity) {
    const Shared s = shared_of<S>(l, buffer);
    const auto arrived = [&] {
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
    // Of the step's pixel that this lane names; loaded a step before the pixel is.
    const auto row_of = [&](int step) { return s.rows[min(step, count - 1) * kPixels + row]; };
    int next = row_of(0);
    const auto meet = [&] { return next * kRowBytes + (lane & 16 ^ (next & 7) << 4); };
    int at = meet();
    load_pixels<S>(s.patch, at, 0, even);
    next = row_of(1);
    arrived();
    int last = -1;                  // stage of the first product
    int summing = -1, summed = -1;  // stages of ones: that were multiplied last, and before
    std::uint64_t ones = 0;         // that are multiplied next
    // z of step i; add() is issued behind the first product. `first` holds what the step begins with; `second` does for the
    // next one, if there is one product a step.
    const auto products = [&](Operand<S>& first, Operand<S>& second, int i, const auto& add) {
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
            arrived();
            if (number + 1 == stages) at = meet(), patch = s.patch;
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
    // What follows when z is there: Pending second products are not waited for.
    const auto finish = [&](auto pending, Rounded<S>& to, int i) {
      const int of_ones = ring.stage;
      ring.advance(all);
      if (i + 1 < count) arrived();
      wgmma_wait<decltype(pending)::value>();
      wgmma_keep(z);
#pragma unroll
      for (int c = 0; c < S::Columns / 16; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) to[c][e] = pack<T>(z[8 * c + 2 * e], z[8 * c + 2 * e + 1]);
      release(last);
      if (S::Overlaps) release(summed);
      summed = summing, summing = of_ones;
    };
    constexpr auto bundles = std::make_integer_sequence<int, S::Bundles>();
    const auto step = [&](auto pending, Operand<S>& first, Operand<S>& second, const Rounded<S>& from,
                          Rounded<S>& to, int i) {
      products(first, second, i, [&] { add_columns<T, S>(from, ones, i - 1, y, bundles); });
      finish(pending, to, i);
    };
    constexpr Constant<0> none;
    constexpr Constant<1> one;
    products(even, odd, 0, [] {});
    finish(none, rounded, 0);
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

// What the tables are read for first.
__device__ inline void prefetch_tables(const Layout& l, const int* tables, int thread) {
  const int bytes = (l.lists - l.steps) * 4;
  const char* from = reinterpret_cast<const char*>(tables + l.steps);
  for (int i = thread * 128; i < bytes; i += kFetchers * 128) prefetch(from + i);
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

template <class T>
int launch_type(const Params& p, void* stream) {
  const Layout& l = p.layout;
  Launch launch_ = {};
  launch_.params = p;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t e = tensor_map_encoder(&encode);
  const int pixels = l.walk.images * l.walk.in_h * l.walk.in_w;
  if (e == cudaSuccess)
    e = encode_matrix(encode, l.dtype, p.call.in, pixels, l.groups * l.group_in, l.walk.load_w, &launch_.x);
  if (e != cudaSuccess) return e;
  int processors = 0;
  e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const long long items = static_cast<long long>(l.walk.tiles_n) * l.tiles_out;
  const dim3 grid(static_cast<unsigned>(items < processors ? items : processors));
  return with_shape(l, [&](auto shape) {
    using S = decltype(shape);
    return launch(fprop_taps_sm90_kernel<T, S>, grid, kThreads, memory_of<S>(l).end, stream, launch_);
  });
}

}  // namespace

int fprop_taps_sm90_bytes(const Layout& l) {
  return with_shape(l, [&](auto shape) { return memory_of<decltype(shape)>(l).end; });
}

// width: filters that share 16 columns, 64 or 128; tile_out: filters of a tile, as many or 128; slab: stages of the ring;
// chunk: rows of the largest patch; pitch: bytes from 64 channels of a patch to the next; of the walk patch_w: most steps of
// a tile of filters, row_w: steps of all, load_h: buffers of tiles, load_w: rows of x that are copied at once.
int fprop_taps_sm90(const Params& p, void* stream) {
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
