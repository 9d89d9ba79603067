// The shared memory of fprop_sm90.cu.
#pragma once
#include "cuda/fprop_stripes/tables.h"
#include "cuda/mbarrier.h"
#include "cuda/swizzle.h"
#include "cuda/warpgroup.h"

namespace sk::cuda::fprop_stripes {

constexpr int kComputers = 2;  // warpgroups that compute; another one loads
constexpr int kThreads = (kComputers + 1) * kWarpgroup;

// x: `patches_of` times [chunk][row][64 channels]. ring: [column][64 channels] of weights, or what they add to,
// [plane][64 filters][64 columns] or [column][64 filters], with the block's record. products: [plane][row][64 columns], and a
// row of zeros behind each plane. Rows of all three are swizzled (swizzle.h). offsets: of the pixels of y. tables: a copy of
// what is read of them, where it is small: a GPU's caches are cold when a kernel begins.
struct Memory {
  int x, ring, records, products, offsets, tables, barriers, end;
};

__host__ __device__ inline int chunks_of(const Layout& l) {
  return (l.group_in + kRowChannels - 1) / kRowChannels;
}
__host__ __device__ inline int patches_of(const Layout& l) { return l.chunk; }

// Rows of a patch, and pixels of y, of the whole block: each warpgroup has Tiles times 64.
template <int Tiles>
constexpr int kRows = kComputers * Tiles * 64;
template <int Tiles>
constexpr int kPlaneBytes = (kRows<Tiles> + 1) * kRowBytes;
template <int N>
constexpr int kPlanes = (N + kRowChannels - 1) / kRowChannels;  // of 64 columns
template <int N>
constexpr int kStageBytes = N * kRowBytes;

template <int Tiles, int N>
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.x = 0;
  m.ring = patches_of(l) * chunks_of(l) * kRows<Tiles> * kRowBytes;
  m.records = m.ring + l.slab * kStageBytes<N>;
  m.products = m.records + round_up(l.slab * static_cast<int>(sizeof(Record<N>)), kRowBytes);
  m.offsets = m.products + kPlanes<N> * kPlaneBytes<Tiles>;
  m.tables = m.offsets + kRows<Tiles> * 8;
  m.barriers = m.tables + table_bytes(l);
  m.end = m.barriers + 2 * (patches_of(l) * chunks_of(l) + l.slab) * 8 + kSwizzleBytes;
  return m;
}

// A chunk of a patch, a stage of the ring: full when its copies are in, empty when it is read.
template <int N>
struct Shared {
  unsigned char *x, *ring, *products;
  Record<N>* records;
  long long* offsets;
  int* tables;
  Mbarrier *x_full, *x_empty, *full, *empty;
};

template <int Tiles, int N>
__device__ inline Shared<N> shared_of(const Layout& l) {
  const Memory m = memory_of<Tiles, N>(l);
  unsigned char* base = shared_memory();
  base += swizzle_padding(base);
  auto* barriers = reinterpret_cast<Mbarrier*>(base + m.barriers);
  const int chunks = patches_of(l) * chunks_of(l);
  return {base + m.x,
          base + m.ring,
          base + m.products,
          reinterpret_cast<Record<N>*>(base + m.records),
          reinterpret_cast<long long*>(base + m.offsets),
          reinterpret_cast<int*>(base + m.tables),
          barriers,
          barriers + chunks,
          barriers + 2 * chunks,
          barriers + 2 * chunks + l.slab};
}

__device__ inline void copy_tables(const Layout& l, const int* global, int* shared) {
  if (table_bytes(l) == 0) return;
  const int first = l.entries - l.items, all = first + l.classes - l.lists;
  for (int i = threadIdx.x; i < all; i += kThreads)
    shared[i] = global[i < first ? l.items + i : l.lists + i - first];
}

}  // namespace sk::cuda::fprop_stripes
