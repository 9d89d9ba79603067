"""The gather around the vendor's GEMM (backends/gemm.py), each half one launch.

sum     y[n, k, p, q] = act(scale[k] * sum_{stripes a of k} z[a, (n, p + i_a, q + j_a)] + bias[k] + residual)
spread  P[(n, i, j), a] = dy[n, k_a, i - i_a, j - j_a]

Both walk tap by tap or stripe by stripe with the tap's shift known for the whole row of a tile, so that an
element costs an addition, a comparison and a load. sum reads z of the layout's kind "stripe": a warp's lanes lie
along pixels, and a filter that has fewer stripes than its neighbours costs no memory for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton.launch import Launch, bits, strides, wide
from stripe_kernels.backends.triton.tile import activate, is_inside, taps_met, unravel
from stripe_kernels.geometry import ConvShape
from stripe_kernels.indices import IndexArrays

# Filters of a tile: what 32 bytes of y hold, so that no store is smaller than a sector. More would walk further
# for the one of most stripes.
_FILTERS = 16
_PIXELS = {True: 256, False: 128}  # of a tile, by whether y is channels_last: contiguous ones spilled at 256
_SPREAD = 512  # values of a tile: with 8 warps the fastest of 512 to 4096 on an H100
_WIDEST = 64  # columns of one
Row = tuple[int, int, int, int, int]  # of z: its number, the tap's shift (i, j), rows and columns of its map


@triton.jit(do_not_specialize=["pixels", "k_blocks", "groups", "rows", "columns", "P", "Q", "taps"])
def gather_sum_kernel(
    z, y, bias, scale, residual,
    entry_ptr, column, jump, bit, shift, extent, tap,
    pixels, pitch, k_blocks, groups, group_k, rows, columns, P, Q, taps,
    y_n, y_k, y_p, y_q, residual_n, residual_k, residual_p, residual_q,
    ACTIVATION: tl.constexpr, BITS: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    k_block = tl.program_id(0) % k_blocks
    g = tl.program_id(0) // k_blocks % groups
    block = tl.program_id(0) // k_blocks // groups
    if WIDE:
        block = block.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = unravel(m, P, Q)
    lanes = tl.arange(0, BLOCK_N)
    used = k_block * BLOCK_N + lanes < group_k
    k = g * group_k + k_block * BLOCK_N + lanes
    if WIDE:
        k = k.to(tl.int64)
    real = m < pixels
    if BITS > 0:
        # A single phase: a tap is one jump for every pixel, and which taps meet the image is one word of it.
        pixel = (n * rows + p) * columns + q
        met = taps_met(p, q, real, tap, taps, rows, columns, BITS)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float64 if DOUBLE else tl.float32)
    which = g * k_blocks + k_block
    for entry in range(tl.load(entry_ptr + which), tl.load(entry_ptr + which + 1)):
        at = entry * BLOCK_N + lanes
        a = tl.load(column + at)
        if WIDE:
            a = a.to(tl.int64)
        if BITS > 0:
            z_at = z + ((a * pitch + tl.load(jump + at))[:, None] + pixel[None, :])
            inside = (met[None, :] & tl.load(bit + at)[:, None]) != 0
        else:
            i = p[None, :] + tl.load(shift + 2 * at)[:, None]
            j = q[None, :] + tl.load(shift + 2 * at + 1)[:, None]
            height = tl.load(extent + 2 * at)[:, None]
            width = tl.load(extent + 2 * at + 1)[:, None]
            z_at = z + ((a * pitch)[:, None] + (n[None, :] * height + i) * width + j)
            inside = is_inside(i, j, (a >= 0)[:, None] & real[None, :], height, width)
        acc += tl.load(z_at, inside, 0.0).to(acc.dtype)

    if scale is not None:
        acc *= tl.load(scale + k, used, 0.0).to(acc.dtype)[:, None]
    if bias is not None:
        acc += tl.load(bias + k, used, 0.0).to(acc.dtype)[:, None]
    kept = real[None, :] & used[:, None]
    if residual is not None:
        at_residual = (n * residual_n + p * residual_p + q * residual_q)[None, :] + (k * residual_k)[:, None]
        acc += tl.load(residual + at_residual, kept, 0.0).to(acc.dtype)
    y_at = y + (n * y_n + p * y_p + q * y_q)[None, :] + (k * y_k)[:, None]
    tl.store(y_at, activate(acc, ACTIVATION).to(y.dtype.element_ty), kept)


@triton.jit(do_not_specialize=["blocks", "strips", "rows", "columns", "P", "Q"])
def spread_kernel(
    dy, out, block_of, filters,
    blocks, strips, rows, columns, P, Q,
    dy_n, dy_k, dy_p, dy_q, out_m, out_a,
    PIXELS_FIRST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rows of one image, of one strip of BLOCK_J pixels, in a block of columns, which belongs to one tap: nothing
    is divided in the loop. The tile is flat, so that lanes lie along what is contiguous in `out`: pixels or columns.
    out_m: in units of ALIGN, so that the compiler knows of them."""
    which = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    strip = rest % strips
    n = rest // strips
    first = tl.load(block_of + 4 * which) * ALIGN
    last = tl.load(block_of + 4 * which + 1) * ALIGN
    i0 = tl.load(block_of + 4 * which + 2)
    j0 = tl.load(block_of + 4 * which + 3)
    flat = tl.arange(0, BLOCK_J * BLOCK_N)
    if PIXELS_FIRST:
        a = first + flat // BLOCK_J
        j = strip * BLOCK_J + flat % BLOCK_J
    else:
        a = first + flat % BLOCK_N
        j = strip * BLOCK_J + flat // BLOCK_N
    used = a < last
    k = tl.load(filters + a, used, -1)
    if WIDE:
        n = n.to(tl.int64)
        a = a.to(tl.int64)
        k = k.to(tl.int64)
        j = j.to(tl.int64)
    q = j - j0
    live = (k >= 0) & (q >= 0) & (q < Q)
    used = used & (j < columns)
    dy_at = dy + (n * dy_n + k * dy_k + q * dy_q)
    out_at = out + (n * rows * columns + j) * (out_m * ALIGN) + a * out_a
    for i in range(rows):
        p = i - i0
        value = tl.load(dy_at + p * dy_p, live & (p >= 0) & (p < P), 0.0)
        tl.store(out_at + (i * columns).to(a.dtype) * (out_m * ALIGN), value, used)


