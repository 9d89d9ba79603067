// What the warps of fprop_taps_sm90.cu share: its instances, its shared memory, and the order of its work.
#pragma once
#include "cuda/tiles_sm90.h"

namespace sk::cuda::fprop_taps {

constexpr int kGroups = 3;  // warpgroups that compute, 64 pixels each
constexpr int kPixels = 64 * kGroups, kWarps = 4 * kGroups, kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kLoader = 56, kComputer = 152;  // registers a thread
static_assert(kLoader + kGroups * kComputer <= 4 * 128);
constexpr int kStageBytes = 2048;  // of a warp: 64 sums of eight pixels, on their way to y

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

// What a tile is told beside its rows: how many steps, and which filters of y.
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
  m.end = m.barriers + (2 * l.slab + 4) * 8 + kSwizzleBytes;
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
  base += swizzle_padding(base);
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

// Stages of all steps, where they are the same for all items and the ring holds them; else 0.
template <class S>
__device__ inline int kept_stages(const Layout& l, const int* tables) {
  if (l.groups * l.tiles_out > 1) return 0;
  const int stages = reinterpret_cast<const Phase*>(tables + l.steps)->steps_end * (stages_of<S>(l) + 1);
  return stages <= l.slab ? stages : 0;
}

}  // namespace sk::cuda::fprop_taps
