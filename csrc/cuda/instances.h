// From what a launch is told at run time to template arguments: which instance of a kernel it takes.
#pragma once
#include <cuda_runtime.h>

#include "core/tensor.h"
#include "cuda/instructions.h"

namespace sk::cuda {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls with(T()) of the type of the values.
template <class With>
int with_type(DType dtype, const With& with) {
  switch (dtype) {
    case DType::f32:
      return with(float());
    case DType::bf16:
      return with(bf16());
    case DType::f16:
      return with(f16());
  }
  return cudaErrorInvalidValue;
}

// The same of kernels that have no float32.
template <class With>
int with_type_of_16_bits(DType dtype, const With& with) {
  if (dtype == DType::bf16) return with(bf16());
  if (dtype == DType::f16) return with(f16());
  return cudaErrorInvalidValue;
}

// Calls with(Constant<N>()) of the N among those listed that `value` is, of the last where it is none: a kernel's tables
// were refused then (bindings/cuda_check.h).
template <int First, int... Others, class With>
int with_constant(int value, const With& with) {
  if constexpr (sizeof...(Others) > 0)
    if (value != First) return with_constant<Others...>(value, with);
  return with(Constant<First>());
}

}  // namespace sk::cuda
