// What csrc/cuda/wgmma.h is on a GPU, on a CPU; descriptors are read bit by bit, as the PTX manual lays them out. A
// warp computes its own 16 rows: like on a GPU, these instructions do not make the warps of a warpgroup meet.
#pragma once
#include <utility>

#include "cuda/instructions.h"
#include "cuda/matrix_descriptor.h"

namespace sk::cuda {

// Value k of row r of the matrix a descriptor names.
template <class T>
float described(std::uint64_t descriptor, int r, int k) {
  const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const std::uint32_t start = field(0), leading = field(16), eight_rows = field(32);
  std::uint32_t address;
  if (descriptor >> 49 & 7) emulate::fail("base offsets of matrix descriptors are not emulated");
  switch (descriptor >> 62) {
    case 0:
      address = start + r / 8 * eight_rows + k / 8 * leading + r % 8 * 16 + k % 8 * 2;
      break;
    case 1:
      address = start + r / 8 * eight_rows + r % 8 * 128 + 2 * k;
      address ^= address >> 3 & 0x70;
      break;
    default:
      emulate::fail("this swizzle of matrix descriptors is not emulated");
  }
  T value;
  std::memcpy(&value, emulate::at_address(address, 2), 2);
  return widen(value);
}

// Value k of column n of a matrix whose rows run along K, in parts of 64 columns.
template <class T>
float described_column(std::uint64_t descriptor, int n, int k) {
  const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) emulate::fail("this swizzle of matrix descriptors is not emulated");
  std::uint32_t address = field(0) + n / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + n % 64 * 2;
  address ^= address >> 3 & 0x70;
  T value;
  std::memcpy(&value, emulate::at_address(address, 2), 2);
  return widen(value);
}

template <class T, int N, bool Registers, bool Columns>
void multiply_warp(float* const* d, const std::uint32_t* const* registers, const emulate::Product& p,
                   int warp) {
  static float b[N][16];
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < 16; ++k) b[n][k] = Columns ? described_column<T>(p.b, n, k) : described<T>(p.b, n, k);
  for (int row = 0; row < 16; ++row) {
    float a[16];
    for (int k = 0; k < 16; ++k)
      if constexpr (Registers)
        a[k] = widen(T{static_cast<std::uint16_t>(registers[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8] >>
                                                  16 * (k % 2))});
      else
        a[k] = described<T>(p.a, warp * 16 + row, k);
    for (int n = 0; n < N; ++n) {
      float& to = d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
      float sum = p.accumulate ? to : 0.f;
      for (int k = 0; k < 16; ++k) sum += a[k] * b[n][k];
      to = sum;
    }
  }
}

// The warp meets, as its instructions want; products of groups before `end` are done for all its lanes.
inline void finish_products(int end) {
  const int warp = emulate::block.running / 32;
  emulate::meet(emulate::block.warps[warp].meeting, 32, [&] {
    emulate::Fiber* lanes = &emulate::block.fibers[warp * 32];
    while (!lanes[0].products.empty() && lanes[0].products.front().group < end) {
      const emulate::Product first = lanes[0].products.front();
      float* d[32];
      const std::uint32_t* registers[32];
      for (int l = 0; l < 32; ++l) {
        if (lanes[l].products.empty()) emulate::fail("the lanes of a warp issue different products");
        const emulate::Product mine = lanes[l].products.front();
        if (mine.a != first.a || mine.b != first.b || mine.accumulate != first.accumulate ||
            mine.group != first.group)
          emulate::fail("the lanes of a warp issue different products");
        d[l] = mine.d, registers[l] = mine.registers;
        lanes[l].products.erase(lanes[l].products.begin());
      }
      first.run(d, registers, first, warp % 4);
    }
  });
}

inline void wgmma_fence() {}

inline void wgmma_commit() { ++emulate::block.fibers[emulate::block.running].groups; }

template <int Pending>
void wgmma_wait() {
  finish_products(emulate::block.fibers[emulate::block.running].groups - Pending);
}

template <int Count>
void wgmma_keep(float (&)[Count]) {}

inline void issue(const emulate::Product& product) {
  emulate::Fiber& mine = emulate::block.fibers[emulate::block.running];
  mine.products.push_back(product);
  if (emulate::block.running % 32 == 0) {
    std::uint64_t& digest = emulate::block.warps[emulate::block.running / 32].products;
    for (std::uint64_t v : {product.a, product.b, static_cast<std::uint64_t>(product.accumulate)})
      digest = digest * 1099511628211u + v + 1;
  }
  if (!emulate::late) finish_products(mine.groups + 1);
}

template <class T, int N>
void wgmma(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int accumulate) {
  issue({d, nullptr, a, b, accumulate != 0, emulate::block.fibers[emulate::block.running].groups,
         multiply_warp<T, N, false, false>});
}

template <class T, int N, bool Columns>
void wgmma_registers(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b, int accumulate) {
  issue({d, a, 0, b, accumulate != 0, emulate::block.fibers[emulate::block.running].groups,
         multiply_warp<T, N, true, Columns>});
}

}  // namespace sk::cuda