class FilterSum:
    """Tables and launch of gather_sum_kernel: y[k] from the rows of z that belong to filter k, in their order."""

    def __init__(self, s: ConvShape, lists: Sequence[Sequence[Row]], single: bool) -> None:
        """lists: for each filter its rows. single: all of them have the same extent."""
        self.shape = s
        self.k_blocks = triton.cdiv(s.group_k, _FILTERS)
        taps = sorted({row[1:3] for rows in lists for row in rows})
        self.bits = bits(len(taps)) if single else 0
        numbers = {tap: i for i, tap in enumerate(taps)}
        counts, tables = [], [np.empty((0, _FILTERS, 7), np.int64)]
        for g in range(s.groups):
            for first in range(g * s.group_k, (g + 1) * s.group_k, _FILTERS):
                block = lists[first : min(first + _FILTERS, (g + 1) * s.group_k)]
                most = max(map(len, block))
                # As many entries as the filter of most rows has; -1 and no bit where others have fewer.
                table = np.tile(np.array((-1, 0, 0, 0, 0, 0, 0), np.int64), (most, _FILTERS, 1))
                for lane, rows in enumerate(block):
                    for entry, (row, i, j, height, width) in enumerate(rows):
                        bit = 1 << numbers[i, j] if self.bits else 0
                        table[entry, lane] = row, i * width + j, bit, i, j, height, width
                counts.append(most)
                tables.append(table)
        column, jump, bit, *rest = np.moveaxis(np.concatenate(tables), 2, 0)
        shift, extent = np.stack(rest[:2], -1), np.stack(rest[2:], -1)
        small = {"column": column, "jump": jump, "shift": shift, "extent": extent, "tap": np.array(taps)}
        self.arrays = IndexArrays(
            entry_ptr=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            bit=bit.astype(np.int32 if self.bits == 32 else np.int64),
            **{name: np.ascontiguousarray(values, np.int32) for name, values in small.items()},
        )
        self.executed = int(sum(counts)) * _FILTERS  # values a pixel, idle ones included

    def launch(
        self,
        z: Tensor,  # [rows, pitch], flat
        pitch: int,
        rows: int,  # of the map of every row of z, where there is one size
        columns: int,
        y: Tensor,  # [n, K, P, Q]
        bias: Tensor | None,  # [K]
        scale: Tensor | None,  # [K]
        residual: Tensor | None,  # [n, K, P, Q]
        activation: str,
    ) -> Launch:
        s = self.shape
        arrays = self.arrays.on(y.device)
        pixels, block_m = len(y) * s.P * s.Q, _PIXELS[y.stride(1) == 1]
        arguments = {
            "z": z, "y": y, "bias": bias, "scale": scale, "residual": residual, **arrays,
            "pixels": pixels, "pitch": pitch, "k_blocks": self.k_blocks, "groups": s.groups,
            "group_k": s.group_k, "rows": rows, "columns": columns, "P": s.P, "Q": s.Q,
            "taps": len(arrays["tap"]), **strides("y", y, "nkpq"), **strides("residual", residual, "nkpq"),
            "ACTIVATION": activation, "BITS": self.bits, "DOUBLE": z.element_size() == 8,
            "WIDE": wide(z, y, residual), "BLOCK_M": block_m, "BLOCK_N": _FILTERS,
        }  # fmt: skip
        grid = (triton.cdiv(pixels, block_m) * s.groups * self.k_blocks,)
        return Launch(gather_sum_kernel, grid, arguments, 4, 1)


