// What decides whether fprop_sm90.cu pays, one JSON object on standard output:
//
//   wgmma   multiply-adds of a processor and cycle, by columns N of an instruction, operands in shared memory
//   merge   values a processor and cycle that merge() of that kernel adds to sums in shared memory
//   both    the two side by side, as in the kernel: cycles of each, over its cycles alone
//
// Compiled and run by bench/gpu_check/probes.py. Every block times itself by its processor's clock; medians over blocks.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/merge_sm90.h"
#include "cuda/wgmma.h"

using namespace sk;
using namespace sk::cuda;

namespace {

constexpr int kRepeats = 256;   // of a chunk of 64 channels
constexpr int kPitch = 68;      // sums of 64 filters
constexpr int kGrid = 16 * 16;  // pixels of the patch

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "probes: %s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}

Layout layout() {
  Layout l = {};
  l.walk.tile_n = 1, l.walk.tile_h = l.walk.tile_w = 14, l.walk.patch_h = l.walk.patch_w = 16;
  l.pitch = kPitch;
  return l;
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

template <int Tiles, int N>
__device__ long long merge_many(const Layout& l, const int* shifts, float* sums, int group, float& keep) {
  float acc[Tiles][N / 2];
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[t][i] = static_cast<float>(threadIdx.x + i);
  const long long start = clock64();
  for (int i = 0; i < kRepeats / 8; ++i) merge<Tiles, N>(l, acc, shifts, N / kRound, sums, group);
  const long long cycles = clock64() - start;
  keep += sums[threadIdx.x];
  return cycles;
}

// What the first and the second warpgroup do: 0 nothing, 1 multiply, 2 merge.
template <int Tiles, int N, int First, int Second>
__global__ void __launch_bounds__(2 * kWarpgroup, 1)
    probe(Layout l, const int* shifts, long long* cycles, float* out) {
  unsigned char* base = shared_memory();
  base += -shared_address(base) & 1023;
  const int operands = (Tiles * 64 + N) * kRowBytes;
  fill(base, operands);
  auto* sums = reinterpret_cast<float*>(base + operands);
  for (int i = threadIdx.x; i < kGrid * kPitch + kWarpgroup; i += blockDim.x) sums[i] = 0.f;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what ordinary stores wrote
  barrier();
  const int group = threadIdx.x / kWarpgroup, what = group == 0 ? First : Second;
  float keep = 0.f;
  long long spent = 0;
  if (what == 1) spent = multiply<Tiles, N>(base, keep);
  if (what == 2) spent = merge_many<Tiles, N>(l, shifts, sums, group, keep);
  if (threadIdx.x % kWarpgroup == 0) cycles[2 * blockIdx.x + group] = spent;
  out[blockIdx.x * 2 * kWarpgroup + threadIdx.x] = keep;
}

struct Cycles {
  double first, second;  // of a repeat
};

struct Device {
  int processors;
  int* shifts;
  long long* cycles;
  float* out;
};

template <int Tiles, int N, int First, int Second>
Cycles measure(const Device& d) {
  const int bytes = (Tiles * 64 + N) * kRowBytes + (kGrid * kPitch + kWarpgroup) * 4 + 1024;
  const auto kernel = probe<Tiles, N, First, Second>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  for (int round = 0; round < 3; ++round) {  // the last one counts
    kernel<<<d.processors, 2 * kWarpgroup, bytes>>>(layout(), d.shifts, d.cycles, d.out);
    check(cudaGetLastError(), "launch");
  }
  std::vector<long long> found(2 * d.processors);
  check(cudaMemcpy(found.data(), d.cycles, found.size() * sizeof(long long), cudaMemcpyDeviceToHost), "run");
  std::vector<long long> side[2];
  for (int i = 0; i < 2 * d.processors; ++i) side[i % 2].push_back(found[i]);
  double median[2];
  for (int g = 0; g < 2; ++g) {
    std::nth_element(side[g].begin(), side[g].begin() + d.processors / 2, side[g].end());
    median[g] = static_cast<double>(side[g][d.processors / 2]);
  }
  const auto repeats = [](int what) { return what == 2 ? kRepeats / 8 : kRepeats; };
  return {median[0] / repeats(First), median[1] / repeats(Second)};
}

template <int Tiles, int N>
void wgmma_rate(const Device& d, bool last) {
  const double work = 64.0 * Tiles * N * 64;
  const Cycles one = measure<Tiles, N, 1, 0>(d), two = measure<Tiles, N, 1, 1>(d);
  std::printf("{\"rows\": %d, \"n\": %d, \"one_group\": %.1f, \"two_groups\": %.1f}%s", 64 * Tiles, N,
              work / one.first, 2 * work / std::max(two.first, two.second), last ? "" : ", ");
}

template <int Tiles, int N>
void merge_rate(const Device& d, bool last) {
  const double values = 64.0 * Tiles * N;
  const Cycles alone = measure<Tiles, N, 2, 0>(d), math = measure<Tiles, N, 1, 0>(d),
               both = measure<Tiles, N, 1, 2>(d);
  std::printf("{\"rows\": %d, \"n\": %d, \"merge\": %.2f, \"wgmma_slowed\": %.3f, \"merge_slowed\": %.3f}%s",
              64 * Tiles, N, values / alone.first, both.first / math.first, both.second / alone.first,
              last ? "" : ", ");
}

}  // namespace

int main() {
  Device d = {};
  check(cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, 0), "device");
  // A 3x3 filter's taps, filters that differ in a round, banks that differ in four lanes.
  std::vector<int> shifts(256);
  for (int i = 0; i < 256; ++i) {
    const int tap = i * 7 % 9, filter = i % 32 / 8 * 8 + i % 8 / 2 + i % 2 * 4 + i / 32 % 2 * 32;
    shifts[i] = (tap / 3 * 16 + tap % 3) * kPitch - filter;
  }
  check(cudaMalloc(&d.shifts, sizeof(int) * 256), "memory");
  check(cudaMalloc(&d.cycles, sizeof(long long) * 2 * d.processors), "memory");
  check(cudaMalloc(&d.out, sizeof(float) * 2 * kWarpgroup * d.processors), "memory");
  check(cudaMemcpy(d.shifts, shifts.data(), sizeof(int) * 256, cudaMemcpyHostToDevice), "copy");
  std::printf("{\"wgmma\": [");
  wgmma_rate<1, 8>(d, false), wgmma_rate<1, 16>(d, false), wgmma_rate<1, 32>(d, false);
  wgmma_rate<1, 64>(d, false), wgmma_rate<1, 96>(d, false), wgmma_rate<1, 128>(d, false);
  wgmma_rate<1, 192>(d, false), wgmma_rate<1, 256>(d, false), wgmma_rate<2, 128>(d, false);
  wgmma_rate<4, 64>(d, true);
  std::printf("], \"merge\": [");
  merge_rate<1, 128>(d, false), merge_rate<2, 128>(d, false), merge_rate<4, 64>(d, false),
      merge_rate<1, 256>(d, true);
  std::printf("]}\n");
  check(cudaDeviceSynchronize(), "run");
  return 0;
}
