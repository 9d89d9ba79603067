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
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ring.h"
#include "cuda/tensor_map.h"
#include "cuda/tma.h"
#include "cuda/walk.h"
#include "cuda/warpgroup.h"
#include "cuda/wgmma.h"

namespace sk::cuda {
namespace {

constexpr int kGroups = 3;  // warpgroups that compute: most blocks of a tile
constexpr int kWarps = 4 * kGroups, kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kLoader = 56, kComputer = 152;  // registers a thread
static_assert(kLoader + kGroups * kComputer <= 4 * 128);
constexpr int kBlock = 64;                  // positions
constexpr int kRowBytes = 128;              // of shared memory: 64 channels of a position, or 64 filters
constexpr int kSumsBytes = 16 * kRowBytes;  // of a warp: 64 filters of its positions, on their way to y

struct Launch {
  CUtensorMap x;
  Params params;
};

// Where patch rows begin: what position (0, 0) reads through the first tap in either direction.
struct Origin {
  int h, w, pad[2];
};
struct FilterTile {
  int taps, taps_end;  // in the entries: rows of the patch from a position to what it reads
  int channel, count;  // of y
};

// Positions [shift, shift + count) of a patch that begins at (row, column) of y.
struct Tile {
  int n, row, column, shift, count;
};

struct Memory {
  int weights, patches, sums, scale, shift, taps, barriers, end;
};

__host__ __device__ inline int chunks_of(const Layout& l) { return (l.group_in + 63) / 64; }
__host__ __device__ inline int buffers_of(const Layout& l) { return l.walk.load_h; }

template <int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.weights = 0;
  m.patches = l.slab * chunks_of(l) * N * kRowBytes;
  m.sums = m.patches + buffers_of(l) * l.pitch;
  m.scale = m.sums + kWarps * kSumsBytes;
  m.shift = m.scale + N * 4;
  m.taps = m.shift + N * 4;
  m.barriers = m.taps + (l.slab + 1) / 2 * 8;
  m.end = m.barriers + (l.slab + 2 * buffers_of(l) + kGroups) * 8 + 1024;  // to begin at a multiple of 1024
  return m;
}

// kept: weights of a tap are there; ready, read: of the ring of patches; turn: of a warpgroup's blocks.
struct Shared {
  unsigned char *weights, *patches, *sums;
  float *scale, *shift;
  int* taps;
  Mbarrier *kept, *ready, *read, *turn;
};

template <int N>
__device__ inline Shared shared_of(const Layout& l) {
  const Memory m = memory_of<N>(l);
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  return {base + m.weights,
          base + m.patches,
          base + m.sums,
          reinterpret_cast<float*>(base + m.scale),
          reinterpret_cast<float*>(base + m.shift),
          reinterpret_cast<int*>(base + m.taps),
          barriers,
          barriers + l.slab,
          barriers + l.slab + buffers_of(l),
          barriers + l.slab + 2 * buffers_of(l)};
}

__host__ __device__ inline int filter_tiles_of(const Layout& l) { return l.groups * l.tiles_out; }
__host__ __device__ inline int tiles_of(const Walk& w) { return w.tiles_n * w.tiles_h * w.tiles_w; }

__device__ inline FilterTile filter_tile_of(const Layout& l, const int* tables) {
  return reinterpret_cast<const FilterTile*>(tables + l.items)[blockIdx.x % filter_tiles_of(l)];
}

// Calls item(tile) for every tile of positions of this block.
template <class Item>
__device__ inline void for_each_tile(const Layout& l, const Item& item) {
  const Walk& w = l.walk;
  const int shares = static_cast<int>(gridDim.x) / filter_tiles_of(l), tiles = tiles_of(w);
  for (int i = static_cast<int>(blockIdx.x) / filter_tiles_of(l); i < tiles; i += shares) {
    const int band = i % w.tiles_w, image = i / w.tiles_w;
    const int first = image % w.tiles_h * w.row_h, row = first / w.patch_w;
    const int left = (w.out_h - 1) * w.patch_w + w.tile_w - first;
    item(Tile{image / w.tiles_h, row, band * w.tile_w, first - row * w.patch_w,
              min(left, min(w.row_h, w.load_w * kBlock))});
  }
}

template <int N>
__device__ inline void load(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Walk& w = l.walk;
  const Shared s = shared_of<N>(l);
  const FilterTile filters = filter_tile_of(l, call.tables);
  const Origin origin = *reinterpret_cast<const Origin*>(call.tables + l.steps);
  const int chunks = chunks_of(l), group = static_cast<int>(blockIdx.x) % filter_tiles_of(l) / l.tiles_out;
  const int bytes = chunks * N * kRowBytes;  // of weights of a tap
  int weights = filters.taps;                // to be loaded behind the first patch
  Cursor ring;
  for_each_tile(l, [&](const Tile& tile) {
    for (int c = 0; c < chunks; ++c) {
      mbarrier_wait(s.read + ring.stage, ring.parity ^ 1);
      mbarrier_expect(s.ready + ring.stage, w.patch_h * w.patch_w * kRowBytes);
      copy_box(s.patches + ring.stage * l.pitch, &launch.x,
               {{c * 64, group, tile.column + origin.w, tile.row + origin.h, tile.n}}, s.ready + ring.stage);
      ring.advance(buffers_of(l));
      for (; weights < filters.taps_end; ++weights) {
        const int tap = weights - filters.taps;
        mbarrier_expect(s.kept + tap, bytes);
        copy_bulk(s.weights + tap * bytes,
                  static_cast<const unsigned char*>(call.weights) + static_cast<long long>(weights) * bytes,
                  bytes, s.kept + tap);
      }
    }
  });
}

// y += x times those 64 channels of weights.
template <class T, int N>
__device__ __forceinline__ void multiply(std::uint64_t x, std::uint64_t w, float (&y)[N / 2]) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<T, N>(y, x + 2 * k, w + 2 * k, 1);
  wgmma_commit();
}

