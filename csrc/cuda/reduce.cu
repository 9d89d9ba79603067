// out[i] = finish(partial[0][i] + partial[1][i] + ... + partial[splits - 1][i]), always in this order.
#include "cuda/epilogue.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Reduction r) {
  const long long stride = static_cast<long long>(gridDim.x) * kThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; i < r.count; i += stride) {
    float sum = 0.f;
    for (int s = 0; s < r.splits; ++s) sum += r.partial[s * r.count + i];
    const int k = static_cast<int>(i / r.channel_stride % r.channels);
    static_cast<T*>(r.out)[i] = finish<T>(r.finish, sum, scale_of(r.finish, k), shift_of(r.finish, k), i);
  }
}

}  // namespace

int reduce(const Reduction& r, void* stream) {
  const long long blocks = (r.count + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
  return with_type(r.dtype, [&](auto type) {
    return launch(reduce_kernel<decltype(type)>, grid, kThreads, 0, stream, r);
  });
}

}  // namespace sk::cuda
