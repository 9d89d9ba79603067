// dw[a,c] = sum over the pixels (n,p,q):  dy[n,k,p,q] * x[n, c, p + r, q + s],   a: the live stripe (k,r,s)
//
// Tensor cores, mma.sync: 16 channels x 8 stripes of one tap, reduced over pixels. x is read transposed from
// its patch at the tap's offset; a stripe's values of dy are gathered: every lane reads its own filter. A
// warp owns up to eight such columns and all channels of the tile, in registers over all pixel tiles of its
// split; reduce() adds the splits in a fixed order.
#include "cuda/epilogue.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pairs.h"
#include "cuda/rows.h"

namespace sk::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPixels = 64;  // of a step
constexpr int kColumns = 8;  // of a warp, of 8 stripes each

// items: one a block; entries: row of the tap or -1, a column; lists: {a or -1, k within the block's
// filters}, a stripe.
struct Block {
  int group, origin_h, origin_w, filter;
};

struct Memory {
  int patch, patch_size, dy, dy_pitch, dy_size, end;
};

// slab: filters of a block.
__host__ __device__ inline Memory memory_of(const Layout& l) {
  Memory m;
  m.patch = kPixels * 4;
  m.patch_size = patch_rows(l.walk) * l.pitch;
  m.dy = m.patch + 2 * m.patch_size;
  m.dy_pitch = l.slab * 2 + 16;
  m.dy_size = kPixels * m.dy_pitch;
  m.end = m.dy + 2 * m.dy_size;
  return m;
}

// The A fragment: 16 channels from `channel` on, of the unit of pixels whose patch rows (in bytes) are
// `rows`.
__device__ inline void read_x(const unsigned char* patch, const int* rows, int channel,
                              std::uint32_t (&a)[4]) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(a, patch + rows[lane % 8 + lane / 16 * 8] + (channel + lane / 8 % 2 * 8) * 2);
}

// The B fragment: dy of the lane's stripe at the pixels of its place in the unit.
__device__ inline void gather(const unsigned char* dy, int pitch, std::uint32_t (&b)[2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned char* pixel = dy + (2 * t + 8 * half) * pitch;
    b[half] = load_pair(pixel, pixel + pitch);
  }
}

// The columns of a warp. Live ones come first, those of one tap together; bit j of `turns`: x is read anew
// for column j. (Comparing taps in the loop instead made ptxas take a minute for sm_100.)
struct Columns {
  int count, turns;
  int tap[kColumns], filter[kColumns];
};

template <class T>
__device__ inline Columns columns_of(const int* rows, const int* stripes, int pitch) {
  Columns c;
  c.count = c.turns = 0;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    c.tap[j] = max(rows[j], 0) * pitch;
    c.filter[j] = stripes[2 * (8 * j + threadIdx.x % 32 / 4) + 1] * int(sizeof(T));
    c.count += rows[j] >= 0;
    c.turns |= (j == 0 || c.tap[j] != c.tap[j - 1]) << j;
  }
  return c;
}

template <class T, int Tiles>
__device__ inline void execute(const Memory& memory, const int* pixel_rows, const unsigned char* patch,
                               const unsigned char* dy, const Columns& columns,
                               float (&acc)[Tiles][kColumns][4]) {
  constexpr int kUnit = 32 / sizeof(T);  // pixels
#pragma unroll 1
  for (int p = 0; p < kPixels; p += kUnit, dy += kUnit * memory.dy_pitch) {
    std::uint32_t a[Tiles][4];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j >= columns.count) break;
      if (columns.turns >> j & 1) {
#pragma unroll
        for (int m = 0; m < Tiles; ++m) read_x(patch + columns.tap[j], pixel_rows + p, 16 * m, a[m]);
      }
      std::uint32_t b[2];
      gather(dy + columns.filter[j], memory.dy_pitch, b);
#pragma unroll
      for (int m = 0; m < Tiles; ++m) mma<T>(acc[m][j], a[m], b);
    }
  }
}

