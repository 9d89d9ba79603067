"""Which blocks the CPU kernels cut a problem into. Torch-free.

A tiling is (mode, images, rows, filter_parts, window), see csrc/cpu/schedule.h, (images, filter_parts) where
lanes run along filters, see csrc/cpu/fprop_filters.h, or (rows,) for pairs of filters, see csrc/cpu/fprop_taps.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stripe_kernels.backends.cpu_cycles import BLOCK_BYTES, CHUNK_PIXELS, Cycles
from stripe_kernels.geometry import ConvShape
from stripe_kernels.registry import Config, Pass, Problem

PIXELS, GATHER, BATCH, FILTERS, TAPS = 0, 1, 2, 3, 4
MODES = {"pixels": PIXELS, "gather": GATHER, "batch": BATCH, "filters": FILTERS, "taps": TAPS}
FPROP_ONLY = (FILTERS, TAPS)
# With vectors of 8, measured on 512 KB of L2, pixel lanes have blocks that leave L2 to the weights too, of SHORT_ROWS
# or more: up to 13 % less time. Taller ones win by up to 7 % where the halo is large (strides) or rows are few.
SHORT_BYTES = 300_000
SHORT_ROWS = 7
CHUNK_BYTES = 600_000  # both copies of a chunk of wgrad: where larger ones were slower on Zen 4
TAPS_BYTES = 300_000  # panel and output of a block of pairs of filters
WINDOW = 12  # vectors: a common multiple of the register tiles 2, 3, 4, 6, 12


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
    s, lanes, threads = problem.shape, cost.lanes, problem.threads
    sides = Sides.of(s, which, mode, cost.matrix)
    rows_all, pixels = max(1, sides.rows), max(1, sides.rows * sides.cols)
    if mode == FILTERS:
        images = 1 if pixels >= 16 else max(1, min(s.N, 64 // pixels))
        yield images, 1 if s.N * s.groups >= 4 * threads * images else threads
        return
    if mode == TAPS:
        yield (_tap_rows(problem),)
        return
    if mode == GATHER:
        images = max(1, min(s.N, -(-12 * lanes // pixels)))
        blocks = -(-s.N // images) * s.groups
        for parts in dict.fromkeys((1 if blocks >= threads else threads, 1)):
            yield GATHER, images, rows_all, parts, WINDOW
        return
    batches = [1]
    if mode == BATCH:
        batches = [lanes, 2 * lanes] if lanes < s.N and sides.cols <= 4 else [lanes]
    for images in batches:
        maps = -(-s.N // images) * s.groups
        for rows in _heights(sides, mode, images, cost, problem.channels_last):
            blocks = maps * -(-rows_all // rows)
            if blocks % threads and blocks < 8 * threads:
                # Too few blocks to share out: split the filters of one block, or cut the map into more rows.
                yield mode, images, rows, threads, WINDOW
                cuts = -(-threads // maps)
                finer = -(-rows_all // (cuts * -(-rows_all // rows) if cuts > 1 else threads))
                if finer < rows:
                    yield mode, images, max(1, finer), 1, WINDOW
            elif rows < rows_all and maps < threads:
                yield mode, images, rows_all, threads, WINDOW  # no core writes beside another's rows
            yield mode, images, rows, 1, WINDOW


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


def wgrad_pixels(problem: Problem, cost: Cycles) -> int:
    """Output pixels of a chunk of wgrad: both copies stay near the core, and sums of chunks meet in float64."""
    channels = problem.shape.C + problem.shape.K
    return cost.chunk if 4 * cost.chunk * channels <= CHUNK_BYTES else min(cost.chunk, CHUNK_PIXELS)
