// A vector of W floats in the compiler's own terms: one source, every instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SK_LANES 16
#define SK_REGISTERS 32
#elif defined(__AVX2__)
#define SK_LANES 8
#define SK_REGISTERS 16
#elif defined(__aarch64__)
#define SK_LANES 4
#define SK_REGISTERS 32
#else
#define SK_LANES 4
#define SK_REGISTERS 16
#endif

namespace {

constexpr int W = SK_LANES;

typedef float vf __attribute__((vector_size(4 * SK_LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * SK_LANES), aligned(4)));
typedef std::int32_t vi __attribute__((vector_size(4 * SK_LANES)));
typedef std::uint32_t vu __attribute__((vector_size(4 * SK_LANES)));
typedef std::uint16_t vh __attribute__((vector_size(2 * SK_LANES)));
typedef std::uint16_t vh_unaligned __attribute__((vector_size(2 * SK_LANES), aligned(2)));

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
// s - 0 is s for every s, so nothing is subtracted; 0 + s would turn -0 into 0, and the compiler would have to add.
inline vf splat(float s) { return s - vf{}; }

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const std::uint32_t u = static_cast<std::uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(f16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, exp = (x.bits >> 10) & 31u, man = x.bits & 0x3ffu;
  std::uint32_t u;
  float f;
  if (exp == 31) {
    u = sign | 0x7f800000u | (man << 13);
  } else if (exp == 0) {
    f = static_cast<float>(man) * 0x1p-24f;  // subnormal halves are normal floats
    std::memcpy(&u, &f, 4);
    u |= sign;
  } else {
    u = sign | ((exp + 112) << 23) | (man << 13);
  }
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even, as torch does; a NaN stays a (quiet) NaN.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (u < 0x38800000u) {  // subnormal half: let one float addition do the rounding
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return {static_cast<std::uint16_t>(sign | (u - 0x3f000000u))};
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | (u >> 13))};
}

inline vf load_as_float(const float* p) { return load(p); }
inline vf load_as_float(const bf16* p) {
  const vh h = *reinterpret_cast<const vh_unaligned*>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline vf load_as_float(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store_from_float(float* p, vf v) { store(p, v); }
inline vh to_bf16(vf v) {
  const vu u = (vu)v;
#if defined(__AVX512F__)
  const __m512i rounded = (__m512i)(u + ((u >> 16 & 1u) + 0x7fffu));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, (__m512i)u, _mm512_set1_epi32(0x400000));
  return (vh)_mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#else
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
#endif
}
inline void store_from_float(bf16* p, vf v) { *reinterpret_cast<vh_unaligned*>(p) = to_bf16(v); }
inline void store_from_float(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < W; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// The first n < W elements only: nothing beyond them is read or written.
template <class T>
inline void copy_first(T* dst, const T* src, std::int64_t n) {
  static_assert(W <= 16, "four bits count the elements");
  if constexpr (W > 8)
    if (n & 8) std::memcpy(dst, src, 8 * sizeof(T)), dst += 8, src += 8;
  if constexpr (W > 4)
    if (n & 4) std::memcpy(dst, src, 4 * sizeof(T)), dst += 4, src += 4;
  if (n & 2) std::memcpy(dst, src, 2 * sizeof(T)), dst += 2, src += 2;
  if (n & 1) *dst = *src;
}
template <class T>
inline vf load_first(const T* p, std::int64_t n) {
  T whole[W] = {};
  copy_first(whole, p, n);
  return load_as_float(whole);
}
template <class T>
inline void store_first(T* p, vf v, std::int64_t n) {
  T whole[W];
  store_from_float(whole, v);
  copy_first(p, whole, n);
}
#if defined(__AVX512F__)
inline __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
template <>
inline vf load_first(const float* p, std::int64_t n) {
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <>
inline void store_first(float* p, vf v, std::int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
inline vu load_lanes_of(const bf16* p, __mmask16 lanes) {
  return (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
}
template <>
inline vf load_first(const bf16* p, std::int64_t n) {
  return (vf)(load_lanes_of(p, first_lanes(n)) << 16);
}
template <>
inline void store_first(bf16* p, vf v, std::int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bf16(v));
}
#endif

}  // namespace
