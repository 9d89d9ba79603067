"""fprop over clustered filter tiles, with the whole epilogue.

    y[n, k, p, q] = act(scale[k] * conv[n, k, p, q] + bias[k] + residual[n, k, p, q])
    conv[n, k, p, q] = sum_{t in taps of k's tile} sum_c x[n, c, p*u + t_h, q*v + t_w] * w[k, t, c]

A program computes BLOCK_M output pixels of one filter tile, and executes the union of its filters' taps; the
weight of a dead stripe there is zero. A NaN or infinity of x therefore reaches the pixels that read it in
every filter of the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton.launch import (
    INTERPRETED,
    Launch,
    memory_format,
    precision,
    strides,
    wide,
    with_zero_row,
)
from stripe_kernels.backends.triton.schedule import FpropSchedule
from stripe_kernels.backends.triton.tile import activate, multiply, unravel
from stripe_kernels.indices import IndexArrays
from stripe_kernels.registry import Config, Problem


class FpropConfig(NamedTuple):
    block_m: int  # output pixels
    block_n: int  # filters of a tile
    block_c: int  # channels a step
    warps: int
    stages: int


# Not compiled anew for other sizes: only strides and channels decide how memory is read.
@triton.jit(do_not_specialize=["tiles", "pixels", "H", "W", "P", "Q", "u", "v"])
def fprop_kernel(
    x, w, y, bias, scale, residual,
    filters, group, entry_ptr, offset,
    tiles, pixels, channels, H, W, P, Q, u, v,
    x_n, x_c, x_h, x_w, y_n, y_k, y_p, y_q, residual_n, residual_k, residual_p, residual_q,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
    C_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
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
    x_at = x + n * x_n + p * u * x_h + q * v * x_w + g * channels * x_c

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.load(entry_ptr + tile) * C_BLOCKS
    last = tl.load(entry_ptr + tile + 1) * C_BLOCKS
    # The tap of a step is loaded one step ahead: a load whose address waits for a load of its own step
    # would leave the software pipeline half as deep.
    some = first < last
    t_h = tl.load(offset + first // C_BLOCKS * 2, some, 0)
    t_w = tl.load(offset + first // C_BLOCKS * 2 + 1, some, 0)
    for step in range(first, last):
        entry = step // C_BLOCKS
        c = step % C_BLOCKS * BLOCK_C + lanes_c
        h = p * u + t_h
        s = q * v + t_w
        inside = (m < pixels) & (h >= 0) & (h < H) & (s >= 0) & (s < W)
        x_step = t_h * x_h + t_w * x_w
        if WIDE:
            c = c.to(tl.int64)
            x_step = t_h.to(tl.int64) * x_h + t_w.to(tl.int64) * x_w
        x_tile = tl.load(
            (x_at + x_step)[:, None] + (c * x_c)[None, :],
            inside[:, None] & (c < channels)[None, :],
            0.0,
        )
        w_at = w + (entry * BLOCK_N + lanes_n) * channels
        w_tile = tl.load(w_at[None, :] + c[:, None], (c < channels)[:, None], 0.0)
        acc = multiply(x_tile, w_tile, acc, PRECISION, CAST)
        following = tl.minimum(step + 1, last - 1) // C_BLOCKS * 2
        t_h = tl.load(offset + following)
        t_w = tl.load(offset + following + 1)

    if scale is not None:
        acc *= tl.load(scale + k, k >= 0, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + k, k >= 0, 0.0).to(tl.float32)[None, :]
    kept = (m < pixels)[:, None] & (k >= 0)[None, :]
    if residual is not None:
        at = (n * residual_n + p * residual_p + q * residual_q)[:, None] + (k * residual_k)[None, :]
        acc += tl.load(residual + at, kept, 0.0).to(tl.float32)
    y_at = y + (n * y_n + p * y_p + q * y_q)[:, None] + (k * y_k)[None, :]
    tl.store(y_at, activate(acc, ACTIVATION).to(y.dtype.element_ty), kept)


class TritonFprop:
    """Runner: weights packed per (tile, tap) as [entries * block_n, C/g], one launch a call."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.config = FpropConfig(*config)
        self.shape = problem.shape
        self.format = memory_format(problem)
        plan = FpropSchedule.of(problem.skeleton, problem.shape, self.config.block_n)
        self.tiles = len(plan.group)
        self.arrays = IndexArrays(
            filters=plan.filters,
            group=plan.group,
            entry_ptr=plan.entry_ptr,
            offset=plan.offset,
            row=plan.row.reshape(-1),
        )

    def pack(self, weight: Tensor) -> Tensor:
        return with_zero_row(weight).index_select(0, self.arrays.on(weight.device)["row"])

    def launch(
        self,
        x: Tensor,  # [N, C, H, W]
        packed: Tensor,  # [entries * block_n, C/g]
        y: Tensor,  # [N, K, P, Q]
        bias: Tensor | None,  # [K]
        scale: Tensor | None,  # [K]
        residual: Tensor | None,  # [N, K, P, Q]
        activation: str,
    ) -> Launch:
        s, config = self.shape, self.config
        arrays = self.arrays.on(x.device)
        pixels = s.N * s.P * s.Q
        arguments = {
            "x": x, "w": packed, "y": y, "bias": bias, "scale": scale, "residual": residual,
            "filters": arrays["filters"], "group": arrays["group"], "entry_ptr": arrays["entry_ptr"],
            "offset": arrays["offset"],
            "tiles": self.tiles, "pixels": pixels, "channels": s.group_c,
            "H": s.H, "W": s.W, "P": s.P, "Q": s.Q, "u": s.stride[0], "v": s.stride[1],
            **strides("x", x, "nchw"), **strides("y", y, "nkpq"), **strides("residual", residual, "nkpq"),
            "ACTIVATION": activation, "PRECISION": precision(x.dtype), "CAST": INTERPRETED,
            "WIDE": wide(x, y, residual, packed), "C_BLOCKS": triton.cdiv(s.group_c, config.block_c),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_C": config.block_c,
        }  # fmt: skip
        grid = (triton.cdiv(pixels, config.block_m) * self.tiles,)
        return Launch(fprop_kernel, grid, arguments, config.warps, config.stages)

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        y = torch.empty(self.shape.output_size, dtype=x.dtype, device=x.device, memory_format=self.format)
        self.launch(x, packed, y, bias, scale, residual, act).run(x.device)
        return y
