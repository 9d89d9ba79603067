#include "cpu/head.h"

#include <cstring>

#include "cpu/parallel.h"

namespace sk {
namespace {

constexpr std::int64_t kWorthATeam = 1 << 18;  // multiply-adds
constexpr int kSums = 16;                      // side by side: vectors for the compiler, and less error

float total(const float (&sums)[kSums]) {
  float all = 0;
  for (float s : sums) all += s;
  return all;
}

const float* at(const TensorView& t, int n, int c, int h) {
  return reinterpret_cast<const float*>(t.at(n, c, h, 0));
}

float dot(const float* __restrict a, const float* __restrict b, int n) {
  float sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) sums[i % kSums] += a[i] * b[i];
  return total(sums);
}

}  // namespace

void average_pixels(const TensorView& x, const MapSize& size, const TensorView& y) {
  for (int n = 0; n < size.n; ++n)
    for (int c = 0; c < size.c; ++c) {
      double all = 0;  // rows may be many, and narrow
      for (int h = 0; h < size.h; ++h) {
        const float* __restrict row = at(x, n, c, h);
        float sums[kSums] = {};
        int i = 0;
        for (; i + kSums <= size.w; i += kSums)
          for (int j = 0; j < kSums; ++j) sums[j] += row[i + j];
        for (; i < size.w; ++i) sums[i % kSums] += row[i];
        all += total(sums);
      }
      *reinterpret_cast<float*>(y.at(n, c, 0, 0)) =
          static_cast<float>(all / static_cast<double>(static_cast<std::int64_t>(size.h) * size.w));
    }
}

void flatten(const TensorView& x, const MapSize& size, const TensorView& y) {
  for (int n = 0; n < size.n; ++n)
    for (int c = 0; c < size.c; ++c)
      for (int h = 0; h < size.h; ++h)
        std::memcpy(y.at(n, (c * size.h + h) * size.w, 0, 0), at(x, n, c, h),
                    sizeof(float) * static_cast<std::size_t>(size.w));
}

void linear(const TensorView& x, const float* weight, const float* bias, int images, int features,
            int outputs, const TensorView& y, int threads) {
  const bool worth = std::int64_t{images} * features * outputs >= kWorthATeam;
  run_team(worth ? threads : 1, [&](const Team& team) {
    for (int k = static_cast<int>(team.begin(outputs)); k < team.end(outputs); ++k)
      for (int n = 0; n < images; ++n)
        *reinterpret_cast<float*>(y.at(n, k, 0, 0)) =
            dot(weight + static_cast<std::int64_t>(k) * features, at(x, n, 0, 0), features) +
            (bias ? bias[k] : 0.f);
  });
}

}  // namespace sk
