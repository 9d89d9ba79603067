#include "cuda/runtime.h"

#include <cuda_runtime.h>

namespace sk::cuda {

int device_count(int* count) { return cudaGetDeviceCount(count); }

std::string error_text(int error) {
  return std::to_string(error) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace sk::cuda
