// What csrc/cuda/instructions.h is on a GPU, on a CPU; the layouts of fragments are those of the PTX manual.
#pragma once
#include <cuda_runtime.h>

namespace sk::cuda {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float as_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline std::uint32_t as_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return as_float(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const int e = x.bits >> 10 & 31, m = x.bits & 1023;
  const float v = e == 31 ? (m ? NAN : INFINITY)
                  : e     ? std::ldexp(1024.f + m, e - 25)
                          : std::ldexp(float(m), -24);
  return x.bits & 0x8000 ? -v : v;
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bf16& y) {
  const std::uint32_t u = as_bits(x);
  y.bits = std::isnan(x) ? 0x7fff : static_cast<std::uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16& y) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (std::isnan(x)) {
    y.bits = 0x7fff;
  } else if (a >= 65520.f) {
    y.bits = sign | 0x7c00;
  } else if (a < 0x1p-14f) {
    y.bits = sign | static_cast<std::uint16_t>(std::nearbyint(a * 0x1p24f));
  } else {
    int e;
    std::frexp(
        a,
        &e);  // a = m * 2^e, m in [1/2, 1); a rounding up to the next power of two carries into the exponent
    y.bits = sign | static_cast<std::uint16_t>(((e + 13) << 10) +
                                               static_cast<int>(std::nearbyint(std::ldexp(a, 11 - e))));
  }
}

inline std::uint32_t to_tf32(std::uint32_t x) { return (x + 0x1000) & ~0x1fffu; }

inline float exponential(float x) { return std::exp(x); }
using std::fmaf;

inline unsigned char* shared_memory() { return emulate::block.shared.data(); }
inline std::uint32_t shared_address(const void* p) { return emulate::address_of(p); }

inline int uniform(int x) { return x; }

inline int fresh_thread() { return static_cast<int>(threadIdx.x); }

inline void prefetch(const void* p) {
  volatile char value = *static_cast<const char*>(p);  // an address sanitizer sees it
  (void)value;
}

inline void barrier() {
  emulate::meet(emulate::block.meeting, static_cast<int>(blockDim.x), [] {});
}

template <int Bytes>
void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(to) % Bytes || reinterpret_cast<std::uintptr_t>(from) % Bytes) {
    std::fprintf(stderr, "emulate: copy_async of %d bytes is not aligned\n", Bytes);
    std::abort();
  }
  emulate::block.fibers[emulate::block.running].copies.push_back({to, valid ? from : nullptr, Bytes});
}

inline void copies_commit() {}

inline void copies_wait() {
  auto& copies = emulate::block.fibers[emulate::block.running].copies;
  for (const emulate::Copy& c : copies)
    c.from ? std::memcpy(c.to, c.from, c.bytes) : std::memset(c.to, 0, c.bytes);
  copies.clear();
}

struct Words {
  std::uint32_t word[4];
};

inline std::uint16_t half_at(const void* row, int i) {
  std::uint16_t v;
  std::memcpy(&v, static_cast<const char*>(row) + 2 * i, 2);
  return v;
}

template <bool Transposed>
void load_matrices_(std::uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) {
    std::fprintf(stderr, "emulate: a row of ldmatrix is not aligned\n");
    std::abort();
  }
  const Words out =
      emulate::warp_instruction<const void*, Words>(row, [](const void* const* rows, Words* all) {
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            const int g = l / 4, t = 2 * (l % 4);
            const std::uint32_t low = Transposed ? half_at(rows[8 * i + t], g) : half_at(rows[8 * i + g], t);
            const std::uint32_t high =
                Transposed ? half_at(rows[8 * i + t + 1], g) : half_at(rows[8 * i + g], t + 1);
            all[l].word[i] = low | high << 16;
          }
      });
  std::memcpy(r, out.word, sizeof r);
}
inline void load_matrices(std::uint32_t (&r)[4], const void* row) { load_matrices_<false>(r, row); }
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) { load_matrices_<true>(r, row); }

struct Row {
  void* at;
  std::uint32_t word[4];
};

template <bool Transposed>
void store_matrices_(void* row, const std::uint32_t (&r)[4]) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) {
    std::fprintf(stderr, "emulate: a row of stmatrix is not aligned\n");
    std::abort();
  }
  Row mine{row, {}};
  std::memcpy(mine.word, r, sizeof r);
  emulate::warp_instruction<Row, Words>(mine, [](const Row* lanes, Words*) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
          const auto value = static_cast<std::uint16_t>(lanes[l].word[i] >> 16 * half);
          const int g = l / 4, t = 2 * (l % 4) + half, to = Transposed ? t : g, at = Transposed ? g : t;
          std::memcpy(static_cast<char*>(lanes[8 * i + to].at) + 2 * at, &value, 2);
        }
  });
}
inline void store_matrices(void* row, const std::uint32_t (&r)[4]) { store_matrices_<false>(row, r); }
inline void store_matrices_transposed(void* row, const std::uint32_t (&r)[4]) {
  store_matrices_<true>(row, r);
}

template <class T>
std::uint32_t pack(float first, float second) {
  T low, high;
  narrow(first, low), narrow(second, high);
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}

// The values of one 4-byte word of k: two of 16 bits, or one tf32.
template <class T>
inline int values(std::uint32_t word, float (&v)[2]) {
  if constexpr (sizeof(T) == 4) {
    v[0] = as_float(word & ~0x1fffu);
    return 1;
  } else {
    v[0] = widen(T{static_cast<std::uint16_t>(word)}),
    v[1] = widen(T{static_cast<std::uint16_t>(word >> 16)});
    return 2;
  }
}

struct MmaOperands {
  float c[4];
  std::uint32_t a[4], b[2];
};
struct MmaSums {
  float c[4];
};

template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  MmaOperands in;
  std::memcpy(in.c, c, sizeof c), std::memcpy(in.a, a, sizeof a), std::memcpy(in.b, b, sizeof b);
  const MmaSums out =
      emulate::warp_instruction<MmaOperands, MmaSums>(in, [](const MmaOperands* lanes, MmaSums* all) {
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4, column = 2 * (l % 4) + i % 2;
            float sum = lanes[l].c[i];
            for (int word = 0; word < 8; ++word) {  // word of k: lane t of either half
              float x[2], w[2];
              const int n = values<T>(lanes[4 * row + word % 4].a[i / 2 + word / 4 * 2], x);
              values<T>(lanes[4 * column + word % 4].b[word / 4], w);
              for (int v = 0; v < n; ++v) sum += x[v] * w[v];
            }
            all[l].c[i] = sum;
          }
      });
  std::memcpy(c, out.c, sizeof c);
}

}  // namespace sk::cuda
