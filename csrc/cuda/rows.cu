// out[i] = values[row[i]], row by row of 16-byte pieces; zeros where row[i] < 0.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rows_kernel(RowCopy r) {
  const long long stride = static_cast<long long>(gridDim.x) * kThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; i < r.count * r.pieces;
       i += stride) {
    const int row = r.row[i / r.pieces];
    const auto* values = static_cast<const uint4*>(r.values);
    static_cast<uint4*>(r.out)[i] = row < 0 ? uint4{0, 0, 0, 0} : values[row * r.pieces + i % r.pieces];
  }
}

}  // namespace

int copy_rows(const RowCopy& r, void* stream) {
  const long long blocks = (r.count * r.pieces + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
  return launch(rows_kernel, grid, kThreads, 0, stream, r);
}

}  // namespace sk::cuda
