"""dgrad over the live stripes of each input phase.

    dx[n, c, h, w] = sum_{live (k, t): h = p*u + t_h, w = q*v + t_w} dy[n, k, p, q] * w[k, t, c]

The filter is a reduction index here, so a list holds live stripes and nothing else, up to rounding each
tap's filters to BLOCK_K (ALIGNED: to aligned blocks of BLOCK_K filters, which read dy in whole vectors).
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
from stripe_kernels.backends.triton.schedule import DgradSchedule
from stripe_kernels.backends.triton.tile import multiply, unravel
from stripe_kernels.indices import IndexArrays
from stripe_kernels.registry import Config, Problem


class DgradConfig(NamedTuple):
    block_m: int  # input pixels of one phase
    block_n: int  # channels
    block_k: int  # filters a step
    aligned: int  # 1: whole blocks of filters, 0: gathered live filters
    planar: int  # 1: dy is copied to NCHW first, where a gathered filter is a row of consecutive pixels
    warps: int
    stages: int


# Not compiled anew for other sizes: only strides and channels decide how memory is read.
@triton.jit(
    do_not_specialize=["lists", "c_blocks", "pixels", "H", "W", "P", "Q", "rows", "columns", "u", "v"]
)
def dgrad_kernel(
    dy, w, dx,
    origin, entry_ptr, offset, filters,
    lists, c_blocks, pixels, channels, group_k, H, W, P, Q, rows, columns, u, v,
    dy_n, dy_k, dy_p, dy_q, dx_n, dx_c, dx_h, dx_w,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c_block = tl.program_id(0) % c_blocks
    which = tl.program_id(0) // c_blocks % lists
    block = tl.program_id(0) // c_blocks // lists
    group = tl.load(origin + 3 * which)
    h0 = tl.load(origin + 3 * which + 1)
    w0 = tl.load(origin + 3 * which + 2)
    lanes_k = tl.arange(0, BLOCK_K)
    c = c_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        block = block.to(tl.int64)
        group = group.to(tl.int64)
        lanes_k = lanes_k.to(tl.int64)
        c = c.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n, i, j = unravel(m, rows, columns)
    h = h0 + i * u
    s = w0 + j * v
    real = (m < pixels) & (h < H) & (s < W)
    dy_at = dy + n * dy_n + group * group_k * dy_k

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.load(entry_ptr + which)
    last = tl.load(entry_ptr + which + 1)
    # Indices of a step are loaded one step ahead: a load whose address waits for a load of its own step
    # would leave the software pipeline half as deep.
    some = first < last
    p_off = tl.load(offset + 2 * first, some, 0)
    q_off = tl.load(offset + 2 * first + 1, some, 0)
    k_block = tl.load(filters + first * BLOCK_K, some & ALIGNED, 0)
    k_list = tl.load(filters + first * BLOCK_K + lanes_k, some & (not ALIGNED), 0)
    for entry in range(first, last):
        p = i + p_off
        q = j + q_off
        if ALIGNED:
            # A multiple of BLOCK_K by construction: divided and multiplied again so that the compiler knows.
            k = k_block // BLOCK_K * BLOCK_K + lanes_k
            used = k < group_k
        else:
            k = k_list
            used = k >= 0
        following = tl.minimum(entry + 1, last - 1)
        if WIDE:
            k = k.to(tl.int64)
        inside = real & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        dy_tile = tl.load(
            (dy_at + p * dy_p + q * dy_q)[:, None] + (k * dy_k)[None, :],
            inside[:, None] & used[None, :],
            0.0,
        )
        w_at = w + (entry * BLOCK_K + lanes_k) * channels
        w_tile = tl.load(w_at[:, None] + c[None, :], (c < channels)[None, :], 0.0)
        acc = multiply(dy_tile, w_tile, acc, PRECISION, CAST)
        p_off = tl.load(offset + 2 * following)
        q_off = tl.load(offset + 2 * following + 1)
        if ALIGNED:
            k_block = tl.load(filters + following * BLOCK_K)
        else:
            k_list = tl.load(filters + following * BLOCK_K + lanes_k)

    dx_at = dx + (n * dx_n + h * dx_h + s * dx_w)[:, None] + ((c + group * channels) * dx_c)[None, :]
    tl.store(dx_at, acc.to(dx.dtype.element_ty), real[:, None] & (c < channels)[None, :])


class TritonDgrad:
    """Runner: weights packed per (phase, tap) as [entries * block_k, C/g], one launch a call."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.config = DgradConfig(*config)
        self.shape = problem.shape
        self.format = memory_format(problem)
        plan = DgradSchedule.of(
            problem.skeleton, problem.shape, self.config.block_k, bool(self.config.aligned)
        )
        self.lists = len(plan.origin)
        self.arrays = IndexArrays(
            origin=plan.origin,
            entry_ptr=plan.entry_ptr,
            offset=plan.offset,
            filters=plan.filters,
            row=plan.row.reshape(-1),
        )

    def pack(self, weight: Tensor) -> Tensor:
        return with_zero_row(weight).index_select(0, self.arrays.on(weight.device)["row"])

    def launch(
        self,
        dy: Tensor,  # [N, K, P, Q]
        packed: Tensor,  # [entries * block_k, C/g]
        dx: Tensor,  # [N, C, H, W]
    ) -> Launch:
        s, config = self.shape, self.config
        arrays = self.arrays.on(dy.device)
        rows, columns = triton.cdiv(s.H, s.stride[0]), triton.cdiv(s.W, s.stride[1])
        pixels = s.N * rows * columns
        c_blocks = triton.cdiv(s.group_c, config.block_n)
        arguments = {
            "dy": dy, "w": packed, "dx": dx, "origin": arrays["origin"], "entry_ptr": arrays["entry_ptr"],
            "offset": arrays["offset"], "filters": arrays["filters"],
            "lists": self.lists, "c_blocks": c_blocks, "pixels": pixels, "channels": s.group_c,
            "group_k": s.group_k, "H": s.H, "W": s.W, "P": s.P, "Q": s.Q, "rows": rows, "columns": columns,
            "u": s.stride[0], "v": s.stride[1],
            **strides("dy", dy, "nkpq"), **strides("dx", dx, "nchw"),
            "ALIGNED": bool(config.aligned), "PRECISION": precision(dy.dtype), "CAST": INTERPRETED,
            "WIDE": wide(dy, dx, packed),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        }  # fmt: skip
        grid = (triton.cdiv(pixels, config.block_m) * self.lists * c_blocks,)
        return Launch(dgrad_kernel, grid, arguments, config.warps, config.stages)

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        dx = torch.empty(self.shape.input_size, dtype=dy.dtype, device=dy.device, memory_format=self.format)
        dy = dy.contiguous() if self.config.planar else dy
        self.launch(dy, packed, dx).run(dy.device)
        return dx
