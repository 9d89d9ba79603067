// Tensor maps, and the limits the driver's encoder checks, for tests on a CPU.
#pragma once
#include <cuda_runtime.h>

using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  const unsigned char* base;
  std::uint64_t extent[5], stride[4];
  std::uint32_t box[5];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* extent, const cuuint64_t* stride,
                                       const cuuint32_t* box, const cuuint32_t* every, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  bool ok = rank == 5 && reinterpret_cast<std::uintptr_t>(base) % 16 == 0 &&
            reinterpret_cast<std::uintptr_t>(map) % 64 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
            box[0] * 2 <= 128 && box[0] * 2 % 16 == 0;
  for (int d = 0; d < 5; ++d)
    ok = ok && extent[d] >= 1 && extent[d] <= 1ull << 32 && box[d] >= 1 && box[d] <= 256 && every[d] == 1;
  for (int d = 0; d < 4; ++d) ok = ok && stride[d] % 16 == 0 && stride[d] < 1ull << 40;
  if (!ok || emulate::failing == "cuTensorMapEncodeTiled") return CUDA_ERROR_INVALID_VALUE;
  map->base = static_cast<const unsigned char*>(base);
  for (int d = 0; d < 5; ++d) map->extent[d] = extent[d], map->box[d] = box[d];
  for (int d = 0; d < 4; ++d) map->stride[d] = stride[d];
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status) {
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return *status = cudaDriverEntryPointSuccess, emulate::outcome("cudaGetDriverEntryPointByVersion");
}
