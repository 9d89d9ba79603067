"""wgrad of the live stripes a = (k_a, t).

    dw[a, c] = sum_{n, p, q} dy[n, k_a, p, q] * x[n, c, p*u + t_h, q*v + t_w]

(filter, tap) is only an output index: live stripes are computed and no others. Output pixels are split into
`splits` parts with a float32 partial result each, and a second kernel adds the parts in their order: run to
run the bits repeat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton.launch import INTERPRETED, Launch, precision, strides, wide
from stripe_kernels.backends.triton.schedule import WgradSchedule
from stripe_kernels.backends.triton.tile import gathered, is_inside, multiply, unravel
from stripe_kernels.indices import IndexArrays
from stripe_kernels.registry import Config, Problem

_REDUCE = 1024  # values a program of the second stage


class WgradConfig(NamedTuple):
    block_k: int  # live filters of one tap
    block_n: int  # channels
    block_m: int  # output pixels a step
    splits: int
    planar: int  # 1: dy is copied to NCHW first, where a gathered filter is a row of consecutive pixels
    warps: int
    stages: int


def is_flat(dy: Tensor) -> bool:
    """Whether pixels of all images are evenly spaced: then nothing of dy's address is computed in a step."""
    _, _, p, q = dy.shape
    return dy.stride(2) == q * dy.stride(3) and dy.stride(0) == p * dy.stride(2)


