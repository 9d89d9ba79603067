// What the binding asks the CUDA runtime, free of its headers. Error codes are cudaError_t.
#pragma once
#include <string>

namespace sk::cuda {

int device_count(int* count);
std::string error_text(int error);  // "35: CUDA driver version is insufficient ..."

}  // namespace sk::cuda
