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
    bits,
    memory_format,
    precision,
    strides,
    to_tf32,
    wide,
    with_zero_row,
)
from stripe_kernels.backends.triton.schedule import DgradSchedule
from stripe_kernels.backends.triton.tile import gathered, is_inside, is_met, multiply, taps_met, unravel
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


@triton.jit
def dy_values(
    dy, pixel, i, j, met, p_off, q_off, t, k, P, Q, dy_k, dy_p, dy_q,
    LAST: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[pixels, filters] of one entry. met: the taps that meet the map, or which pixels there are (BITS 0)."""
    if BITS > 0:
        inside = is_met(met, t)
    else:
        inside = is_inside(i + p_off, j + q_off, met, P, Q)
    if WIDE:
        k = k.to(tl.int64)
        p_off = p_off.to(tl.int64)
        q_off = q_off.to(tl.int64)
    return gathered(dy, pixel, k * dy_k + (p_off * dy_p + q_off * dy_q), inside, k >= 0, LAST)


# Not compiled anew for other sizes: only strides and channels decide how memory is read.
@triton.jit(
    do_not_specialize=["taps", "lists", "c_blocks", "pixels", "H", "W", "P", "Q", "rows", "columns", "u", "v"]
)
def dgrad_kernel(
    dy, w, dx,
    origin, entry_ptr, offset, filters, tap,
    taps, lists, c_blocks, pixels, channels, group_k, H, W, P, Q, rows, columns, u, v,
    dy_n, dy_k, dy_p, dy_q, dx_n, dx_c, dx_h, dx_w,
    ALIGNED: tl.constexpr, LAST: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    CAST: tl.constexpr, WIDE: tl.constexpr,
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
    pixel = n * dy_n + i * dy_p + j * dy_q
    dy += group * group_k * dy_k
    if BITS > 0:
        met = taps_met(i, j, real, tap, taps, P, Q, BITS)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.load(entry_ptr + which)
    last = tl.load(entry_ptr + which + 1)
    some = first < last
    w_at = w + (first * BLOCK_K + lanes_k)[:, None] * channels + c[None, :]
    w_step = BLOCK_K * channels
    if ALIGNED:
        # Indices of a step are loaded one step ahead: a load whose address waits for a load of its own step
        # would leave the software pipeline half as deep.
        p_off = tl.load(offset + 3 * first, some, 0)
        q_off = tl.load(offset + 3 * first + 1, some, 0)
        t = tl.load(offset + 3 * first + 2, some, 0)
        k_block = tl.load(filters + first * BLOCK_K, some, 0)
        for entry in range(first, last):
            # A multiple of BLOCK_K by construction: divided and multiplied again so that the compiler knows.
            k = k_block // BLOCK_K * BLOCK_K + lanes_k
            following = tl.minimum(entry + 1, last - 1)
            if BITS > 0:
                inside = is_met(met, t)
            else:
                inside = is_inside(i + p_off, j + q_off, real, P, Q)
            jump = p_off * dy_p + q_off * dy_q
            if WIDE:
                jump = p_off.to(tl.int64) * dy_p + q_off.to(tl.int64) * dy_q
            dy_tile = tl.load(
                dy + ((pixel + jump)[:, None] + (k * dy_k)[None, :]),
                inside[:, None] & (k < group_k)[None, :],
                0.0,
            )
            w_tile = tl.load(w_at, (c < channels)[None, :], 0.0)
            w_at += w_step
            acc = multiply(dy_tile, w_tile, acc, PRECISION, CAST)
            p_off = tl.load(offset + 3 * following)
            q_off = tl.load(offset + 3 * following + 1)
            t = tl.load(offset + 3 * following + 2)
            k_block = tl.load(filters + following * BLOCK_K)
    else:
        # Triton copies nothing narrower than 4 bytes asynchronously, so the pipeline is written out: while a
        # tile is multiplied the next one is on its way to registers, and the indices of the one after that.
        p_off = tl.load(offset + 3 * first, some, 0)
        q_off = tl.load(offset + 3 * first + 1, some, 0)
        t = tl.load(offset + 3 * first + 2, some, 0)
        k = tl.load(filters + first * BLOCK_K + lanes_k, some, -1)
        following = dy_values(
            dy,
            pixel,
            i,
            j,
            met if BITS > 0 else real,
            p_off,
            q_off,
            t,
            k,
            P,
            Q,
            dy_k,
            dy_p,
            dy_q,
            LAST,
            BITS,
            WIDE,
        )
        second = tl.minimum(first + 1, last - 1)
        p_off = tl.load(offset + 3 * second, some, 0)
        q_off = tl.load(offset + 3 * second + 1, some, 0)
        t = tl.load(offset + 3 * second + 2, some, 0)
        k = tl.load(filters + second * BLOCK_K + lanes_k, some, -1)
        for entry in range(first, last):
            dy_tile = following
            following = dy_values(
                dy,
                pixel,
                i,
                j,
                met if BITS > 0 else real,
                p_off,
                q_off,
                t,
                k,
                P,
                Q,
                dy_k,
                dy_p,
                dy_q,
                LAST,
                BITS,
                WIDE,
            )
            third = tl.minimum(entry + 2, last - 1)
            p_off = tl.load(offset + 3 * third)
            q_off = tl.load(offset + 3 * third + 1)
            t = tl.load(offset + 3 * third + 2)
            k = tl.load(filters + third * BLOCK_K + lanes_k)
            w_tile = tl.load(w_at, (c < channels)[None, :], 0.0)
            w_at += w_step
            acc = multiply(dy_tile, w_tile, acc, PRECISION, CAST)

    dx_at = dx + (n * dx_n + h * dx_h + s * dx_w)[:, None] + ((c + group * channels) * dx_c)[None, :]
    tl.store(dx_at, acc.to(dx.dtype.element_ty), real[:, None] & (c < channels)[None, :])


class TritonDgrad:
    """Runner: weights packed per (phase, tap) as [entries * block_k, C/g], one launch a call."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.config = DgradConfig(*config)
        self.shape = problem.shape
        self.precision = precision(problem)
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
            tap=plan.tap,
            row=plan.row.reshape(-1),
        )
        self.taps = len(plan.tap)

    def pack(self, weight: Tensor) -> Tensor:
        weight = to_tf32(weight.detach(), self.precision)
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
            "offset": arrays["offset"], "filters": arrays["filters"], "tap": arrays["tap"],
            "taps": self.taps, "lists": self.lists, "c_blocks": c_blocks, "pixels": pixels, "channels": s.group_c,
            "group_k": s.group_k, "H": s.H, "W": s.W, "P": s.P, "Q": s.Q, "rows": rows, "columns": columns,
            "u": s.stride[0], "v": s.stride[1],
            **strides("dy", dy, "nkpq"), **strides("dx", dx, "nchw"),
            "ALIGNED": bool(config.aligned), "LAST": dy.stride(1) == 1, "BITS": bits(self.taps),
            "PRECISION": self.precision, "CAST": INTERPRETED,
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
