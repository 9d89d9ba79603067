// Views of memory that belongs to somebody else, in the letters of the design: x [N,C,H,W], y [N,K,P,Q].
#pragma once
#include <cstddef>
#include <cstdint>

namespace sk {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline std::size_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

constexpr std::int64_t kUnpaired = INT64_MIN;

// A 4-d tensor in NCHW order of its strides (in elements), whatever its memory format.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride[4] = {0, 0, 0, 0};
  // Unless kUnpaired, channel c of this view is two bfloat16 channels, at c and this many elements further; see paired().
  std::int64_t pair = kUnpaired;

  char* at(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w) const {
    const std::int64_t offset = n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
    return static_cast<char*>(data) + offset * static_cast<std::int64_t>(size_of(dtype));
  }
};

// The view of a bfloat16 tensor with an even number of channels whose elements are two neighbouring channels each, to be
// moved as one 32-bit cell: the first in the low half.
inline TensorView paired(TensorView t) {
  const std::int64_t between = t.stride[1];
  t.stride[1] *= 2;
  if (between != 1 || t.stride[0] % 2 != 0 || t.stride[2] % 2 != 0 || t.stride[3] % 2 != 0) {
    t.pair = between;
  } else {  // channels_last: the cells lie in memory as they are
    t.dtype = DType::f32;
    for (std::int64_t& s : t.stride) s /= 2;
  }
  return t;
}

enum class Activation : int { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4 };

// y = activation(acc * scale[k] + shift[k] + residual); a null pointer leaves its term out.
struct Epilogue {
  const float* scale = nullptr;  // [K]
  const float* shift = nullptr;  // [K]
  TensorView residual;           // [N,K,P,Q]; data null when absent
  Activation activation = Activation::none;

  bool empty() const { return !scale && !shift && !residual.data && activation == Activation::none; }
};

}  // namespace sk
