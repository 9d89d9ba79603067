// Starts a kernel on a stream and returns what the runtime says of it. Nothing is allocated and nobody waits,
// so launches may be captured into a CUDA graph.
#pragma once
#include <cuda_runtime.h>

namespace sk::cuda {

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void* stream,
                   const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  // 48 KiB need no permission. The permission belongs to the current device, so it is asked for on every
  // launch.
  if (shared_bytes > 48 * 1024) {
    const auto function = reinterpret_cast<const void*>(kernel);
    const cudaError_t e =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t e = cudaLaunchKernelEx(&config, kernel, params);
  return e != cudaSuccess ? e : cudaGetLastError();
}

// Of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device;
  const cudaError_t e = cudaGetDevice(&device);
  return e != cudaSuccess ? e : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Of a kernel whose blocks go from item to item: as many as there are multiprocessors, at most one an item.
template <class Params>
cudaError_t launch_persistent(void (*kernel)(Params), long long items, int threads, int shared_bytes,
                              void* stream, const Params& params) {
  int processors = 0;
  const cudaError_t e = multiprocessors(&processors);
  if (e != cudaSuccess) return e;
  const dim3 grid(static_cast<unsigned>(items < processors ? items : processors));
  return launch(kernel, grid, threads, shared_bytes, stream, params);
}

}  // namespace sk::cuda
