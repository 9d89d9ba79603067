"""fprop of few channels, the stems of networks: taps and channels are one reduction.

    y[n, k, p, q] = act(scale[k] * sum_l x[n, c_l, p*u + h_l, q*v + w_l] * weight[l, k] + bias[k] + residual)

A slot l is a channel of a tap that one of a block's filters keeps. Tap by tap, as in fprop.py, three channels would
leave 13 of tl.dot's 16 empty, nine times; here nine taps of three channels are one product of 32. A block has
consecutive filters, so that y goes out in whole vectors. A NaN or infinity of x reaches the pixels that read it in
every filter of the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton import launch
from stripe_kernels.backends.triton.launch import (
    INTERPRETED,
    Launch,
    memory_format,
    precision,
    strides,
    to_tf32,
    wide,
    with_zero_row,
)
from stripe_kernels.backends.triton.schedule import STEM_BITS, StemSchedule
from stripe_kernels.backends.triton.tile import finish, multiply, unravel
from stripe_kernels.indices import IndexArrays
from stripe_kernels.registry import Config, Pass, Problem

_CHANNELS = 15  # of a group at most: 16 fill tl.dot


class StemConfig(NamedTuple):
    block_m: int  # output pixels
    block_n: int  # filters
    block_l: int  # slots a step
    warps: int


def refuse(problem: Problem, which: Pass) -> str | None:
    """Why this kernel cannot run a problem, or None."""
    s = problem.shape
    if which != "fprop":
        return "computes fprop"
    if s.group_c > _CHANNELS:
        return f"takes up to {_CHANNELS} channels a group, not {s.group_c}: more fill a step of `triton`"
    if s.R + s.S > STEM_BITS:
        return f"takes filters of up to {STEM_BITS} rows and columns together, not {s.R} and {s.S}"
    return launch.refuse(problem, which)


@triton.jit(
    do_not_specialize=[
        "blocks", "pixels", "H", "W", "P", "Q", "u", "v", "top", "left", "R", "S", "d_h", "d_w",
    ]
)  # fmt: skip
def stem_kernel(
    x, w, y, bias, scale, residual, step_ptr, at_h, at_w, at_c, bits,
    blocks, group_blocks, group_k, channels, pixels,
    H, W, P, Q, u, v, top, left, R, S, d_h, d_w,
    x_n, x_c, x_h, x_w, y_n, y_k, y_p, y_q, residual_n, residual_k, residual_p, residual_q,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks  # those of one run of pixels are neighbours: they read the same x
    run = tl.program_id(0) // blocks
    lane_n = tl.arange(0, BLOCK_N)
    in_group = block % group_blocks * BLOCK_N + lane_n
    g = block // group_blocks
    if WIDE:
        run = run.to(tl.int64)
        in_group = in_group.to(tl.int64)
        g = g.to(tl.int64)
    m = run * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = unravel(m, P, Q)
    real = m < pixels

    # A bit for each row of the filter that meets the image, and for each column.
    i = p * u - top
    j = q * v - left
    met = tl.zeros((BLOCK_M,), tl.int32)
    one = tl.full((), 1, tl.int32)
    for r in range(R):
        at = i + r * d_h
        met = met | tl.where(real & (at >= 0) & (at < H), one << r, 0)
    for s in range(S):
        at = j + s * d_w
        met = met | tl.where(real & (at >= 0) & (at < W), one << (R + s), 0)

    pixel = n * x_n + i * x_h + j * x_w + g * channels * x_c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.load(step_ptr + block), tl.load(step_ptr + block + 1)):
        slot = step * BLOCK_L + tl.arange(0, BLOCK_L)
        x_at = tl.load(at_h + slot) * x_h + tl.load(at_w + slot) * x_w + tl.load(at_c + slot) * x_c
        needed = tl.load(bits + slot)[None, :]
        inside = (met[:, None] & needed) == needed
        x_tile = tl.load(x + (pixel[:, None] + x_at[None, :]), inside, 0.0)
        w_tile = tl.load(w + slot[:, None] * BLOCK_N + lane_n[None, :])
        acc = multiply(x_tile, w_tile, acc, PRECISION, CAST)

    k = (g * group_k + in_group)[None, :]
    used = (in_group < group_k)[None, :]
    kept = real[:, None] & used
    residual_at = (n * residual_n + p * residual_p + q * residual_q)[:, None] + k * residual_k
    acc = finish(acc, k, used, residual_at, kept, bias, scale, residual, ACTIVATION)
    y_at = y + (n * y_n + p * y_p + q * y_q)[:, None] + k * y_k
    tl.store(y_at, acc.to(y.dtype.element_ty), kept)


class TritonStem:
    """Runner: weights packed per block as [slots, block_n], one launch a call."""

    def __init__(self, problem: Problem, which: Pass, config: Config) -> None:
        s = problem.shape
        self.shape, self.config = s, StemConfig(*config)
        self.precision, self.format = precision(problem), memory_format(problem)
        plan = StemSchedule.of(problem.skeleton, s, self.config.block_n, self.config.block_l)
        self.blocks = len(plan.step_ptr) - 1
        at_h, at_w, at_c, bits = plan.slot.T.copy()
        self.arrays = IndexArrays(
            step_ptr=plan.step_ptr, at_h=at_h, at_w=at_w, at_c=at_c, bits=bits, value=plan.value.reshape(-1)
        )

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/g] -> [slots * block_n]
        values = with_zero_row(to_tf32(weight.detach(), self.precision)).reshape(-1)
        return values.index_select(0, self.arrays.on(weight.device)["value"])

    def launch(
        self,
        x: Tensor,  # [N, C, H, W]
        packed: Tensor,  # [slots * block_n]
        y: Tensor,  # [N, K, P, Q]
        bias: Tensor | None,  # [K]
        scale: Tensor | None,  # [K]
        residual: Tensor | None,  # [N, K, P, Q]
        activation: str,
    ) -> Launch:
        s, config = self.shape, self.config
        arrays, pixels = self.arrays.on(x.device), len(x) * s.P * s.Q
        top, left, _, _ = s.padding
        arguments = {
            "x": x, "w": packed, "y": y, "bias": bias, "scale": scale, "residual": residual,
            **{name: arrays[name] for name in ("step_ptr", "at_h", "at_w", "at_c", "bits")},
            "blocks": self.blocks, "group_blocks": self.blocks // s.groups, "group_k": s.group_k,
            "channels": s.group_c, "pixels": pixels, "H": s.H, "W": s.W, "P": s.P, "Q": s.Q,
            "u": s.stride[0], "v": s.stride[1], "top": top, "left": left,
            "R": s.R, "S": s.S, "d_h": s.dilation[0], "d_w": s.dilation[1],
            **strides("x", x, "nchw"), **strides("y", y, "nkpq"), **strides("residual", residual, "nkpq"),
            "ACTIVATION": activation, "PRECISION": self.precision, "CAST": INTERPRETED,
            "WIDE": wide(x, y, residual), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_L": config.block_l,
        }  # fmt: skip
        grid = (triton.cdiv(pixels, config.block_m) * self.blocks,)
        return Launch(stem_kernel, grid, arguments, config.warps, 1)

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
