// What the warps of dgrad_sm90.cu share: its tables, its shared memory, and the order of its work.
#pragma once
#include "cuda/gathered.h"
#include "cuda/tiles_sm90.h"

namespace sk::cuda::dgrad_gather {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kLoader = 72, kComputer = 216;  // registers a thread
static_assert(kLoader + 2 * kComputer <= kTradedRegisters);
constexpr int kPixels = 128;         // of a tile
constexpr int kStripes = kGathered;  // of a step

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

// Bytes between pixels that wait to be stored: eight begin in different banks.
template <int N>
constexpr int kStagePitch = N * 2 + 16;

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
  m.end = m.barriers + (2 * l.slab + 4) * 8 + kSwizzleBytes;
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
  base += swizzle_padding(base);
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

}  // namespace sk::cuda::dgrad_gather
