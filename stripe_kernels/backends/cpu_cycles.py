"""What a core takes for the parts of a pass, measured on the processors at hand. Torch-free.

Cycles are those of a nominal clock; only their ratios matter, and tune() replaces predictions by measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Measured on 1 MB of L2: blocks up to this size run as fast as small ones; past it halo rows cost less than misses.
BLOCK_BYTES = 1_400_000
WHOLE_MAP_BYTES = 4_500_000
CHUNK_PIXELS = 192  # of wgrad


@dataclass(frozen=True)
class Cycles:
    """What a core takes for the parts of a pass, measured; fitted to kernels at d = .1 to .5."""

    lanes: int  # of a vector
    fma: float  # a multiply-add of a vector in fprop
    gradient: float  # the same in dgrad, whose operands are found through indices
    update: float  # adding a vector to y after a tap
    row: float  # beginning a row of pixels
    vector: float  # moving a vector of pixels of NCHW
    apart: float  # the same in channels_last, beyond that
    strided: float  # the same in NCHW where strides part the pixels of x, beyond that
    transpose: float  # moving a vector of images
    turn: float  # the same in NCHW, beyond that
    filters_fma: float  # a multiply-add with lanes along filters
    scatter: float  # a vector of filters into y
    weights: float  # a vector of weights from beyond L2
    out: float  # writing a vector of y there
    wgrad: float  # a multiply-add in wgrad
    copy: tuple[float, float]  # moving a vector of x into a pixel-major copy, one of dy into another
    ends: tuple[float, float]  # of wgrad: a tile's row of pixels, joining a vector of a chunk's sums
    beyond: float  # factor of wgrad's multiply-adds where a chunk is larger than cpu_tiling's CHUNK_BYTES
    pair_fma: float  # a multiply-add in pairs of filters
    pair_end: float  # of a pair: the end of a sum and its vectors of y
    pair_row: float  # of an im2col along the width: beginning a row
    pair_copy: float  # the same: copying a vector
    # Bytes along pixels, along images of NCHW, along images of channels_last: a map of up to `whole` is one block,
    # larger ones are cut into blocks of up to `block`.
    whole: tuple[int, int, int] = (WHOLE_MAP_BYTES,) * 3
    block: tuple[int, int, int] = (BLOCK_BYTES,) * 3
    uncut: float = 1.0  # factor of what is not cut, beyond cpu_cost's UNCUT_BYTES or IMAGE_BYTES
    line: float = 0.0  # a value of channels_last in a line of memory that other groups read too
    # A byte of y in channels_last, where stems write more than so many bytes.
    cold: tuple[float, int] = (0.0, 0)
    chunk: int = CHUNK_PIXELS  # of wgrad, where both copies fit CHUNK_BYTES
    matrix: bool = False  # fprop multiplies matrices; vectors hold cells of two channels


# AVX-512 on Zen 4, one multiply-add a cycle. What its name ends in was not measured there.
ZEN4 = Cycles(
    lanes=16, fma=1.05, gradient=1.05, update=3.0, row=20.0, vector=1.5, apart=4.5, strided=0.0,
    transpose=8.0, turn=0.0,
    filters_fma=1.15, scatter=24.0, weights=5.0, out=8.0, wgrad=1.3, copy=(6.0, 6.0),
    ends=(0.0, 0.0), beyond=1.3,  # ends are in the 1.3 of `wgrad`
    pair_fma=1.2, pair_end=110.0, pair_row=51.0, pair_copy=3.8,
)  # fmt: skip
# Measured at d = .24, fprop and dgrad of 15 or 17 layers: in the mean 0 to 4 % above each layer's best height. Taller
# blocks wait for what 2 MB of L2 no longer keep: at 5 MB they took 1.05 to 1.3 times as long along pixels, 1.3 to 1.4
# along images of channels_last. Images of NCHW move in longer stretches of a tall block: 1.2 to 1.35 times at 1.3 MB.
_XEON_BLOCKS = (1_000_000, 8_000_000, 1_000_000)
# AVX-512 on a Xeon of 2023 or later, two multiply-adds a cycle, 2 MB of L2. Layers of bench, d = .24, batches of 1, 8,
# 32: half of 1,281 timings of fprop along pixels and images within 12 %, of 416 along filters within 13 %, of 436 in
# pairs of filters within 20 %, of 159 of wgrad (batch 8) within 9 %. Whatever moves weighs twice as much beside
# multiply-adds as on Zen 4, and a batch of maps comes from memory: `vector` is mostly waiting.
XEON = Cycles(
    lanes=16, fma=0.70, gradient=0.88, update=1.6, row=2.7, vector=13.2, apart=4.0, strided=36.0,
    transpose=13.5, turn=15.0,
    filters_fma=0.80, scatter=35.0, weights=6.7, out=26.9, wgrad=0.73, copy=(8.4, 23.7),
    ends=(9.5, 12.1), beyond=1.19,
    pair_fma=0.38, pair_end=137.0, pair_row=13.0, pair_copy=8.3,
    uncut=1.5, line=20.0, cold=(0.35, 4_000_000),  # line: 10 to 27; cold: .1 to .6
    chunk=2 * CHUNK_PIXELS, whole=_XEON_BLOCKS, block=_XEON_BLOCKS,
)  # fmt: skip
# fprop in matrix registers on a Xeon of 2024; vectors of x are of cells: half of 1,345 timings (the same layers, d of
# .1, .24 and .5) within 11 %. What was predicted best took 3 % longer than what was best in channels_last, 7 % in NCHW,
# dense and its margin included.
AMX = replace(
    XEON, matrix=True, fma=0.073, update=3.5, row=2.1, vector=12.5, apart=1.2, strided=21.0, transpose=16.0, turn=10.0
)  # fmt: skip
# AVX2 on Zen 3, two multiply-adds a cycle; stands for shorter vectors too. Half of 234 of its layers' wgrad within 7 %
# below and 36 % above, channels of 16 to 1024 on 1x1 to 56x56. uncut and cold are of 70 layers, formats and batches at
# d = .24, beside a busy neighbour: gather took 1.6 to 2.5 times as long against pixels as predicted where an image's
# im2col is more than 4 MB, stems 1.4 to 2.6 times as long against dense where y leaves L2.
ZEN3 = Cycles(
    lanes=8, fma=0.67, gradient=0.91, update=3.4, row=16.0, vector=2.5, apart=4.5, strided=0.0,
    transpose=13.0, turn=0.0,
    filters_fma=0.9, scatter=14.0, weights=3.7, out=8.0, wgrad=0.95, copy=(20.0, 20.0),
    ends=(30.0, 7.0), beyond=1.0,
    pair_fma=0.67, pair_end=109.0, pair_row=51.0, pair_copy=3.8,
    uncut=2.0, cold=(0.35, 1_500_000),
)  # fmt: skip


def cycles(lanes: int, multiply_adds: float) -> Cycles:
    """Of a core with vectors of `lanes` that begins so many multiply-adds of them a cycle."""
    if lanes == 16:
        return XEON if multiply_adds > 1.5 else ZEN4
    return replace(ZEN3, lanes=lanes)
