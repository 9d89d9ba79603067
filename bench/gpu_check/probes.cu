// What decides how wide the products of fprop_sm90.cu are, one JSON object on standard output:
//
//   wgmma   multiply-adds of a processor and cycle, by columns N of an instruction, operands in shared memory
//
// Compiled and run by bench/gpu_check/probes.py. Every block times itself by its processor's clock; medians over blocks.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/swizzle.h"
#include "cuda/warpgroup.h"
#include "cuda/wgmma.h"

using namespace sk;
using namespace sk::cuda;

namespace {

constexpr int kRepeats = 256;  // of a chunk of 64 channels

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "probes: %s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}

// Values that toggle bits: a product of zeros takes less power, and so a higher clock, than a real one.
__device__ void fill(unsigned char* bytes, int count) {
  auto* words = reinterpret_cast<std::uint32_t*>(bytes);
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x)
    words[i] = (i * 2654435761u & 0x807f807fu) | 0x3f803f80u;  // bfloat16 in +-[1, 2)
}

template <int Tiles, int N>
__device__ long long multiply(unsigned char* shared, float& keep) {
  float acc[Tiles][N / 2];
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  const std::uint64_t x = matrix_descriptor(shared_address(shared));
  const std::uint64_t w = matrix_descriptor(shared_address(shared + Tiles * 64 * kRowBytes));
  const long long start = clock64();
  for (int i = 0; i < kRepeats; ++i) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int t = 0; t < Tiles; ++t)
        wgmma<bf16, N>(acc[t], x + t * (64 * kRowBytes / 16) + 2 * k, w + 2 * k, i + k);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int t = 0; t < Tiles; ++t) wgmma_keep(acc[t]);
  const long long cycles = clock64() - start;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) keep += acc[t][0] + acc[t][N / 2 - 1];
  return cycles;
}

// One warpgroup multiplies, or two.
template <int Tiles, int N, int Groups>
__global__ void __launch_bounds__(2 * kWarpgroup, 1) probe(long long* cycles, float* out) {
  unsigned char* base = shared_memory();
  base += swizzle_padding(base);
  const int operands = (Tiles * 64 + N) * kRowBytes;
  fill(base, operands);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what ordinary stores wrote
  barrier();
  const int group = threadIdx.x / kWarpgroup;
  float keep = 0.f;
  long long spent = 0;
  if (group < Groups) spent = multiply<Tiles, N>(base, keep);
  if (threadIdx.x % kWarpgroup == 0) cycles[2 * blockIdx.x + group] = spent;
  out[blockIdx.x * 2 * kWarpgroup + threadIdx.x] = keep;
}

struct Device {
  int processors;
  long long* cycles;
  float* out;
};

// Of a repeat, the slower of the warpgroups that multiply.
template <int Tiles, int N, int Groups>
double cycles_of(const Device& d) {
  const int bytes = (Tiles * 64 + N) * kRowBytes + 1024;
  const auto kernel = probe<Tiles, N, Groups>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  for (int round = 0; round < 3; ++round) {  // the last one counts
    kernel<<<d.processors, 2 * kWarpgroup, bytes>>>(d.cycles, d.out);
    check(cudaGetLastError(), "launch");
  }
  std::vector<long long> found(2 * d.processors), slower(d.processors);
  check(cudaMemcpy(found.data(), d.cycles, found.size() * sizeof(long long), cudaMemcpyDeviceToHost), "run");
  for (int i = 0; i < d.processors; ++i) slower[i] = std::max(found[2 * i], found[2 * i + 1]);
  std::nth_element(slower.begin(), slower.begin() + d.processors / 2, slower.end());
  return static_cast<double>(slower[d.processors / 2]) / kRepeats;
}

template <int Tiles, int N>
void wgmma_rate(const Device& d, bool last) {
  const double work = 64.0 * Tiles * N * 64;
  std::printf("{\"rows\": %d, \"n\": %d, \"one_group\": %.1f, \"two_groups\": %.1f}%s", 64 * Tiles, N,
              work / cycles_of<Tiles, N, 1>(d), 2 * work / cycles_of<Tiles, N, 2>(d), last ? "" : ", ");
}

}  // namespace

int main() {
  Device d = {};
  check(cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, 0), "device");
  check(cudaMalloc(&d.cycles, sizeof(long long) * 2 * d.processors), "memory");
  check(cudaMalloc(&d.out, sizeof(float) * 2 * kWarpgroup * d.processors), "memory");
  std::printf("{\"wgmma\": [");
  wgmma_rate<1, 8>(d, false), wgmma_rate<1, 16>(d, false), wgmma_rate<1, 32>(d, false);
  wgmma_rate<1, 64>(d, false), wgmma_rate<1, 96>(d, false), wgmma_rate<1, 128>(d, false);
  wgmma_rate<1, 192>(d, false), wgmma_rate<1, 256>(d, false), wgmma_rate<2, 128>(d, false);
  wgmma_rate<4, 64>(d, true);
  std::printf("]}\n");
  check(cudaDeviceSynchronize(), "run");
  return 0;
}