template <class T>
__device__ inline void load_tile(const Layout& l, const Call& call, const Block& block, const Tile& tile,
                                 int channel, const Memory& memory, unsigned char* patch, unsigned char* dy) {
  const T* x = static_cast<const T*>(call.in) + block.group * l.group_in + channel;
  const T* grad = static_cast<const T*>(call.weights) + block.group * l.group_out + block.filter;
  const auto place_x = [&](int row) -> const T* {
    const PatchRow r = patch_row(l.walk, tile, row);
    if (!inside(l.walk, r, block.origin_h, block.origin_w)) return nullptr;
    return x + offset_of(call.in_strides, r, block.origin_h, block.origin_w);
  };
  const auto place_dy = [&](int m) -> const T* {
    const long long offset = offset_of_pixel(l.walk, tile, call.out_strides, m, call.tables + l.classes);
    return offset < 0 ? nullptr : grad + offset;
  };
  const T* any = static_cast<const T*>(call.in);
  load_rows<T, kThreads>(patch_rows(l.walk), l.chunk, l.group_in - channel, l.pitch, any, place_x, patch);
  load_rows<T, kThreads>(kPixels, l.slab, l.group_out - block.filter, memory.dy_pitch, any, place_dy, dy);
  copies_commit();
}

template <class T, int Tiles>
__global__ void __launch_bounds__(kThreads, 2) wgrad_mma_kernel(Params params) {
  const Layout& l = params.layout;
  const Call& call = params.call;
  const Memory memory = memory_of(l);
  unsigned char* shared = shared_memory();
  auto* pixel_rows = reinterpret_cast<int*>(shared);
  unsigned char *patch = shared + memory.patch, *dy = shared + memory.dy;

  const Block block = reinterpret_cast<const Block*>(call.tables + l.items)[blockIdx.y];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4,
            channel = blockIdx.x * 16 * Tiles;
  const int first = (blockIdx.y * kWarps + warp) * kColumns;
  const int* stripes = call.tables + l.lists + 16 * first;
  const Columns columns = columns_of<T>(call.tables + l.entries + first, stripes, l.pitch);
  for (int m = threadIdx.x; m < kPixels; m += kThreads) pixel_rows[m] = row_of_pixel(l.walk, m) * l.pitch;

  float acc[Tiles][kColumns][4] = {};
  const long long count = tiles(l.walk);
  const int begin = static_cast<int>(count * blockIdx.z / l.splits),
            end = static_cast<int>(count * (blockIdx.z + 1) / l.splits);
  const auto load = [&](int index, int half) {
    load_tile<T>(l, call, block, tile_of(l.walk, index), channel, memory, patch + half * memory.patch_size,
                 dy + half * memory.dy_size);
  };
  if (begin < end) load(begin, 0);
  int half = 0;
  for (int i = begin; i < end; ++i, half ^= 1) {
    copies_wait();
    barrier();
    if (i + 1 < end) load(i + 1, half ^ 1);
    execute<T, Tiles>(memory, pixel_rows, patch + half * memory.patch_size, dy + half * memory.dy_size,
                      columns, acc);
  }

#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = stripes[2 * (8 * j + 2 * t + i % 2)];
#pragma unroll
      for (int m = 0; m < Tiles; ++m) {
        const int c = channel + 16 * m + g + i / 2 * 8;
        if (row >= 0 && c < l.group_in)
          store_sum<T>(call, blockIdx.z, static_cast<long long>(row) * l.group_in + c, acc[m][j][i]);
      }
    }
}

}  // namespace

int wgrad_mma_bytes(const Layout& l) { return memory_of(l).end; }

// width: tiles of 16 channels, 2 or 4. tiles_out: blocks of stripes, over all groups. Not float32: the tensor cores cut sums
// off, and results were up to 2.3 times what float32 may be off.
int wgrad_mma(const Params& p, void* stream) {
  const Layout& l = p.layout;
  return with_type_of_16_bits(l.dtype, [&](auto type) {
    return with_constant<2, 4>(l.width, [&](auto width) {
      constexpr int kTiles = decltype(width)::value, kChannels = 16 * kTiles;
      const dim3 grid((l.group_in + kChannels - 1) / kChannels, l.tiles_out, l.splits);
      return launch(wgrad_mma_kernel<decltype(type), kTiles>, grid, kThreads, memory_of(l).end, stream, p);
    });
  });
}

}  // namespace sk::cuda
