// Compiled once per instruction set with -DSK_ISA=<name> and that set's flags; exports one table.
#include "cpu/isa/epilogue.h"
#include "cpu/isa/layout.h"
#include "cpu/isa/matrix.h"
#include "cpu/isa/pool.h"
#include "cpu/isa/taps.h"
#include "cpu/isa/tile.h"

#define SK_JOIN_(a, b) a##b
#define SK_JOIN(a, b) SK_JOIN_(a, b)
#define SK_TEXT_(a) #a
#define SK_TEXT(a) SK_TEXT_(a)

namespace sk {

extern const IsaKernels* SK_JOIN(isa_table_, SK_ISA)();

const IsaKernels* SK_JOIN(isa_table_, SK_ISA)() {
  static IsaKernels table;
  table.name = SK_TEXT(SK_ISA);
  table.lanes = W;
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
  table.fused = true;
#endif
  table.tile_filters = kTileFilters;
  fill_tiles<kMaxTileFilters>(table);
  table.most_span = kBudget;
  fill_spans<kBudget>(table);
  fill_taps(table);
#if defined(__AMX_BF16__)
  table.matrix = {matrix_begin, matrix_add, matrix_end};
#endif
  table.load_row = load_row;
  table.store_row = store_row;
  table.load_rows = load_rows;
  table.store_rows = store_rows;
  table.load_transposed = load_transposed;
  table.store_transposed = store_transposed;
  table.add_wide = add_wide;
  table.finish_row = finish_row;
  table.larger_of = larger_of;
  table.keep_larger = keep_larger;
  table.largest_of_squares = largest_of_squares;
  table.largest_of_narrow_squares = largest_of_narrow_squares;
  table.max_windows = max_windows;
  table.sum_windows = sum_windows;
  return &table;
}

}  // namespace sk
