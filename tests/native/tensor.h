// A small tensor for tests: exact in every format, poisoned with NaN, with a margin that must stay untouched.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/tensor.h"

namespace selftest {

using sk::DType;
using sk::TensorView;

struct Format {
  DType type;
  int digits, min_exponent;  // significant bits; exponent of the smallest normal number
  const char* name;
};
inline constexpr Format kFormats[] = {
    {DType::f32, 24, -126, "f32"}, {DType::bf16, 8, -126, "bf16"}, {DType::f16, 11, -14, "f16"}};

inline double rounded(double x, const Format& f) {
  if (x == 0) return 0;
  const int quantum = std::max(std::ilogb(x), f.min_exponent) - f.digits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(x, -quantum)), quantum);
}

inline std::uint16_t half_bits(double x) {
  if (x == 0) return 0;
  int e;
  const double m = std::frexp(std::fabs(x), &e);  // |x| = m * 2^e, m in [1/2, 1)
  return static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | (e + 14) << 10 |
                                    static_cast<int>((2 * m - 1) * 1024));
}

inline double half_value(std::uint16_t b) {
  const int e = b >> 10 & 31, m = b & 1023;
  const double v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
  return b & 0x8000 ? -v : v;
}

// A tensor [n0, n1, n2, n3] in storage of its own: every byte 0xff, a NaN in all formats; a margin behind it.
class Tensor {
 public:
  Tensor(const std::vector<int>& shape, const Format& format, bool channels_last)
      : shape_(shape), format_(format), channels_last_(channels_last) {
    const auto n = [&](int i) { return static_cast<std::int64_t>(shape[i]); };
    view_.dtype = format.type;
    const std::int64_t contiguous[] = {n(1) * n(2) * n(3), n(2) * n(3), n(3), 1};
    const std::int64_t last[] = {n(1) * n(2) * n(3), 1, n(3) * n(1), n(1)};
    std::memcpy(view_.stride, channels_last ? last : contiguous, sizeof contiguous);
    count_ = n(0) * n(1) * n(2) * n(3);
    bytes_.assign(count_ * sk::size_of(format.type) + kMargin, 0xff);
    view_.data = bytes_.data();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const TensorView& view() const { return view_; }
  void* data() { return bytes_.data(); }

  double get(int a, int b, int c, int d) const {
    const char* p = view_.at(a, b, c, d);
    std::uint32_t u = 0;
    std::memcpy(&u, p, sk::size_of(format_.type));
    if (format_.type == DType::f16) return half_value(static_cast<std::uint16_t>(u));
    if (format_.type == DType::bf16) u <<= 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  void fill(unsigned seed) {
    for (int a = 0; a < shape_[0]; ++a)
      for (int b = 0; b < shape_[1]; ++b)
        for (int c = 0; c < shape_[2]; ++c)
          for (int d = 0; d < shape_[3]; ++d)
            set(a, b, c, d, (static_cast<int>((seed = next(seed)) >> 16) % 31 - 15) / 16.0);
  }
  bool margin_untouched() const {
    for (std::size_t i = bytes_.size() - kMargin; i < bytes_.size(); ++i)
      if (bytes_[i] != 0xff) return false;
    return true;
  }
  const std::vector<int>& shape() const { return shape_; }
  const Format& format() const { return format_; }
  bool channels_last() const { return channels_last_; }
  static unsigned next(unsigned seed) { return seed * 1664525u + 1013904223u; }

 private:
  static constexpr std::size_t kMargin = 256;
  void set(int a, int b, int c, int d, double value) {
    char* p = view_.at(a, b, c, d);
    const float f = static_cast<float>(value);
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    const std::uint16_t h =
        format_.type == DType::f16 ? half_bits(value) : static_cast<std::uint16_t>(u >> 16);
    std::memcpy(p, format_.type == DType::f32 ? static_cast<const void*>(&u) : &h, sk::size_of(format_.type));
  }
  std::vector<int> shape_;
  Format format_;
  bool channels_last_;
  std::int64_t count_ = 0;
  std::vector<unsigned char> bytes_;
  TensorView view_;
};

}  // namespace selftest
