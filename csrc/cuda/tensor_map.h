// Tensor maps for copy_box, encoded on the host. The driver's function is looked up when it is first needed:
// nothing links to libcuda, and the extension loads where there is no driver.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/params.h"

namespace sk::cuda {

inline cudaError_t tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)* encoder) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t e =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
  if (e != cudaSuccess) return e;
  *encoder = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  return found && status == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
}

// Boxes of 64 channels (128 bytes, swizzled) x 1 group x patch_w x patch_h x tile_n pixels of one phase of the
// stride of x, channels last: its pixel (i, j) is input pixel (first_h + i * in_step_h, first_w + j *
// in_step_w).
inline cudaError_t encode_phase(decltype(&cuTensorMapEncodeTiled) encode, const Layout& l, const Call& call,
                                int first_h, int first_w, CUtensorMap* map) {
  const Walk& w = l.walk;
  const Strides& s = call.in_strides;
  constexpr int size = 2;
  void* base =
      static_cast<unsigned char*>(const_cast<void*>(call.in)) + (first_h * s.h + first_w * s.w) * size;
  const auto phase = [](int extent, int first, int step) {
    return static_cast<cuuint64_t>((extent - first + step - 1) / step);
  };
  const cuuint64_t extents[5] = {static_cast<cuuint64_t>(l.group_in), static_cast<cuuint64_t>(l.groups),
                                 phase(w.in_w, first_w, w.in_step_w), phase(w.in_h, first_h, w.in_step_h),
                                 static_cast<cuuint64_t>(w.images)};
  const cuuint64_t strides[4] = {
      static_cast<cuuint64_t>(l.group_in) * size, static_cast<cuuint64_t>(s.w * w.in_step_w) * size,
      static_cast<cuuint64_t>(s.h * w.in_step_h) * size, static_cast<cuuint64_t>(s.n) * size};
  const cuuint32_t box[5] = {64, 1, static_cast<cuuint32_t>(w.patch_w), static_cast<cuuint32_t>(w.patch_h),
                             static_cast<cuuint32_t>(w.tile_n)};
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, l.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             5, base, extents, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Boxes of 64 columns (128 bytes, swizzled) x `box` rows of a matrix of 16-bit values, row by row without gaps.
inline cudaError_t encode_matrix(decltype(&cuTensorMapEncodeTiled) encode, DType dtype, const void* values,
                                 int rows, int columns, int box, CUtensorMap* map) {
  const cuuint64_t extents[5] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), 1, 1, 1};
  const cuuint64_t row = static_cast<cuuint64_t>(columns) * 2, all = row * static_cast<cuuint64_t>(rows);
  const cuuint64_t strides[4] = {row, all, all, all};
  const cuuint32_t boxes[5] = {64, static_cast<cuuint32_t>(box), 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
      const_cast<void*>(values), extents, strides, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sk::cuda