// Where position `at` of the patch lies in y; negative where it does not.
__device__ inline long long offset_of(const Walk& w, const Strides& o, const Tile& tile, int at,
                                      float reciprocal) {
  const int down = static_cast<int>((at + 0.5f) * reciprocal), across = at - down * w.patch_w;
  const bool exists = at < tile.shift + tile.count && across < w.tile_w && tile.column + across < w.out_w;
  return exists ? tile.n * o.n + (tile.row + down) * o.h + (tile.column + across) * o.w : -1;
}

// 64 filters of a warp's 16 positions to shared memory; 16-byte piece p of row r lies at place p ^ (r % 8). No loop:
// wgmma_keep() says why.
template <class T, int... J>
__device__ __forceinline__ void put_rows(const float* y, unsigned char* row, int place,
                                         std::integer_sequence<int, J...>) {
  (..., [&](const float* d) {
    const std::uint32_t pairs[4] = {pack<T>(d[0], d[1]), pack<T>(d[2], d[3]), pack<T>(d[4], d[5]),
                                    pack<T>(d[6], d[7])};
    store_matrices(row + (place ^ J * 32), pairs);
  }(y + 8 * J));
}

// aligned: two values are one word; all are on their way before the first is added. What does not exist, and is not stored,
// gets those of what does.
template <class T, int N>
__device__ __forceinline__ void add_residual(const Layout& l, const Call& call, const Tile& tile, int channel,
                                             int count, int first, bool aligned, float (&y)[N / 2]) {
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const float reciprocal = 1.f / static_cast<float>(l.walk.patch_w);
  const T* residual[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const long long offset =
        offset_of(l.walk, call.out_strides, tile, first + lane / 4 + 8 * half, reciprocal);
    residual[half] = static_cast<const T*>(call.finish.residual) + (offset < 0 ? 0 : offset) + channel;
  }
  if (aligned) {
    std::uint32_t two[N / 8][2];
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        two[j][half] =
            *reinterpret_cast<const std::uint32_t*>(residual[half] + pair + (8 * j < count ? 8 * j : 0));
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        y[4 * j + 2 * half] += widen(T{static_cast<std::uint16_t>(two[j][half])});
        y[4 * j + 2 * half + 1] += widen(T{static_cast<std::uint16_t>(two[j][half] >> 16)});
      }
  } else {
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          y[4 * j + 2 * half + k] += widen(residual[half][min(8 * j + pair + k, count - 1)]);
  }
}

// y of a block: finished where it is, then in whole rows by way of shared memory. first: of the patch, the warp's.
template <class T, int N>
__device__ __forceinline__ void store(const Layout& l, const Call& call, const Shared& s, const Tile& tile,
                                      int channel, int count, int first, bool aligned, float (&y)[1][N / 2]) {
  const Finish& f = call.finish;
  const Strides& strides = call.out_strides;
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const float reciprocal = 1.f / static_cast<float>(l.walk.patch_w);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(s.scale + 8 * j + pair);
    const float2 shift = *reinterpret_cast<const float2*>(s.shift + 8 * j + pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* d = y[0] + 4 * j + 2 * half;
      d[0] = d[0] * scale.x + shift.x, d[1] = d[1] * scale.y + shift.y;
    }
  }
  if (f.residual) add_residual<T, N>(l, call, tile, channel, count, first, aligned, y[0]);
  activate(y, f.activation);
  unsigned char* sums = s.sums + threadIdx.x / 32 * kSumsBytes;
  const int row = lane % 16, piece = lane % 8;
