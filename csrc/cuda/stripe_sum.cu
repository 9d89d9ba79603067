// y[n,k,p,q] = finish( sum over the rows a of filter k:  z[a][(n, p + i_a, q + j_a)] )
//
// What follows the product of all stripes at once (backends/gemm.py): row a of z holds the products of one stripe, pixel
// after pixel of the phase of the stride that its tap meets. Lanes are pixels, so that a row is read as it lies, and a
// warp walks through the rows of its filters, four at a time: sixteen loads of every lane are under way at once, where
// one after the other would wait for a cache each time. Sums wait in shared memory for their neighbours in y; a sum has
// one order, so bits repeat. backends/cuda_stripe_gemm.py lists the rows.
#include "cuda/epilogue.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/walk.h"

namespace sk::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kAtOnce = 4;             // pixels of a lane, and rows that are loaded together
constexpr int kPixels = 32 * kAtOnce;  // of a block
constexpr int kPitch = kPixels + 1;    // words from a filter's sums to the next filter's

// How a row finds its pixels.
enum class Map {
  same,    // one map, as large as y's: every pixel lies at its own number and the tap's jump
  single,  // one map
  phases,  // maps of different sizes, or more taps than a word has bits
};

struct Pixel {
  int at;            // of the map; of several, the image
  unsigned met;      // a bit for every tap that meets the map here; of several, the row and the column
  long long offset;  // of y; -1 where there is none
};
struct alignas(16) MapOf {
  int i, j, rows, columns;
};
struct alignas(16) Row {
  int row, tap;  // tap: its bit, or its number among the maps
  int jump;      // of the map
  int slot;      // filter within the warp; its complement where a sum begins
};
using Rows = Row[kAtOnce];

__device__ inline bool within(int i, int size) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

template <Map M>
__device__ inline Pixel pixel_of(const StripeSum& t, unsigned m) {
  const unsigned line = m / t.out_w;
  const int n = line / t.out_h, p = line % t.out_h, q = m % t.out_w;
  const bool exists = n < t.images;
  const Strides& s = t.out_strides;
  Pixel pixel = {n, static_cast<unsigned>(p) << 16 | q, exists ? n * s.n + p * s.h + q * s.w : -1};
  if (M != Map::phases) {
    pixel.at = (n * t.map_h + p) * t.map_w + q;
    pixel.met = 0;
    for (int i = 0; exists && i < t.shift_count; ++i)
      if (within(p + t.shifts[i].i, t.map_h) && within(q + t.shifts[i].j, t.map_w)) pixel.met |= 1u << i;
  }
  return pixel;
}

__device__ inline void load_rows(const Row* from, Rows& rows) {
#pragma unroll
  for (int e = 0; e < kAtOnce; ++e) rows[e] = from[e];
}

// Values of those rows at the lane's pixels, zeros where the tap lies beside the map.
template <class T, Map M>
__device__ inline void load_values(const StripeSum& t, const Rows& rows, const Pixel (&pixels)[kAtOnce],
                                   T (&values)[kAtOnce][kAtOnce]) {
#pragma unroll
  for (int e = 0; e < kAtOnce; ++e) {
    const T* from = static_cast<const T*>(t.z) + static_cast<long long>(rows[e].row) * t.pitch;
    if constexpr (M == Map::phases) {
      const MapOf map = reinterpret_cast<const MapOf*>(t.tables + t.maps)[rows[e].tap];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int p = static_cast<int>(pixels[i].met >> 16) + map.i,
                  q = static_cast<int>(pixels[i].met & 0xffff) + map.j;
        const bool met =
            pixels[i].offset >= 0 && rows[e].row >= 0 && within(p, map.rows) && within(q, map.columns);
        values[e][i] =
            met ? from[(static_cast<long long>(pixels[i].at) * map.rows + p) * map.columns + q] : T{};
      }
    } else {
      from += rows[e].jump;
      if constexpr (M == Map::same) from += pixels[0].at;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        values[e][i] = pixels[i].met & rows[e].tap ? from[M == Map::same ? 32 * i : pixels[i].at] : T{};
    }
  }
}

// Sums of the warp's filters at the lane's pixels, to sums[slot][pixel]. next: the first rows.
template <class T, Map M>
__device__ inline void add_rows(const StripeSum& t, Rows& next, int count, const Row* from,
                                const Pixel (&pixels)[kAtOnce], float* sums) {
  float sum[kAtOnce] = {};
  for (int r = 0; r < count; r += kAtOnce) {  // lists are filled up
    Rows rows;
    T values[kAtOnce][kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) rows[e] = next[e];
    load_values<T, M>(t, rows, pixels, values);
    load_rows(from + min(r + kAtOnce, count - kAtOnce), next);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const bool begins = rows[e].slot < 0;
      float* to = sums + (begins ? ~rows[e].slot : rows[e].slot) * kPitch;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sum[i] = (begins ? 0.f : sum[i]) + widen(values[e][i]);
        to[32 * i] = sum[i];
      }
    }
  }
}

