"""The gather around the vendor's GEMM (backends/gemm.py) in CUDA C++: csrc/cuda/stripe_sum.cu and stripe_spread.cu.

Both read tables that are made once a problem. On an H200 Triton's kernels, bound by the instructions of their masks and
addresses, took half of stripe_gemm's time and more; these take up to three fifths less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import dense_channels_last
from stripe_kernels.backends.cuda_runner import ACTIVATIONS, current_stream, float32, on_device
from stripe_kernels.backends.cuda_tables import DTYPES, one_array
from stripe_kernels.backends.cuda_tiles import patches_of
from stripe_kernels.geometry import ConvShape
from stripe_kernels.indices import IndexArrays
from stripe_kernels.packed import Int32Array
from stripe_kernels.phases import Phase, phases
from stripe_kernels.registry import Problem
from stripe_kernels.roofline import item_size

AT_ONCE = 4  # rows of z that are loaded together
WARPS, PIXELS = 4, 128  # of a block of the sum
WIDTHS = (16, 8, 4, 2)  # filters of a warp: many where there are pixels enough for all processors, else few
BLOCKS = 768  # of the sum, at least: six a multiprocessor of an H100
# Of the spread: more, by splitting the columns, load dy more often (512@7x7: 12 us for 10).
SPREAD_BLOCKS = 132
MASK = 32  # taps of a word
TAPS = 64  # of a spread
SIDE = 1 << 15  # of a map, and of a tap's shift, in either direction
TILES = (128, 64, 32)  # pixels of a block of the spread
ACROSS = 4  # pieces of a row that a warp writes at once
SHARED_BYTES, MOST_BYTES = 56 * 1024, 99 * 1024  # of its shared memory: wanted, and what every chip has
NO_MAP = -1  # rows of z with maps of different sizes


def refuse(problem: Problem, which: str) -> str | None:
    """Torch-free."""
    s, size = problem.shape, item_size(problem.dtype)
    if problem.dtype not in DTYPES:
        return f"takes {', '.join(DTYPES)}, not {problem.dtype}"
    if not problem.channels_last:
        return "takes channels_last"
    if s.N * max(s.H * s.W, s.P * s.Q) >= 2**31 - PIXELS:
        return f"{s} has more pixels than 32 bits number"
    reach = (s.R - 1) * s.dilation[0], (s.S - 1) * s.dilation[1]
    if max(s.H, s.W, s.P, s.Q, *s.padding, *reach) >= SIDE:
        return f"{s} has a side, padding or filter of {SIDE} pixels and more"
    if which != "fprop":
        if s.group_k * size % 16:
            return f"filters come in pieces of 16 bytes, {s.group_k} of a group do not"
        for phase in phases(problem.skeleton, s):
            if len(phase.taps) > TAPS:
                return f"{len(phase.taps)} taps of a phase, at most {TAPS}"
            bytes_ = tiles_of(phase, s, s.group_k * size).bytes
            if bytes_ > MOST_BYTES:
                return f"the pixels of a tile need {bytes_} bytes of shared memory, a block has {MOST_BYTES}"
    return None


class Tiles(NamedTuple):
    """Of a phase: pixels of each, the pixels of dy that they read, most of those, and shared memory of a block."""

    pixels: int
    low: np.ndarray
    counts: np.ndarray
    most: int
    bytes: int


def tiles_of(phase: Phase, s: ConvShape, row_bytes: int) -> Tiles:
    """The largest that leave room for other blocks, or the smallest."""
    shifts = tuple((tap.i, tap.j) for tap in phase.taps)
    for pixels in TILES:
        low, count = patches_of(shifts, (s.N, phase.rows, phase.columns), (s.P, s.Q), pixels)
        most = int(count.max(initial=0))
        bytes_ = (most + 1) * (row_bytes + 16) + -(-len(shifts) * pixels * 2 // 16) * 16
        if bytes_ <= SHARED_BYTES:
            break
    return Tiles(pixels, low, count, most, bytes_)


def sum_tables(
    lists: list[list[tuple[int, int, int, int, int]]], single: bool, width: int
) -> tuple[Int32Array, list[int], list[tuple[int, int]]]:
    """Of every filter its rows of z (number, shift, size of the map), in the order of its sum: [first of each warp's
    filters and the end], rows and maps as stripe_sum.cu has them; where the sections begin; shifts of a single map."""
    keys = sorted({row[1:] for rows in lists for row in rows})
    numbers = {key: i for i, key in enumerate(keys)}
    table: list[tuple[int, int, int, int]] = []
    first = [0]
    for begin in range(0, len(lists), width):
        for slot, rows in enumerate(lists[begin : begin + width]):
            # A filter without a stripe has a row that no pixel meets.
            for i, row in enumerate(rows or [None]):
                where = slot if i else ~slot
                if row is None:
                    table.append((0 if single else -1, 0, 0, where))
                else:
                    number, key = row[0], row[1:]
                    bit = np.uint32(1 << numbers[key]).astype(np.int32) if single else numbers[key]
                    table.append((number, int(bit), key[0] * key[3] + key[1] if single else 0, where))
        while (len(table) - first[-1]) % AT_ONCE:
            table.append((0 if single else -1, 0, 0, slot))
        first.append(len(table))
    maps = np.array(keys or [(0, 0, 0, 0)], np.int32)  # the first one is read where no filter has a stripe
    flat, starts = one_array(np.array(first, np.int32), np.array(table, np.int32).ravel(), maps.ravel())
    return flat, starts, [key[:2] for key in keys] if single else []


@dataclass(frozen=True)
class Spread:
    """Of one phase: sizes of stripe_spread.cu, and where the sections of its table begin."""

    tile: int
    most_rows: int
    pieces: int
    splits: int  # of the pieces
    taps: list[tuple[int, int]]
    sections: list[int]


class CudaGather:
    """The part named "native gather"; `layout` (backends/gemm.py) says where each phase's product lies."""

    bias_dtype = torch.float32  # of the sum: a bias of another type is converted in every call

    def __init__(self, native: Any, layout: Any) -> None:
        self.native, self.layout = native, layout
        s = layout.shape
        tables: dict[str, np.ndarray] = {}
        if layout.kind == "stripe":
            pixels = -(-s.N * s.P * s.Q // PIXELS)
            self.width = next((w for w in WIDTHS if pixels * -(-s.K // (WARPS * w)) >= BLOCKS), WIDTHS[-1])
            lists = layout.rows_by_filter()
            taps = len({row[1:] for rows in lists for row in rows})
            self.single = len(layout.phases) == s.groups and taps <= MASK
            tables["sum"], self.sum_sections, self.shifts = sum_tables(lists, self.single, self.width)
        else:
            self.spreads = []
            for i, phase in enumerate(layout.phases):
                tables[f"spread{i}"], spread = self._spread(phase, layout.taps[i], layout.columns[i])
                self.spreads.append(spread)
        self.arrays = IndexArrays(**tables)

    def _spread(self, phase: Phase, taps: list[Any], columns: int) -> tuple[Int32Array, Spread]:
        s, each = self.layout.shape, self.layout.align
        tiles = tiles_of(phase, s, s.group_k * 16 // each)
        places = np.full(columns, s.group_k, np.int64)  # behind the filters: a zero
        tap_of = np.zeros(columns // each, np.int32)
        for number, (tap, first, last) in enumerate(taps):
            places[first : first + len(tap.filters)] = tap.filters
            tap_of[first // each : last // each] = number
        ranges = np.stack([tiles.low, tiles.counts], 1).astype(np.int32)
        flat, sections = one_array(ranges.ravel(), places.astype(np.uint16).view(np.int32), tap_of)
        splits = min(-(-SPREAD_BLOCKS // max(1, len(tiles.low))), -(-columns // each // ACROSS))
        return flat, Spread(
            tiles.pixels, tiles.most, columns // each, splits, [(tap.i, tap.j) for tap, *_ in taps], sections
        )

    def sum(
        self, z: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
        activation: str,
    ) -> None:  # fmt: skip
        """z: flat, of the layout's kind "stripe"; y [n, K, P, Q], written."""
        s, layout = self.layout.shape, self.layout
        if not y.numel():
            return
        if residual is not None and (residual.stride() != y.stride() or residual.data_ptr() % 16):
            residual = torch.empty_like(y).copy_(residual)
        bias, scale = float32(bias), float32(scale)
        phase = layout.phases[0] if self.single and layout.phases else None
        map_ = (phase.rows, phase.columns) if phase else (NO_MAP, NO_MAP)
        with on_device(y.device):
            self.native.stripe_sum(
                current_stream(y.device), DTYPES[str(y.dtype)[6:]], z.data_ptr(), layout.pitch(len(y)), y.data_ptr(),
                y.stride(), self.arrays.on(y.device)["sum"].data_ptr(),
                (*self.sum_sections[1:], len(y), s.P, s.Q, *map_, s.K, self.width), self.shifts,
                *(0 if t is None else t.data_ptr() for t in (scale, bias, residual)), ACTIVATIONS[activation],
            )  # fmt: skip

    def spread(self, dy: Tensor, i: int, out: Tensor) -> None:
        """P of phase i for the images of dy [n, K, P, Q], channels last, into a flat buffer of the kind "pixel"."""
        s, layout, phase, spread = self.layout.shape, self.layout, self.layout.phases[i], self.spreads[i]
        product = layout.matrix(out, len(dy), i)
        if not product.numel():
            return
        dy = dense_channels_last(dy)
        size = dy.element_size()
        maps = len(dy), phase.rows, phase.columns, s.P, s.Q
        blocks = spread.pieces, spread.tile, spread.most_rows, spread.splits
        with on_device(dy.device):
            self.native.stripe_spread(
                current_stream(dy.device), DTYPES[str(dy.dtype)[6:]], dy.data_ptr(), product.data_ptr(),
                self.arrays.on(dy.device)[f"spread{i}"].data_ptr(), product.stride(0), s.K * size,
                phase.group * s.group_k * size,
                (s.group_k * size, *spread.sections, *maps, *blocks), spread.taps,
            )  # fmt: skip
