// y = activation(sum * scale[k] + shift[k] + residual), NaN kept where torch keeps it.
#pragma once
#include "cuda/instructions.h"
#include "cuda/params.h"

namespace sk::cuda {

template <Activation A>
struct Always {
  static constexpr Activation value = A;
};

__device__ inline float activate(float x, Activation a) {
  switch (a) {
    case Activation::relu:
      return x < 0.f ? 0.f : x;
    case Activation::relu6:
      return x < 0.f ? 0.f : (x > 6.f ? 6.f : x);
    case Activation::silu:
      return x / (1.f + exponential(-x));
    case Activation::hardswish: {
      const float t = x + 3.f;
      return x * (t < 0.f ? 0.f : (t > 6.f ? 6.f : t)) / 6.f;
    }
    case Activation::none:
      break;
  }
  return x;
}

// One branch for all of them: a branch a value costs more than all else of an epilogue.
template <int Rows, int Columns>
__device__ inline void activate(float (&x)[Rows][Columns], Activation a) {
  const auto each = [&](auto activation) {
#pragma unroll
    for (auto& row : x)
#pragma unroll
      for (float& value : row) value = activate(value, decltype(activation)::value);
  };
  switch (a) {
    case Activation::relu:
      return each(Always<Activation::relu>());
    case Activation::relu6:
      return each(Always<Activation::relu6>());
    case Activation::silu:
      return each(Always<Activation::silu>());
    case Activation::hardswish:
      return each(Always<Activation::hardswish>());
    case Activation::none:
      break;
  }
}

template <class T>
__device__ inline T finish(const Finish& f, float sum, float scale, float shift, long long offset) {
  float y = sum * scale + shift;
  if (f.residual) y += widen(static_cast<const T*>(f.residual)[offset]);
  T out;
  narrow(activate(y, f.activation), out);
  return out;
}

__device__ inline float scale_of(const Finish& f, int k) { return f.scale ? f.scale[k] : 1.f; }
__device__ inline float shift_of(const Finish& f, int k) { return f.shift ? f.shift[k] : 0.f; }

// Stores one sum as it is, or as this split's share of it.
template <class T>
__device__ inline void store_sum(const Call& call, int split, long long offset, float sum) {
  if (call.partial)
    call.partial[split * call.out_count + offset] = sum;
  else
    narrow(sum, static_cast<T*>(call.out)[offset]);
}

// The same, finished. Not for unrolled loops: every copy of the activations costs seconds of compilation.
template <class T>
__device__ inline void store(const Call& call, int split, int k, long long offset, float sum) {
  const Finish& f = call.finish;
  if (call.partial)
    store_sum<T>(call, split, offset, sum);
  else
    static_cast<T*>(call.out)[offset] = finish<T>(f, sum, scale_of(f, k), shift_of(f, k), offset);
}

}  // namespace sk::cuda
