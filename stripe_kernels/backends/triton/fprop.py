"""fprop over clustered filter tiles, with the whole epilogue.

    y[n, k, p, q] = act(scale[k] * conv[n, k, p, q] + bias[k] + residual[n, k, p, q])
    conv[n, k, p, q] = sum_{t in taps of k's tile} sum_c x[n, c, p*u + t_h, q*v + t_w] * w[k, t, c]

A program computes BLOCK_M output pixels of one filter tile, and executes the union of its filters' taps; the
weight of a dead stripe there is zero. A NaN or infinity of x therefore reaches the pixels that read it in
every filter of the tile.

Split by kernel row, the parts of a filter lie in tiles of their own, whose unions are much smaller. A tile then
leaves its sums in a buffer [parts, pixels], in x's dtype as stripe_gemm's products are, and gather.py adds them
up with the epilogue; the batch is cut into chunks whose buffer stays in a cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton.gather import FilterSum
from stripe_kernels.backends.triton.launch import (
    INTERPRETED,
    Launch,
    bits,
    memory_format,
    precision,
    strides,
    to_tf32,
    wide,
    with_zero_row,
)
from stripe_kernels.backends.triton.schedule import FpropSchedule
from stripe_kernels.backends.triton.tile import finish, is_inside, is_met, multiply, taps_met, unravel
from stripe_kernels.indices import IndexArrays
from stripe_kernels.registry import Config, Problem


class FpropConfig(NamedTuple):
    block_m: int  # output pixels
    block_n: int  # filters of a tile
    block_c: int  # channels a step
    split: int  # images of a chunk where filters are split by kernel row; 0: they are whole
    warps: int
    stages: int


# Not compiled anew for other sizes: only strides and channels decide how memory is read.
@triton.jit(do_not_specialize=["tiles", "pixels", "H", "W", "P", "Q", "u", "v", "taps", "c_blocks"])
def fprop_kernel(
    x, w, y, bias, scale, residual,
    filters, group, entry_ptr, offset, tap,
    taps, tiles, c_blocks, pixels, channels, H, W, P, Q, u, v, pitch,
    x_n, x_c, x_h, x_w, y_n, y_k, y_p, y_q, residual_n, residual_k, residual_p, residual_q,
    SPLIT: tl.constexpr, BITS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Tiles of one pixel block are neighbours in the grid: they read the same x, and their stores meet in L2.
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    if WIDE:
        block = block.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = unravel(m, P, Q)
    k = tl.load(filters + tile * BLOCK_N + tl.arange(0, BLOCK_N))
    g = tl.load(group + tile)
    if WIDE:
        k = k.to(tl.int64)
        g = g.to(tl.int64)
    lanes_c = tl.arange(0, BLOCK_C)
    lanes_n = tl.arange(0, BLOCK_N)
    if WIDE:
        lanes_n = lanes_n.to(tl.int64)
    pixel = n * x_n + p * u * x_h + q * v * x_w
    x += g * channels * x_c
    if BITS > 0:
        met = taps_met(p * u, q * v, m < pixels, tap, taps, H, W, BITS)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    entry = tl.load(entry_ptr + tile)
    last = tl.load(entry_ptr + tile + 1)
    c_block = 0
    # The tap of a step is loaded one step ahead: a load whose address waits for a load of its own step
    # would leave the software pipeline half as deep.
    some = entry < last
    t_h = tl.load(offset + 3 * entry, some, 0)
    t_w = tl.load(offset + 3 * entry + 1, some, 0)
    t = tl.load(offset + 3 * entry + 2, some, 0)
    if WIDE:
        t_h = t_h.to(tl.int64)
        t_w = t_w.to(tl.int64)
    for _ in range((last - entry) * c_blocks):
        c = c_block * BLOCK_C + lanes_c
        if WIDE:
            c = c.to(tl.int64)
        if BITS > 0:
            inside = is_met(met, t)
        else:
            inside = is_inside(p * u + t_h, q * v + t_w, m < pixels, H, W)
        x_tile = tl.load(
            x + ((pixel + (t_h * x_h + t_w * x_w))[:, None] + (c * x_c)[None, :]),
            inside[:, None] & (c < channels)[None, :],
            0.0,
        )
        w_at = w + (entry * BLOCK_N + lanes_n) * channels
        w_tile = tl.load(w_at[None, :] + c[:, None], (c < channels)[:, None], 0.0)
        acc = multiply(x_tile, w_tile, acc, PRECISION, CAST)
        c_block += 1
        whole = c_block == c_blocks
        c_block = tl.where(whole, 0, c_block)
        entry = tl.where(whole, entry + 1, entry)
        following = 3 * tl.minimum(entry, last - 1)
        t_h = tl.load(offset + following).to(t_h.dtype)
        t_w = tl.load(offset + following + 1).to(t_w.dtype)
        t = tl.load(offset + following + 2)

    kept = (m < pixels)[:, None] & (k >= 0)[None, :]
    if SPLIT:
        # Up to the pitch, a multiple of 16 as the compiler knows: vectors of 16 bytes.
        y_at = y + (m[:, None] + ((tile * BLOCK_N + lanes_n) * pitch)[None, :])
        tl.store(y_at, acc.to(y.dtype.element_ty), (m < pitch)[:, None] & (k >= 0)[None, :])
    else:
        residual_at = (n * residual_n + p * residual_p + q * residual_q)[:, None] + (k * residual_k)[None, :]
        used = (k >= 0)[None, :]
        acc = finish(acc, k[None, :], used, residual_at, kept, bias, scale, residual, ACTIVATION)
        y_at = y + (n * y_n + p * y_p + q * y_q)[:, None] + (k * y_k)[None, :]
        tl.store(y_at, acc.to(y.dtype.element_ty), kept)


class TritonFprop:
    """Runner: weights packed per (tile, tap) as [entries * block_n, C/g], one launch a call."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.config = FpropConfig(*config)
        self.shape = problem.shape
        self.precision = precision(problem)
        self.format = memory_format(problem)
        split = bool(self.config.split)
        plan = FpropSchedule.of(problem.skeleton, problem.shape, self.config.block_n, split)
        self.tiles, self.taps = len(plan.group), len(plan.tap)
        if split:
            s, parts = problem.shape, [[] for _ in range(problem.shape.K)]  # type: ignore[var-annotated]
            for part, filter_ in enumerate(plan.filters.ravel().tolist()):
                if filter_ >= 0:
                    parts[filter_].append((part, 0, 0, s.P, s.Q))
            self.parts = FilterSum(s, parts, single=True)
        self.arrays = IndexArrays(
            filters=plan.filters,
            group=plan.group,
            entry_ptr=plan.entry_ptr,
            offset=plan.offset,
            tap=plan.tap,
            row=plan.row.reshape(-1),
        )

    def pack(self, weight: Tensor) -> Tensor:
        weight = to_tf32(weight.detach(), self.precision)
        return with_zero_row(weight).index_select(0, self.arrays.on(weight.device)["row"])

    def launch(
        self,
        x: Tensor,  # [n, C, H, W]
        packed: Tensor,  # [entries * block_n, C/g]
        y: Tensor,  # [n, K, P, Q], or the buffer of parts
        bias: Tensor | None = None,  # [K]
        scale: Tensor | None = None,  # [K]
        residual: Tensor | None = None,  # [n, K, P, Q]
        activation: str = "none",
    ) -> Launch:
        s, config = self.shape, self.config
        arrays = self.arrays.on(x.device)
        pixels = len(x) * s.P * s.Q
        y_strides = strides("y", None if config.split else y, "nkpq")
        arguments = {
            "x": x, "w": packed, "y": y, "bias": bias, "scale": scale, "residual": residual,
            **{name: arrays[name] for name in ("filters", "group", "entry_ptr", "offset", "tap")},
            "taps": self.taps, "tiles": self.tiles,
            "c_blocks": triton.cdiv(s.group_c, config.block_c), "pixels": pixels, "channels": s.group_c,
            "H": s.H, "W": s.W, "P": s.P, "Q": s.Q, "u": s.stride[0], "v": s.stride[1],
            "pitch": self.pitch(len(x)),
            **strides("x", x, "nchw"), **y_strides, **strides("residual", residual, "nkpq"),
            "SPLIT": bool(config.split), "BITS": bits(self.taps), "ACTIVATION": activation,
            "PRECISION": self.precision, "CAST": INTERPRETED,
            "WIDE": wide(x, y, residual, packed),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_C": config.block_c,
        }  # fmt: skip
        grid = (triton.cdiv(pixels, config.block_m) * self.tiles,)
        return Launch(fprop_kernel, grid, arguments, config.warps, config.stages)

    def pitch(self, images: int) -> int:
        """Values from part to part of the buffer: whole vectors of 16 bytes of the narrowest type."""
        return -(-images * self.shape.P * self.shape.Q // 16) * 16

    def part_values(self) -> int:
        """Of the buffer of parts."""
        return self.tiles * self.config.block_n * self.pitch(min(self.config.split, self.shape.N))

    def sum_launch(self, parts: Tensor, y: Tensor, *epilogue: Any) -> Launch:
        """The second stage of split filters, of as many images as y has."""
        return self.parts.launch(parts, self.pitch(len(y)), self.shape.P, self.shape.Q, y, *epilogue)

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        s, split = self.shape, self.config.split
        y = torch.empty(s.output_size, dtype=x.dtype, device=x.device, memory_format=self.format)
        if not split:
            self.launch(x, packed, y, bias, scale, residual, act).run(x.device)
            return y
        parts = x.new_empty(self.part_values())
        for first in range(0, s.N, split):
            chunk = slice(first, min(first + split, s.N))
            self.launch(x[chunk], packed, parts).run(x.device)
            rest = None if residual is None else residual[chunk]
            self.sum_launch(parts, y[chunk], bias, scale, rest, act).run(x.device)
        return y
