"""Which blocks the CPU kernels cut a problem into, and what each should cost. Torch-free.

A tiling is (mode, images, rows, filter_parts, window), see csrc/cpu/schedule.h, (images, filter_parts) where
lanes run along filters, see csrc/cpu/fprop_filters.h, or (rows,) for pairs of filters, see csrc/cpu/fprop_taps.h.
Costs are cycles of one core divided by a nominal clock; only their ratios matter, and tune() replaces them by
measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

from stripe_kernels.geometry import ConvShape
from stripe_kernels.registry import Config, Pass, Problem

PIXELS, GATHER, BATCH, FILTERS, TAPS = 0, 1, 2, 3, 4
MODES = {"pixels": PIXELS, "gather": GATHER, "batch": BATCH, "filters": FILTERS, "taps": TAPS}
FPROP_ONLY = (FILTERS, TAPS)
CLOCK = 3.5e9
# Measured on 1 MB of L2: blocks up to this size run as fast as small ones; past it halo rows cost less than misses.
BLOCK_BYTES = 1_400_000
WHOLE_MAP_BYTES = 4_500_000
# With vectors of 8, measured on 512 KB of L2, pixel lanes have blocks that leave L2 to the weights too, of SHORT_ROWS
# or more: up to 13 % less time. Taller ones win by up to 7 % where the halo is large (strides) or rows are few.
SHORT_BYTES = 300_000
SHORT_ROWS = 7
SPILL = 1.06  # of the multiply-adds' time, for blocks of more than 2 * SHORT_BYTES
# What is not cut is slower beyond so many bytes: panel or im2col and outputs, both maps along filters.
UNCUT_BYTES, IMAGE_BYTES = 4_000_000, BLOCK_BYTES
CHUNK_PIXELS = 192  # of wgrad
CHUNK_BYTES = 600_000  # both copies of a chunk of wgrad: where larger ones were slower on Zen 4
TAPS_BYTES = 300_000  # panel and output of a block of pairs of filters
MATRIX_FILTERS = 9  # of a tap: fewer take as long
COLD_BYTES, COLD_CHANNELS = 4_000_000, 4  # outputs this large, of this few channels: see Cycles.cold
WINDOW = 12  # vectors: a common multiple of the register tiles 2, 3, 4, 6, 12


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
    beyond: float  # factor of wgrad's multiply-adds where a chunk is larger than CHUNK_BYTES
    pair_fma: float  # a multiply-add in pairs of filters
    pair_end: float  # of a pair: the end of a sum and its vectors of y
    pair_row: float  # of an im2col along the width: beginning a row
    pair_copy: float  # the same: copying a vector
    # Bytes along pixels, along images of NCHW, along images of channels_last: a map of up to `whole` is one block,
    # larger ones are cut into blocks of up to `block`.
    whole: tuple[int, int, int] = (WHOLE_MAP_BYTES,) * 3
    block: tuple[int, int, int] = (BLOCK_BYTES,) * 3
    uncut: float = 1.0  # factor of what is not cut, beyond UNCUT_BYTES or IMAGE_BYTES
    line: float = 0.0  # a value of channels_last in a line of memory that other groups read too
    cold: float = 0.0  # a byte of y in channels_last, where stems write more than COLD_BYTES
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
    uncut=1.5, line=20.0, cold=0.35,  # line: 10 to 27; cold: .1 to .6
    chunk=2 * CHUNK_PIXELS, whole=_XEON_BLOCKS, block=_XEON_BLOCKS,
)  # fmt: skip
# fprop in matrix registers on a Xeon of 2024; vectors of x are of cells: half of 1,345 timings (the same layers, d of
# .1, .24 and .5) within 11 %. What was predicted best took 3 % longer than what was best in channels_last, 7 % in NCHW,
# dense and its margin included.
AMX = replace(
    XEON, matrix=True, fma=0.073, update=3.5, row=2.1, vector=12.5, apart=1.2, strided=21.0, transpose=16.0, turn=10.0
)  # fmt: skip
# AVX2 on Zen 3, two multiply-adds a cycle; stands for shorter vectors too. Half of 234 of its layers' wgrad within 7 %
# below and 36 % above, channels of 16 to 1024 on 1x1 to 56x56.
ZEN3 = Cycles(
    lanes=8, fma=0.67, gradient=0.91, update=3.4, row=16.0, vector=2.5, apart=4.5, strided=0.0,
    transpose=13.0, turn=0.0,
    filters_fma=0.9, scatter=14.0, weights=3.7, out=8.0, wgrad=0.95, copy=(20.0, 20.0),
    ends=(30.0, 7.0), beyond=1.0,
    pair_fma=0.67, pair_end=109.0, pair_row=51.0, pair_copy=3.8,
)  # fmt: skip


def cycles(lanes: int, multiply_adds: float) -> Cycles:
    """Of a core with vectors of `lanes` that begins so many multiply-adds of them a cycle."""
    if lanes == 16:
        return XEON if multiply_adds > 1.5 else ZEN4
    return replace(ZEN3, lanes=lanes)


@dataclass(frozen=True)
class Sides:
    """The two ends of fprop (x -> y) or dgrad (dy -> dx): channels and maps read and written, and how taps spread."""

    channels_in: int
    channels_out: int
    rows: int
    cols: int
    halo: int
    pitch: int
    planes: int
    phases: int

    @classmethod
    def of(cls, s: ConvShape, which: Pass, mode: int = PIXELS, matrix: bool = False) -> Sides:
        spread_h, spread_w = s.dilation[0] * (s.R - 1), s.dilation[1] * (s.S - 1)
        strides = s.stride[0] * s.stride[1]
        if which == "dgrad":
            rows, cols = -(-s.H // s.stride[0]), -(-s.W // s.stride[1])
            pitch = cols + spread_w // s.stride[1] // 2 + 1
            return cls(s.group_k, s.group_c, rows, cols, spread_h // s.stride[0], pitch, 1, strides)
        pitch = max(s.Q, -(-s.W // s.stride[1]) + (1 if s.S > 1 else 0))
        planes = min(strides, s.taps)
        if matrix and mode == PIXELS:  # rows of whole vectors, a plane for every column of taps
            pitch, planes = -(-s.Q // 16) * 16, s.S * min(s.stride[0], s.R)
        return cls(
            s.group_c // 2 if matrix else s.group_c,
            s.group_k,
            s.P,
            s.Q,
            spread_h // s.stride[0],
            pitch,
            planes,
            1,
        )

    def block_bytes(self, rows: int, lanes: int) -> int:
        panel = self.channels_in * (rows + self.halo) * self.pitch * self.planes
        return 4 * lanes * (panel + self.channels_out * rows * self.pitch)


def tilings(problem: Problem, which: Pass, mode: int, cost: Cycles) -> Iterator[Config]:
    """Tilings of one lane mode worth measuring, the expected best first."""
    s, lanes, matrix = problem.shape, cost.lanes, cost.matrix
    sides = Sides.of(s, which, mode, matrix)
    rows_all = max(1, sides.rows)
    if mode == FILTERS:
        blocks = s.N * s.groups
        images = (
            1 if sides.rows * sides.cols >= 16 else max(1, min(s.N, 64 // max(1, sides.rows * sides.cols)))
        )
        yield (images, 1 if blocks >= 4 * problem.threads * images else problem.threads)
        return
    if mode == TAPS:
        yield (_tap_rows(problem),)
        return
    if mode == GATHER:
        pixels = max(1, sides.rows * sides.cols)
        images = max(1, min(s.N, -(-12 * lanes // pixels)))
        blocks = -(-s.N // images) * s.groups
        for parts in dict.fromkeys((1 if blocks >= problem.threads else problem.threads, 1)):
            yield (GATHER, images, rows_all, parts, WINDOW)
        return
    batches = (
        [1]
        if mode == PIXELS
        else [lanes * b for b in (1, 2) if b == 1 or (lanes * b // 2 < s.N and sides.cols <= 4)]
    )
    for images in batches:
        image_blocks = -(-s.N // images)
        for rows in _heights(sides, mode, images, cost, problem.channels_last):
            blocks = image_blocks * s.groups * -(-rows_all // rows)
            if blocks % problem.threads and blocks < 8 * problem.threads:
                # Too few blocks to share out: split the filters of one block, or cut the map into more rows.
                yield (mode, images, rows, problem.threads, WINDOW)
                cuts = -(-problem.threads // (image_blocks * s.groups))
                finer = -(-rows_all // (cuts * -(-rows_all // rows) if cuts > 1 else problem.threads))
                if finer < rows:
                    yield (mode, images, max(1, finer), 1, WINDOW)
            elif rows < rows_all and image_blocks * s.groups < problem.threads:
                yield (
                    mode,
                    images,
                    rows_all,
                    problem.threads,
                    WINDOW,
                )  # no core writes beside another's rows
            yield (mode, images, rows, 1, WINDOW)


def _heights(sides: Sides, mode: int, images: int, cost: Cycles, channels_last: bool) -> list[int]:
    """Rows of a block worth measuring: the tallest first; those of one height as even as possible."""
    rows_all = max(1, sides.rows)

    def within(most: int) -> int:
        rows = next((r for r in range(rows_all, 0, -1) if sides.block_bytes(r, images) <= most), 1)
        return -(-rows_all // -(-rows_all // rows))

    if cost.lanes == 16 or mode == BATCH:
        kind = 0 if mode == PIXELS else 2 if channels_last else 1
        whole = sides.block_bytes(rows_all, images) <= cost.whole[kind]
        return [rows_all if whole else within(cost.block[kind])]
    tall = within(BLOCK_BYTES)
    short = within(SHORT_BYTES)
    if short < SHORT_ROWS:
        short = min(tall, -(-rows_all // max(1, rows_all // SHORT_ROWS)))
    return list(dict.fromkeys((tall, short)))


def predict(problem: Problem, which: Pass, config: Config, cost: Cycles, step: float = 1.0) -> float:
    """Seconds: multiply-adds of live stripes over the lanes actually run, plus moving activations in and out.

    Pixels move in rows, into an im2col plane for every tap; images move in transposes. step: instructions a
    multiply-add; one half where a pair of bfloat16 channels takes one.
    """
    if len(config) == 1:
        return _predict_taps(problem, config, cost) + _cold(problem, cost)
    if len(config) == 2:
        return _predict_filters(problem, config, cost)
    s, lanes = problem.shape, cost.lanes
    mode, images, rows, parts, _ = config
    sides = Sides.of(s, which, mode, cost.matrix)
    if mode == BATCH:
        blocks_n, lanes_n = -(-s.N // images), images
        move = cost.transpose + (0.0 if problem.channels_last else cost.turn)
        width, per_row = sides.cols, 0.0
    elif mode == GATHER:
        blocks_n, lanes_n = -(-s.N // images), 1
        width, move, per_row = sides.cols * images, cost.vector, cost.row * images
    else:
        blocks_n, lanes_n = s.N, 1
        width, move, per_row = sides.pitch, cost.vector, cost.row
    row_blocks = -(-sides.rows // rows)
    out_vectors = -(-min(rows, sides.rows) * width * lanes_n // lanes)
    in_rows = sides.rows if mode == GATHER else rows + sides.halo
    planes = s.taps if mode == GATHER else sides.planes
    in_vectors = -(-in_rows * width * lanes_n // lanes) * planes
    stripes = problem.skeleton.stripes / s.groups
    if cost.matrix and which == "fprop":
        stripes = max(stripes, float(MATRIX_FILTERS * problem.skeleton.live.any(0).sum()))
    share = 1.0
    if mode == BATCH:
        share = s.taps_inside() / s.taps
    fma = (cost.fma if which == "fprop" else cost.gradient) * step * stripes * share * out_vectors * s.group_c
    if which == "fprop":
        fma += cost.update * stripes * share * out_vectors + 1.0 * sides.channels_out * out_vectors
    fma /= 1.0 if which == "fprop" else sides.phases
    if lanes != 16 and mode == PIXELS and sides.block_bytes(min(rows, sides.rows), 1) > 2 * SHORT_BYTES:
        fma *= SPILL
    move_in = move_out = move
    if mode == BATCH and s.stride != (1, 1) and not problem.channels_last:
        # Pixels that lie apart are moved once more before they are turned.
        move_in, move_out = (3 * move, move) if which == "fprop" else (move, 3 * move)
    if problem.channels_last and mode == BATCH and s.groups > 1:
        move_in += lanes * cost.line / sides.channels_in
        move_out += lanes * cost.line / sides.channels_out
    elif problem.channels_last and mode == BATCH:
        move_in *= _squares(sides.channels_in, lanes)
        move_out *= _squares(sides.channels_out, lanes)
    if mode != BATCH and s.stride[1] > 1 and not problem.channels_last:
        move_in, move_out = (move + cost.strided, move) if which == "fprop" else (move, move + cost.strided)
    if problem.channels_last and mode != BATCH:
        move_in += _apart(cost, sides.channels_in, planes)
        move_out += _apart(cost, sides.channels_out, 1)
    block = fma + move_in * in_vectors * sides.channels_in + move_out * out_vectors * sides.channels_out
    block += per_row * (in_rows * planes * sides.channels_in + min(rows, sides.rows) * sides.channels_out)
    # Gather, and whole maps of whose filters every core takes a share.
    moved = 4 * lanes * (in_vectors * sides.channels_in + out_vectors * sides.channels_out)
    if mode != BATCH and moved > UNCUT_BYTES:
        block *= cost.uncut
    blocks = blocks_n * row_blocks * s.groups * (sides.phases if which == "dgrad" else 1)
    if parts > 1:
        rounds = blocks * (1.0 / min(parts, problem.threads)) * 1.03
    else:
        rounds = -(-blocks // problem.threads)
    seconds = 3e-6 + (1e-6 if problem.threads > 1 else 0.0) + rounds * block / CLOCK
    return seconds + _cold(problem, cost) if which == "fprop" else seconds


def _squares(channels: int, lanes: int) -> float:
    """Values of the squares in which images of channels_last are turned, over the channels they hold.

    Of 1 to 24 channels batches of 32 images took 1.2 to 1.7 times what counting channels alone predicts.
    """
    return -(-channels // lanes) * lanes / channels


def _cold(problem: Problem, cost: Cycles) -> float:
    """Seconds a large y takes to write in channels_last beside a few channels' work.

    torch.empty hands it out in two places by turns (docs/measured.md), so that it is in no cache.
    """
    s = problem.shape
    written = s.N * s.K * s.P * s.Q * (4 if problem.dtype == "float32" else 2)
    if not problem.channels_last or s.C > COLD_CHANNELS or written <= COLD_BYTES:
        return 0.0
    return cost.cold * written / problem.threads / CLOCK


def _apart(cost: Cycles, channels: int, planes: int) -> float:
    """Cycles a vector of pixels costs more in channels_last: squares of 8 pixels by 8 channels are turned in
    registers, fewer channels move value by value, a strided row from as many places as it has phases."""
    return cost.apart if channels >= 8 else cost.apart * 8 / channels * planes


def _predict_filters(problem: Problem, config: Config, cost: Cycles) -> float:
    s, lanes = problem.shape, cost.lanes
    _, parts = config
    pixels = s.N * s.taps_inside() / s.taps * s.P * s.Q
    counts = problem.skeleton.live.reshape(s.groups, s.group_k, s.taps).sum(1)  # filters of every tap
    vectors = float((-(-counts // (lanes * parts)) * parts).sum())  # of a tap, the last one partly empty
    # One tap with all filters runs at 60 % of what several taps with a share each do (measured, not explained).
    fma = cost.filters_fma * (1.0 if s.taps > 1 else 1.6)
    tile = vectors * pixels * (fma * s.group_c + cost.scatter)
    if 4 * (s.C * s.H * s.W + s.K * s.P * s.Q) > IMAGE_BYTES:
        tile *= cost.uncut
    weights = vectors * s.group_c * cost.weights * -(-s.N // config[0])
    out = cost.out * s.N * s.K * s.P * s.Q / lanes
    return 4e-6 + (max(tile, weights) + out) / min(problem.threads, parts * max(s.N, 1)) / CLOCK


def _tap_rows(problem: Problem) -> int:
    """Rows of a block of pairs of filters: its panel and output within TAPS_BYTES, enough blocks for the team."""
    s = problem.shape
    halo = s.dilation[0] * (s.R - 1) // s.stride[0]
    phases = min(s.stride[0], s.R)
    row_bytes = 4 * s.Q * (s.group_c * s.S * phases + s.group_k)
    most = max(1, TAPS_BYTES // max(1, row_bytes) - halo)
    blocks = -(-s.P // most)
    if problem.threads > 1 and s.N * s.groups < 4 * problem.threads:
        blocks = max(blocks, -(-2 * problem.threads // max(1, s.N * s.groups)))
    return max(1, -(-s.P // max(1, blocks)))


def _predict_taps(problem: Problem, config: Config, cost: Cycles) -> float:
    """Pairs of filters: multiply-adds, the ends of their tiles, an im2col along the width."""
    s, lanes = problem.shape, cost.lanes
    (rows,) = config
    blocks = -(-s.P // rows)
    halo, phases = s.dilation[0] * (s.R - 1) // s.stride[0], min(s.stride[0], s.R)
    vectors = -(-rows * s.Q // lanes)  # of a block
    window = max(4, min(6 if lanes == 8 else 12, 30_000 // (4 * lanes * s.taps * s.group_c)))
    sums = max(1, -(-problem.skeleton.stripes * s.group_c // (48 * s.K)))  # of a pair
    work = cost.pair_fma * problem.skeleton.stripes / s.groups * s.group_c * vectors
    work += cost.pair_end * -(-s.group_k // 2) * sums * -(-vectors // window)
    if s.group_c > 4:  # where panel and output no longer fit L2; other kernels win from 8 channels on
        work *= 1.5
    copied = s.group_c * s.S * phases * (rows + halo)
    copy = copied * (cost.pair_row + cost.pair_copy * s.Q / lanes)
    if s.stride[1] > 1 and not problem.channels_last:
        copy += cost.strided * copied * s.Q / lanes
    if problem.channels_last:
        copy += _apart(cost, s.group_c, phases) * copied * s.Q / lanes / s.S
    if problem.channels_last or problem.dtype != "float32":  # y leaves through a buffer
        work += cost.vector * s.group_k * vectors
    tasks = blocks * s.N * s.groups
    return 6e-6 + -(-tasks // problem.threads) * (work + copy) / CLOCK


def wgrad_pixels(problem: Problem, cost: Cycles) -> int:
    """Output pixels of a chunk of wgrad: both copies stay near the core, and sums of chunks meet in float64."""
    channels = problem.shape.C + problem.shape.K
    return cost.chunk if 4 * cost.chunk * channels <= CHUNK_BYTES else min(cost.chunk, CHUNK_PIXELS)


def predict_wgrad(problem: Problem, cost: Cycles) -> float:
    """Seconds of wgrad: live multiply-adds inside the image, lanes along C, their tiles' ends, two copies."""
    s, lanes, chunk_pixels = problem.shape, cost.lanes, wgrad_pixels(problem, cost)
    vectors, stripes = -(-s.group_c // lanes), problem.skeleton.stripes
    share = s.taps_inside() / s.taps
    work = cost.wgrad * stripes * vectors * s.N * s.P * s.Q * share
    if 4 * chunk_pixels * (s.C + s.K) > CHUNK_BYTES:
        work *= cost.beyond
    many = vectors >= 4  # tiles of 4 filters by 3 vectors, else of 6 by 2
    tiles = max(stripes / (4 if many else 6), s.taps * s.groups) * -(-vectors // (3 if many else 2))
    pixels = s.P * s.Q
    if chunk_pixels <= pixels:
        rows = -(-s.P // max(1, (pixels + chunk_pixels // 2) // chunk_pixels))  # of a chunk
        chunks = s.N * -(-s.P // rows)
    else:
        chunks = -(-s.N * pixels // chunk_pixels)
    row, join = cost.ends
    ends = tiles * row * s.N * s.P * sqrt(share) + join * stripes * vectors * chunks

    # A group's few channels go value by value; dy stays filter by filter.
    channels = s.C if s.group_c < lanes else s.C / lanes
    read, written = cost.copy
    copies = s.N * (read * s.H * s.W * channels + written * s.P * s.Q * s.K / lanes)
    return 4e-6 + (work + ends + copies) / problem.threads / CLOCK