#pragma unroll
  for (int part = 0; part < N / 64; ++part) {
    put_rows<T>(y[0] + 32 * part, sums + row * kRowBytes, (lane / 16 ^ row & 7) << 4,
                std::make_integer_sequence<int, 4>());
    warp_barrier();
    const int mine = min(8, count - part * 64 - piece * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 4 * i + lane / 8;
      const long long offset = offset_of(l.walk, strides, tile, first + from, reciprocal);
      const uint4 values =
          *reinterpret_cast<const uint4*>(sums + from * kRowBytes + ((piece ^ from & 7) << 4));
      if (offset < 0 || mine <= 0) continue;
      T* to = static_cast<T*>(call.out) + offset + channel + part * 64 + piece * 8;
      if (aligned) {
        *reinterpret_cast<uint4*>(to) = values;
      } else {
        const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (k < mine) to[k] = T{static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2))};
      }
    }
    warp_barrier();
  }
}

template <class T, int N>
__device__ inline void compute(const Launch& launch) {
  const Layout& l = launch.params.layout;
  const Call& call = launch.params.call;
  const Shared s = shared_of<N>(l);
  const FilterTile filters = filter_tile_of(l, call.tables);
  const int taps = filters.taps_end - filters.taps, chunks = chunks_of(l);
  const int warp = uniform(threadIdx.x / 32), group = warp / 4;
  const Strides& strides = call.out_strides;
  const bool leader = threadIdx.x % 32 == 0;
  const bool aligned = reinterpret_cast<std::uintptr_t>(call.out) % 16 == 0 &&
                       (strides.n | strides.h | strides.w | l.group_out) % 8 == 0;
  const auto release = [&](int buffer) {
    if (leader && buffer >= 0) mbarrier_arrive(s.read + buffer);
  };
  const std::uint64_t weights = matrix_descriptor(shared_address(s.weights));
  Cursor ring;
  int next = group;         // which block of the tile is this warpgroup's next one
  int parity = group == 0;  // of its turn: the first block of all need not wait
  bool waits = true;        // for weights
  for_each_tile(l, [&](const Tile& tile) {
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

template <class With>
int with_filters(const Layout& l, const With& with) {
  return l.width == 64 ? with(Constant<64>()) : with(Constant<128>());
}

template <class T>
int launch_type(const Params& p, void* stream) {
  const Layout& l = p.layout;
  Launch launch_ = {};
  launch_.params = p;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t e = tensor_map_encoder(&encode);
  if (e == cudaSuccess && tiles_of(l.walk) > 0) e = encode_phase(encode, l, p.call, 0, 0, &launch_.x);
  if (e != cudaSuccess) return e;
  int processors = 0;
  e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const int filter_tiles = filter_tiles_of(l),
            share = processors > filter_tiles ? processors / filter_tiles : 1;
  const int tiles = tiles_of(l.walk);
  const dim3 grid(static_cast<unsigned>(filter_tiles * (tiles < share ? tiles : share)));
  return with_filters(l, [&](auto n) {
    constexpr int N = decltype(n)::value;
    return launch(fprop_whole_sm90_kernel<T, N>, grid, kThreads, memory_of<N>(l).end, stream, launch_);
  });
}

}  // namespace

int fprop_whole_sm90_bytes(const Layout& l) {
  return with_filters(l, [&](auto n) { return memory_of<decltype(n)::value>(l).end; });
}

// width, tile_out: filters of a tile, 64 or 128; slab: most taps of one; pitch: bytes of a patch of 64 channels, with what
// the positions that are not stored read; of the walk tile_w: columns of y of a band, tiles_w: bands, row_h: positions from a
// tile to the next, tiles_h: tiles of a band, patch_h and patch_w: of a patch, load_h: buffers, load_w: blocks of a tile.
int fprop_whole_sm90(const Params& p, void* stream) {
  if (p.layout.dtype == DType::bf16) return launch_type<bf16>(p, stream);
  if (p.layout.dtype == DType::f16) return launch_type<f16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace sk::cuda