class TritonGather:
    """The part named "gather"; `layout` (backends/gemm.py) says where each phase's product lies."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        s = layout.shape
        widest = max((last - first for taps in layout.taps for _, first, last in taps), default=1)
        self.block_n = min(_WIDEST, triton.next_power_of_2(max(16, widest)))
        if layout.kind == "stripe":
            single = len(layout.phases) == s.groups
            self.filters = FilterSum(s, layout.rows_by_filter(), single)
        spreads = [self._spreads(i) for i in range(len(layout.phases))]
        self.arrays = IndexArrays(**{name: array for arrays in spreads for name, array in arrays.items()})

    def _spreads(self, i: int) -> dict[str, np.ndarray]:
        """Of phase i: the filter of every column, -1 where there is no stripe, and the blocks of columns."""
        layout = self.layout
        k0 = layout.phases[i].group * layout.shape.group_k
        filters = np.full(layout.columns[i], -1, np.int32)
        blocks = []
        for tap, first, last in layout.taps[i]:
            filters[first : first + len(tap.filters)] = tap.filters + k0
            for start in range(first, last, self.block_n):
                end = min(start + self.block_n, last)
                blocks.append((start // layout.align, end // layout.align, tap.i, tap.j))
        table = np.array(blocks, np.int32).reshape(-1, 4)
        return {f"filters{i}": filters, f"blocks{i}": table}

    def sum_launch(self, z: Tensor, y: Tensor, *epilogue: Any) -> Launch:
        """z: flat, of the layout's kind "stripe". y [n, K, P, Q], and what follows it, as in FilterSum."""
        phase = self.layout.phases[0]
        return self.filters.launch(z, self.layout.pitch(len(y)), phase.rows, phase.columns, y, *epilogue)

    def sum(self, z: Tensor, y: Tensor, *epilogue: Any) -> None:
        self.sum_launch(z, y, *epilogue).run(y.device)

    def spread_launch(
        self,
        dy: Tensor,  # [n, K, P, Q]
        i: int,
        out: Tensor,  # flat
    ) -> Launch:
        s, layout, phase = self.layout.shape, self.layout, self.layout.phases[i]
        product = layout.matrix(out, len(dy), i)
        out_m, out_a = product.stride() if layout.kind == "pixel" else product.t().stride()
        arrays = self.arrays.on(dy.device)
        blocks = len(arrays[f"blocks{i}"])
        block_j = min(triton.next_power_of_2(phase.columns), _SPREAD // self.block_n)
        strips = triton.cdiv(phase.columns, block_j)
        arguments = {
            "dy": dy, "out": product, "block_of": arrays[f"blocks{i}"], "filters": arrays[f"filters{i}"],
            "blocks": blocks, "strips": strips, "rows": phase.rows, "columns": phase.columns,
            "P": s.P, "Q": s.Q, **strides("dy", dy, "nkpq"), "out_m": out_m // layout.align, "out_a": out_a,
            "PIXELS_FIRST": out_a != 1, "ALIGN": layout.align, "WIDE": wide(dy, out),
            "BLOCK_J": block_j, "BLOCK_N": self.block_n,
        }  # fmt: skip
        return Launch(spread_kernel, (len(dy) * strips * blocks,), arguments, 8, 1)

    def spread(self, dy: Tensor, i: int, out: Tensor) -> None:
        phase = self.layout.phases[i]
        if phase.rows * phase.columns:  # a map narrower than the stride has phases without pixels
            self.spread_launch(dy, i, out).run(dy.device)