// Filters [first, first + count) of the block's pixels, one value a lane: lanes are pixels.
template <class T>
__device__ inline void store_values(const StripeSum& t, int first, int count, const Pixel* pixels,
                                    const float* sums) {
  const long long offset = pixels[threadIdx.x].offset;
  if (offset < 0) return;
  T* y = static_cast<T*>(t.out);
  for (int k = 0; k < count; ++k) {
    const long long to = offset + (first + k) * t.out_strides.c;
    y[to] = finish<T>(t.finish, sums[k * kPitch + threadIdx.x], scale_of(t.finish, first + k),
                      shift_of(t.finish, first + k), to);
  }
}

// The same in pieces of 16 bytes: neighbouring lanes are neighbouring filters.
template <class T>
__device__ inline void store_pieces(const StripeSum& t, int first, int count, const Pixel* pixels,
                                    const float* sums) {
  constexpr int kEach = 16 / sizeof(T);
  struct alignas(16) Piece {
    T value[kEach];
  };
  const Finish& f = t.finish;
  constexpr int kAcross = 8;
  for (int k = threadIdx.x % kAcross * kEach; k < count; k += kAcross * kEach)
#pragma unroll 1
    for (int pixel = threadIdx.x / kAcross; pixel < kPixels; pixel += kThreads / kAcross) {
      if (pixels[pixel].offset < 0) continue;
      const int channel = first + k;
      const long long to = pixels[pixel].offset + channel;
      float y[1][kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) y[0][e] = sums[(k + e) * kPitch + pixel];
      if (f.scale)
#pragma unroll
        for (int e = 0; e < kEach; ++e) y[0][e] *= f.scale[channel + e];
      if (f.shift)
#pragma unroll
        for (int e = 0; e < kEach; ++e) y[0][e] += f.shift[channel + e];
      if (f.residual) {
        const Piece residual = *reinterpret_cast<const Piece*>(static_cast<const T*>(f.residual) + to);
#pragma unroll
        for (int e = 0; e < kEach; ++e) y[0][e] += widen(residual.value[e]);
      }
      activate(y, f.activation);
      Piece piece;
#pragma unroll
      for (int e = 0; e < kEach; ++e) narrow(y[0][e], piece.value[e]);
      *reinterpret_cast<Piece*>(static_cast<T*>(t.out) + to) = piece;
    }
}

template <class T, Map M>
__global__ void __launch_bounds__(kThreads, 6) stripe_sum_kernel(const __grid_constant__ StripeSum t) {
  auto* pixels = reinterpret_cast<Pixel*>(shared_memory());
  auto* sums = reinterpret_cast<float*>(shared_memory() + kPixels * sizeof(Pixel));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.y * kWarps * t.width, batches = (t.filters + t.width - 1) / t.width;
  // A list is on its way while the pixels are found.
  const int batch = min(blockIdx.y * kWarps + warp, batches - 1), begin = t.tables[batch];
  const int count = t.tables[batch + 1] - begin;
  const Row* rows = reinterpret_cast<const Row*>(t.tables + t.rows) + begin;
  Rows next;
  load_rows(rows, next);
  pixels[threadIdx.x] = pixel_of<M>(t, blockIdx.x * kPixels + threadIdx.x);
  barrier();
  Pixel mine[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) mine[i] = pixels[lane + 32 * i];
  if (blockIdx.y * kWarps + warp < batches)
    add_rows<T, M>(t, next, count, rows, mine, sums + warp * t.width * kPitch + lane);
  barrier();
  const int filters = min(kWarps * t.width, t.filters - first);
  const Strides& s = t.out_strides;
  const bool pieces = s.c == 1 && (s.n | s.h | s.w | first | filters) % (16 / sizeof(T)) == 0 &&
                      reinterpret_cast<std::uintptr_t>(t.out) % 16 == 0;
  if (pieces)
    store_pieces<T>(t, first, filters, pixels, sums);
  else
    store_values<T>(t, first, filters, pixels, sums);
}

template <class T>
cudaError_t launch_type(const StripeSum& t, void* stream) {
  const long long pixels = static_cast<long long>(t.images) * t.out_h * t.out_w;
  const dim3 grid(static_cast<unsigned>((pixels + kPixels - 1) / kPixels),
                  static_cast<unsigned>((t.filters + kWarps * t.width - 1) / (kWarps * t.width)));
  const int bytes = kPixels * static_cast<int>(sizeof(Pixel)) + kWarps * t.width * kPitch * 4;
  const bool same = t.map_h == t.out_h && t.map_w == t.out_w;
  const auto kernel = t.map_h < 0 ? stripe_sum_kernel<T, Map::phases>
                      : same      ? stripe_sum_kernel<T, Map::same>
                                  : stripe_sum_kernel<T, Map::single>;
  return launch(kernel, grid, kThreads, bytes, stream, t);
}

}  // namespace

int stripe_sum(const StripeSum& t, void* stream) {
  return with_type(t.dtype, [&](auto type) { return launch_type<decltype(type)>(t, stream); });
}

}  // namespace sk::cuda
