// Tensor maps for copy_box, encoded on the host: values of 16 bits, in boxes whose rows are 128 bytes, swizzled (swizzle.h).
// The driver's function is looked up when it is first needed: nothing links to libcuda, and the extension loads where there
// is no driver.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/params.h"
#include "cuda/swizzle.h"

namespace sk::cuda {

// The maps of one launch.
class TensorMaps {
 public:
  TensorMaps() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    error_ =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error_ != cudaSuccess) return;
    encode_ = reinterpret_cast<decltype(encode_)>(found);
    if (!found || status != cudaDriverEntryPointSuccess) error_ = cudaErrorNotSupported;
  }

  // Of the first map that could not be encoded.
  cudaError_t error() const { return error_; }

  // Boxes of 64 channels x 1 group x patch_w x patch_h x tile_n pixels of one phase of the stride of x, channels last: its
  // pixel (i, j) is input pixel (first_h + i * in_step_h, first_w + j * in_step_w).
  void phase(const Layout& l, const Call& call, int first_h, int first_w, CUtensorMap* map) {
    const Walk& w = l.walk;
    const Strides& s = call.in_strides;
    const auto extent = [](int all, int first, int step) { return wide((all - first + step - 1) / step); };
    const cuuint64_t extents[5] = {wide(l.group_in), wide(l.groups), extent(w.in_w, first_w, w.in_step_w),
                                   extent(w.in_h, first_h, w.in_step_h), wide(w.images)};
    const cuuint64_t strides[4] = {wide(l.group_in) * kSize, wide(s.w * w.in_step_w) * kSize,
                                   wide(s.h * w.in_step_h) * kSize, wide(s.n) * kSize};
    const cuuint32_t box[5] = {kRowChannels, 1, static_cast<cuuint32_t>(w.patch_w),
                               static_cast<cuuint32_t>(w.patch_h), static_cast<cuuint32_t>(w.tile_n)};
    const auto* base = static_cast<const unsigned char*>(call.in) + (first_h * s.h + first_w * s.w) * kSize;
    encode(l.dtype, base, extents, strides, box, map);
  }

  // Boxes of 64 columns x `box` rows of a matrix, row by row without gaps.
  void matrix(DType dtype, const void* values, int rows, int columns, int box, CUtensorMap* map) {
    const cuuint64_t extents[5] = {wide(columns), wide(rows), 1, 1, 1};
    const cuuint64_t row = wide(columns) * kSize, all = row * wide(rows);
    const cuuint64_t strides[4] = {row, all, all, all};
    const cuuint32_t boxes[5] = {kRowChannels, static_cast<cuuint32_t>(box), 1, 1, 1};
    encode(dtype, values, extents, strides, boxes, map);
  }

 private:
  static constexpr int kSize = 2;  // bytes of a value

  static cuuint64_t wide(long long size) { return static_cast<cuuint64_t>(size); }

  void encode(DType dtype, const void* base, const cuuint64_t (&extents)[5], const cuuint64_t (&strides)[4],
              const cuuint32_t (&box)[5], CUtensorMap* map) {
    if (error_ != cudaSuccess) return;
    constexpr cuuint32_t kEvery[5] = {1, 1, 1, 1, 1};
    const auto type =
        dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result = encode_(map, type, 5, const_cast<void*>(base), extents, strides, box, kEvery,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) error_ = cudaErrorInvalidValue;
  }

  decltype(&cuTensorMapEncodeTiled) encode_ = nullptr;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace sk::cuda
