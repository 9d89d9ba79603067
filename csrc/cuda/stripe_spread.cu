// p[m][a] = dy[pixel m - tap of a][filter of a], zeros beside the image and where a column has no stripe
//
// What comes before the products of the backward passes (backends/gemm.py): m runs over the input pixels of a phase of the
// stride, columns over its stripes tap by tap, filled up to 16 bytes. A block keeps the pixels of dy that its tile of m
// reads in shared memory, so that a filter is gathered from there in nine taps and read from global memory once; a row of
// zeros stands for the pixels beside the image, and a zero behind every row for the missing stripe. Four lanes write 64
// bytes of a row of p and eight of them eight rows: with 16 bytes between the rows of dy those lie in different banks.
#include "cuda/instances.h"
#include "cuda/instructions.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/walk.h"

namespace sk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAcross = 4, kDown = 32 / kAcross;  // pieces and pixels of a warp at once
constexpr int kStretch = 32;                      // pixels that a warp writes of its pieces

struct PixelRange {
  int low, count;  // pixels of dy that a tile reads, of all images
};
// 16 bytes of a row of p: filters of its values.
template <int Each>
struct alignas(8) Piece {
  std::uint16_t filter[Each];
};

__host__ __device__ inline int pitch_of(const StripeSpread& t) { return t.row_bytes + 16; }
__host__ __device__ inline int bytes_of(const StripeSpread& t) {
  return (t.most_rows + 1) * pitch_of(t) + round_up(t.tap_count * t.tile * 2, 16);
}

// Rows of dy, the zeros behind each, and the row of zeros.
__device__ inline void load_pixels(const StripeSpread& t, const PixelRange& range, unsigned char* rows) {
  const int pieces = t.row_bytes / 16, pitch = pitch_of(t);
  const auto* dy = static_cast<const unsigned char*>(t.dy) + t.first_byte;
  const uint4 zeros = {0, 0, 0, 0};
  for (int i = threadIdx.x; i < range.count * pieces; i += kThreads) {
    const int row = i / pieces, piece = i % pieces;
    copy_async<16>(rows + row * pitch + piece * 16, dy + (range.low + row) * t.pixel_bytes + piece * 16,
                   true);
  }
  for (int i = threadIdx.x; i < range.count; i += kThreads)
    *reinterpret_cast<uint4*>(rows + i * pitch + t.row_bytes) = zeros;
  for (int i = threadIdx.x; i <= pieces; i += kThreads)
    *reinterpret_cast<uint4*>(rows + range.count * pitch + i * 16) = zeros;
  copies_commit();
}

// Which row each pixel of the tile reads by each tap: row_of[tap][pixel].
__device__ inline void list_rows(const StripeSpread& t, const PixelRange& range, std::uint16_t* row_of) {
  for (int mine = threadIdx.x % t.tile, tap = threadIdx.x / t.tile; tap < t.tap_count;
       tap += kThreads / t.tile) {
    const unsigned m = blockIdx.x * t.tile + mine, line = m / t.columns;
    const int n = line / t.rows, p = static_cast<int>(line % t.rows) - t.taps[tap].i;
    const int q = static_cast<int>(m % t.columns) - t.taps[tap].j;
    const bool met = n < t.images && static_cast<unsigned>(p) < static_cast<unsigned>(t.out_h) &&
                     static_cast<unsigned>(q) < static_cast<unsigned>(t.out_w);
    row_of[tap * t.tile + mine] =
        static_cast<std::uint16_t>(met ? (n * t.out_h + p) * t.out_w + q - range.low : range.count);
  }
}

// Warps take turns: four pieces and 32 pixels a turn.
template <class T>
struct Turn {
  static constexpr int kEach = 16 / sizeof(T);
  Piece<kEach> from;
  int tap, piece, begin;

  __device__ Turn(const StripeSpread& t, int unit) {
    const int stretches = t.tile / kStretch;
    piece = min(unit / stretches * kAcross + static_cast<int>(threadIdx.x) % kAcross, t.pieces - 1);
    begin = unit % stretches * kStretch;
    from = reinterpret_cast<const Piece<kEach>*>(t.tables + t.places)[piece];
    tap = t.tables[t.tap_of + piece];
  }
};

template <class T>
__device__ inline void gather(const StripeSpread& t, const Turn<T>& turn, const unsigned char* rows,
                              const std::uint16_t* row_of) {
  constexpr int kEach = Turn<T>::kEach;
  struct alignas(16) Values {
    T value[kEach];
  };
  const int down = threadIdx.x % 32 / kAcross, pitch = pitch_of(t);
  const unsigned first = blockIdx.x * t.tile + turn.begin + down;
  const unsigned pixels = static_cast<unsigned>(t.images) * t.rows * t.columns;
  const std::uint16_t* row = row_of + turn.tap * t.tile + turn.begin + down;
  T* to = static_cast<T*>(t.p) + first * t.pitch + turn.piece * kEach;
#pragma unroll
  for (int i = 0; i < kStretch; i += kDown) {
    const unsigned char* dy = rows + row[i] * pitch;
    Values values;
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      values.value[e] = *reinterpret_cast<const T*>(dy + turn.from.filter[e] * sizeof(T));
    if (first + i < pixels) *reinterpret_cast<Values*>(to + i * t.pitch) = values;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) stripe_spread_kernel(const __grid_constant__ StripeSpread t) {
  unsigned char* rows = shared_memory();
  auto* row_of = reinterpret_cast<std::uint16_t*>(rows + (t.most_rows + 1) * pitch_of(t));
  const int groups = (t.pieces + kAcross - 1) / kAcross, units = groups * (t.tile / kStretch);
  const int share = (units + t.splits - 1) / t.splits,
            end = min(units, (static_cast<int>(blockIdx.y) + 1) * share);
  int unit = blockIdx.y * share + threadIdx.x / 32;
  Turn<T> next(t, min(unit, units - 1));
  PixelRange range = reinterpret_cast<const PixelRange*>(t.tables + t.ranges)[blockIdx.x];
  range.count =
      max(0, min(range.count, t.images * t.out_h * t.out_w - range.low));  // of fewer images than planned
  load_pixels(t, range, rows);
  list_rows(t, range, row_of);
  copies_wait();
  barrier();
  for (; unit < end; unit += kWarps) {
    const Turn<T> turn = next;
    next = Turn<T>(t, min(unit + kWarps, units - 1));
    gather<T>(t, turn, rows, row_of);
  }
}

}  // namespace

int stripe_spread(const StripeSpread& t, void* stream) {
  const long long pixels = static_cast<long long>(t.images) * t.rows * t.columns;
  const dim3 grid(static_cast<unsigned>((pixels + t.tile - 1) / t.tile), static_cast<unsigned>(t.splits));
  return with_type(t.dtype, [&](auto type) {
    return launch(stripe_spread_kernel<decltype(type)>, grid, kThreads, bytes_of(t), stream, t);
  });
}

}  // namespace sk::cuda
