// What the warps of wgrad_sm90.cu share: its instances, its tables, its shared memory, and a block's share of the work.
#pragma once
#include "cuda/gathered.h"
#include "cuda/tiles_sm90.h"

namespace sk::cuda::wgrad_gather {

constexpr int kGroups = 3;  // warpgroups that compute
constexpr int kThreads = (kGroups + 1) * kWarpgroup, kFirstFetcher = kThreads - kFetchers;
constexpr int kLoader = 56, kComputer = 152;  // registers a thread
static_assert(kLoader + kGroups * kComputer <= 4 * 128);

// An instance: channels of a block, and pixels of a tile.
template <int N_, int Pixels_>
struct Shape {
  static constexpr int N = N_, Pixels = Pixels_;
  static constexpr int Steps = Pixels / kGathered;
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
  m.end = m.barriers + 2 * stages * 8 + kSwizzleBytes;
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
  base += swizzle_padding(base);
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

}  // namespace sk::cuda::wgrad_gather