# Not compiled anew for other sizes: only strides and channels decide how memory is read.
@triton.jit(
    do_not_specialize=["entries", "c_blocks", "pixels", "steps", "stripes", "H", "W", "P", "Q", "u", "v"]
)
def wgrad_kernel(
    dy, x, dw,
    group, offset, filters, row,
    entries, c_blocks, pixels, steps, stripes, channels, H, W, P, Q, u, v,
    dy_n, dy_k, dy_p, dy_q, x_n, x_c, x_h, x_w,
    LAST: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c_block = tl.program_id(0) % c_blocks
    entry = tl.program_id(0) // c_blocks % entries
    split = tl.program_id(0) // c_blocks // entries
    g = tl.load(group + entry)
    t_h = tl.load(offset + 2 * entry)
    t_w = tl.load(offset + 2 * entry + 1)
    k = tl.load(filters + entry * BLOCK_K + tl.arange(0, BLOCK_K))
    a = tl.load(row + entry * BLOCK_K + tl.arange(0, BLOCK_K))
    c = c_block * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * steps * BLOCK_M
    if WIDE:
        k = k.to(tl.int64)
        a = a.to(tl.int64)
        c = c.to(tl.int64)
        g = g.to(tl.int64)
        first = split.to(tl.int64) * steps * BLOCK_M
    x += (g * channels) * x_c
    live = k >= 0
    kept_c = c < channels
    # Channels are the rows of the tile: Hopper's wgmma needs 64 of them, and few filters of a tap may live.
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # A step goes BLOCK_M pixels on: two additions with carries, where dividing anew cost twenty times the product.
    n, p, q = unravel(first + tl.arange(0, BLOCK_M), P, Q)
    more_q = BLOCK_M % Q
    more_p = BLOCK_M // Q % P
    more_n = BLOCK_M // Q // P
    left = pixels - first - tl.arange(0, BLOCK_M)
    # As in dgrad: the next tile of dy is on its way while one is multiplied.
    pixel = n * dy_n + p * dy_p + q * dy_q
    following = gathered(dy, pixel, k * dy_k, left > 0, live, LAST)
    for _ in range(steps):
        dy_tile = following
        h = p * u + t_h
        s = q * v + t_w
        inside = is_inside(h, s, left > 0, H, W)
        x_tile = tl.load(
            x + ((c * x_c)[:, None] + (n * x_n + h * x_h + s * x_w)[None, :]),
            kept_c[:, None] & inside[None, :],
            0.0,
        )
        q += more_q
        carry = (q >= Q).to(tl.int32)
        q -= carry * Q
        p += more_p + carry
        carry = (p >= P).to(tl.int32)
        p -= carry * P
        n += more_n + carry
        left -= BLOCK_M
        if FLAT:
            dy += BLOCK_M * dy_q
        else:
            pixel = n * dy_n + p * dy_p + q * dy_q
        following = gathered(dy, pixel, k * dy_k, left > 0, live, LAST)
        acc = multiply(x_tile, dy_tile, acc, PRECISION, CAST)

    at = (split * stripes + a) * channels
    if WIDE:
        at = (split.to(tl.int64) * stripes + a) * channels
    kept = (c < channels)[:, None] & (a >= 0)[None, :]
    tl.store(dw + at[None, :] + c[:, None], acc.to(dw.dtype.element_ty), kept)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(parts, dw, splits, values, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """dw[i] = parts[0, i] + parts[1, i] + ... in this order."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    at = i
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts + at, i < values, 0.0)
        at += values
    tl.store(dw + i, acc.to(dw.dtype.element_ty), i < values)


class TritonWgrad:
    """Runner: one launch, and a second one where the pixels are split."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.config = WgradConfig(*config)
        self.shape = problem.shape
        self.precision = precision(problem)
        self.stripes = problem.skeleton.stripes
        plan = WgradSchedule.of(problem.skeleton, problem.shape, self.config.block_k)
        self.entries = len(plan.group)
        self.arrays = IndexArrays(group=plan.group, offset=plan.offset, filters=plan.filters, row=plan.row)

    def launch(
        self,
        dy: Tensor,  # [N, K, P, Q]
        x: Tensor,  # [N, C, H, W]
        dw: Tensor,  # [splits, A, C/g] float32, or [1, A, C/g] in the result's dtype
    ) -> Launch:
        s, config = self.shape, self.config
        arrays = self.arrays.on(x.device)
        pixels = s.N * s.P * s.Q
        c_blocks = triton.cdiv(s.group_c, config.block_n)
        steps = triton.cdiv(triton.cdiv(pixels, config.block_m), config.splits)
        arguments = {
            "dy": dy, "x": x, "dw": dw, **arrays,
            "entries": self.entries, "c_blocks": c_blocks, "pixels": pixels, "steps": steps,
            "stripes": self.stripes, "channels": s.group_c,
            "H": s.H, "W": s.W, "P": s.P, "Q": s.Q, "u": s.stride[0], "v": s.stride[1],
            **strides("dy", dy, "nkpq"), **strides("x", x, "nchw"),
            "LAST": dy.stride(1) == 1, "FLAT": is_flat(dy), "PRECISION": self.precision,
            "CAST": INTERPRETED, "WIDE": wide(dy, x, dw),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        }  # fmt: skip
        grid = (c_blocks * self.entries * config.splits,)
        return Launch(wgrad_kernel, grid, arguments, config.warps, config.stages)

    def sum_launch(
        self,
        parts: Tensor,  # [splits, A, C/g] float32
        dw: Tensor,  # [A, C/g]
    ) -> Launch:
        arguments = {
            "parts": parts, "dw": dw, "splits": len(parts), "values": dw.numel(),
            "WIDE": wide(parts), "BLOCK": _REDUCE,
        }  # fmt: skip
        return Launch(sum_splits_kernel, (triton.cdiv(dw.numel(), _REDUCE),), arguments, 4, 1)

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        dw = x.new_empty(self.stripes, self.shape.group_c)
        dy = dy.contiguous() if self.config.planar else dy
        if self.config.splits == 1:
            self.launch(dy, x, dw[None]).run(x.device)
            return dw
        parts = dw.new_empty(self.config.splits, *dw.shape, dtype=torch.float32)
        self.launch(dy, x, parts).run(x.device)
        self.sum_launch(parts, dw).run(x.device)
        return dw
