"""The gather around the vendor's GEMM (backends/gemm.py), each half one launch.

sum     y[n, k, p, q] = act(scale[k] * sum_{taps t of k} z[n, p + t_i, q + t_j, a(k, t)] + bias[k] + residual)
spread  P[n, i, j, a] = dy[n, k_a, i - t_i, j - t_j]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton.launch import Launch, strides, wide
from stripe_kernels.backends.triton.tile import activate, unravel
from stripe_kernels.indices import IndexArrays

# Neighbours in memory are pixels in the planar layout and stripes in the other: the block is long in that
# direction.
_PLANAR, _PIXEL_MAJOR = (128, 16), (32, 64)


@triton.jit(do_not_specialize=["images", "pixels", "k_blocks", "groups", "P", "Q"])
def gather_sum_kernel(
    z, y, bias, scale, residual,
    entry_ptr, entry, column,
    images, pixels, k_blocks, groups, group_k, P, Q,
    y_n, y_k, y_p, y_q, residual_n, residual_k, residual_p, residual_q,
    ACTIVATION: tl.constexpr, PLANAR: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    k_block = tl.program_id(0) % k_blocks
    g = tl.program_id(0) // k_blocks % groups
    block = tl.program_id(0) // k_blocks // groups
    if WIDE:
        block = block.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = unravel(m, P, Q)
    lanes = k_block * BLOCK_N + tl.arange(0, BLOCK_N)
    used = lanes < group_k
    k = g * group_k + lanes
    if WIDE:
        k = k.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if DOUBLE else tl.float32)
    for at in range(tl.load(entry_ptr + g), tl.load(entry_ptr + g + 1)):
        before = tl.load(entry + 6 * at)
        stripes = tl.load(entry + 6 * at + 1)
        rows = tl.load(entry + 6 * at + 2)
        columns = tl.load(entry + 6 * at + 3)
        i = p + tl.load(entry + 6 * at + 4)
        j = q + tl.load(entry + 6 * at + 5)
        a = tl.load(column + at * group_k + lanes, used, -1)
        if WIDE:
            a = a.to(tl.int64)
        else:
            before = before.to(tl.int32)
            stripes = stripes.to(tl.int32)
            rows = rows.to(tl.int32)
            columns = columns.to(tl.int32)
            i = i.to(tl.int32)
            j = j.to(tl.int32)
        inside = (m < pixels) & (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        if PLANAR:
            pixel = (n * stripes * rows + i) * columns + j
            a = a * rows * columns
        else:
            pixel = ((n * rows + i) * columns + j) * stripes
        z_at = z + images * before + pixel[:, None] + a[None, :]
        acc += tl.load(z_at, inside[:, None] & (a >= 0)[None, :], 0.0).to(acc.dtype)

    if scale is not None:
        acc *= tl.load(scale + k, used, 0.0).to(acc.dtype)[None, :]
    if bias is not None:
        acc += tl.load(bias + k, used, 0.0).to(acc.dtype)[None, :]
    kept = (m < pixels)[:, None] & used[None, :]
    if residual is not None:
        at_residual = (n * residual_n + p * residual_p + q * residual_q)[:, None] + (k * residual_k)[None, :]
        acc += tl.load(residual + at_residual, kept, 0.0).to(acc.dtype)
    y_at = y + (n * y_n + p * y_p + q * y_q)[:, None] + (k * y_k)[None, :]
    tl.store(y_at, activate(acc, ACTIVATION).to(y.dtype.element_ty), kept)


@triton.jit(do_not_specialize=["pixels", "a_blocks", "rows", "columns", "P", "Q"])
def spread_kernel(
    dy, out, stripe,
    pixels, stripes, a_blocks, rows, columns, P, Q,
    dy_n, dy_k, dy_p, dy_q,
    PLANAR: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(0) % a_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(0) // a_blocks
    if WIDE:
        block = block.to(tl.int64)
        a = a.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n, i, j = unravel(m, rows, columns)
    used = a < stripes
    k = tl.load(stripe + 3 * a, used, 0)
    if WIDE:
        k = k.to(tl.int64)
    p = i[:, None] - tl.load(stripe + 3 * a + 1, used, 0)[None, :]
    q = j[:, None] - tl.load(stripe + 3 * a + 2, used, 0)[None, :]
    kept = (m < pixels)[:, None] & used[None, :]
    inside = kept & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
    value = tl.load(dy + (n * dy_n)[:, None] + (k * dy_k)[None, :] + p * dy_p + q * dy_q, inside, 0.0)
    if PLANAR:
        at = (n * stripes * rows * columns + i * columns + j)[:, None] + (a * rows * columns)[None, :]
    else:
        at = (m * stripes)[:, None] + a[None, :]
    tl.store(out + at, value, kept)


class TritonGather:
    """The part named "gather"; `layout` says where each phase's product lies."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        s = layout.shape
        entries, columns, counts = [], [], [0] * s.groups
        stripes = []
        for before, phase in zip(layout.before, layout.phases, strict=True):
            counts[phase.group] += len(phase.taps)
            table = np.zeros((phase.stripes, 3), np.int32)
            for tap in phase.taps:
                entries.append((before, phase.stripes, phase.rows, phase.columns, tap.i, tap.j))
                column = np.full(s.group_k, -1, np.int32)
                column[tap.filters] = np.arange(tap.first, tap.last)
                columns.append(column)
                table[tap.first : tap.last, 0] = tap.filters + phase.group * s.group_k
                table[tap.first : tap.last, 1:] = tap.i, tap.j
            stripes.append(table)
        self.arrays = IndexArrays(
            entry_ptr=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            entry=np.array(entries, np.int64).reshape(-1, 6),
            column=np.array(columns, np.int32).reshape(-1, s.group_k),
            **{f"stripe{i}": table for i, table in enumerate(stripes)},
        )
        self.block_m, self.block_n = _PLANAR if layout.planar else _PIXEL_MAJOR

    def sum_launch(
        self,
        z: Tensor,  # flat
        y: Tensor,  # [n, K, P, Q]
        bias: Tensor | None,  # [K]
        scale: Tensor | None,  # [K]
        residual: Tensor | None,  # [n, K, P, Q]
        activation: str,
    ) -> Launch:
        s = self.layout.shape
        arrays = self.arrays.on(y.device)
        pixels = len(y) * s.P * s.Q
        k_blocks = triton.cdiv(s.group_k, self.block_n)
        arguments = {
            "z": z, "y": y, "bias": bias, "scale": scale, "residual": residual,
            "entry_ptr": arrays["entry_ptr"], "entry": arrays["entry"], "column": arrays["column"],
            "images": len(y), "pixels": pixels, "k_blocks": k_blocks, "groups": s.groups,
            "group_k": s.group_k, "P": s.P, "Q": s.Q,
            **strides("y", y, "nkpq"), **strides("residual", residual, "nkpq"),
            "ACTIVATION": activation, "PLANAR": self.layout.planar, "DOUBLE": z.element_size() == 8,
            "WIDE": wide(z, y, residual), "BLOCK_M": self.block_m, "BLOCK_N": self.block_n,
        }  # fmt: skip
        grid = (triton.cdiv(pixels, self.block_m) * s.groups * k_blocks,)
        return Launch(gather_sum_kernel, grid, arguments, 4, 3)

    def sum(self, z: Tensor, y: Tensor, *epilogue: Any) -> None:
        self.sum_launch(z, y, *epilogue).run(y.device)

    def spread_launch(
        self,
        dy: Tensor,  # [n, K, P, Q]
        i: int,
        out: Tensor,  # flat
    ) -> Launch:
        s, phase = self.layout.shape, self.layout.phases[i]
        product = self.layout.product(out, len(dy), i)
        pixels = len(dy) * phase.pixels
        a_blocks = triton.cdiv(phase.stripes, self.block_n)
        arguments = {
            "dy": dy, "out": product, "stripe": self.arrays.on(dy.device)[f"stripe{i}"],
            "pixels": pixels, "stripes": phase.stripes, "a_blocks": a_blocks,
            "rows": phase.rows, "columns": phase.columns, "P": s.P, "Q": s.Q, **strides("dy", dy, "nkpq"),
            "PLANAR": self.layout.planar, "WIDE": wide(dy, product),
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n,
        }  # fmt: skip
        return Launch(spread_kernel, (triton.cdiv(pixels, self.block_m) * a_blocks,), arguments, 4, 1)

    def spread(self, dy: Tensor, i: int, out: Tensor) -> None:
        self.spread_launch(dy, i, out).run(dy.device)
