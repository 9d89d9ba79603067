"""Max pooling of channels_last maps, each value read from memory once.

    y[n, c, p, q] = max over taps (r, s) inside the image of x[n, c, p*u + r*d_h - top, q*v + s*d_w - left]

A thread holds 16 bytes of channels of one output pixel, so that a single image too fills many blocks: torch's kernel
took 7 us for each of VGG-16's pools of one image (an H200, 32x32), and three times as long as memory at 1024 images.
Values are compared as torch compares them: the first of equal ones stays, and a NaN does. The result has torch's bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stripe_kernels.backends.triton.launch import DTYPES, INTERPRETED, Launch, at_hand, wide
from stripe_kernels.backends.triton.tile import is_inside, unravel

_THREADS = 128
_VECTOR = 16  # bytes
_CHANNELS = 64  # of a block at most
_TAPS = 64  # the loop over them is written out, so that their loads are under way at once


@triton.jit(do_not_specialize=["pixels", "c_blocks", "H", "W", "P", "Q", "u", "v", "top", "left"])
def max_pool_kernel(
    x, y, pixels, c_blocks, channels, H, W, P, Q, u, v, top, left, x_n, x_h, x_w, y_m,
    R: tl.constexpr, S: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """channels and the strides of pixels: in units of ALIGN, so that the compiler knows of them."""
    block = tl.program_id(0) // c_blocks
    c = tl.program_id(0) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        block = block.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = unravel(m, P, Q)
    real = m < pixels
    used = (c < channels * ALIGN)[None, :]
    lowest = float("-inf")
    best = tl.full((BLOCK_M, BLOCK_C), lowest, tl.float32)  # holds every value of narrower types
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            i = p * u + (r * D_H - top)
            j = q * v + (s * D_W - left)
            at = (n * x_n + i * x_h + j * x_w) * ALIGN
            inside = is_inside(i, j, real, H, W)[:, None] & used
            value = tl.load(x + (at[:, None] + c[None, :]), inside, lowest).to(tl.float32)
            best = tl.where((value > best) | (value != value), value, best)
    tl.store(y + ((m * y_m * ALIGN)[:, None] + c[None, :]), best.to(y.dtype.element_ty), real[:, None] & used)


class TritonMaxPool:
    """The part named "max_pool", of one window and maps like x. What Python has to do for a launch is done here, once:
    in every call it would take as long as the pool of a small batch."""

    def __init__(
        self,
        window: tuple[tuple[int, int], ...],
        x: Tensor,  # [N, C, H, W], no more than looked at
        y_size: tuple[int, ...],  # N, C, P, Q
    ) -> None:
        self.window, self.strides, self.y_size = window, x.stride(), y_size
        (r, s), (u, v), (top, left), (d_h, d_w) = window
        (_, channels, height, width), (n, _, p, q) = x.shape, y_size
        x_n, _, x_h, x_w = x.stride()
        values = _VECTOR // x.element_size()
        align = values if all(number % values == 0 for number in (channels, x_n, x_h, x_w)) else 1
        block_c = min(triton.next_power_of_2(channels), _CHANNELS)
        block_m = _THREADS * values // block_c
        c_blocks, pixels = triton.cdiv(channels, block_c), n * p * q
        self.grid = (triton.cdiv(pixels, block_m) * c_blocks,)
        self.arguments = {
            "pixels": pixels, "c_blocks": c_blocks, "channels": channels // align,
            "H": height, "W": width, "P": p, "Q": q, "u": u, "v": v, "top": top, "left": left,
            "x_n": x_n // align, "x_h": x_h // align, "x_w": x_w // align, "y_m": channels // align,
            "R": r, "S": s, "D_H": d_h, "D_W": d_w, "ALIGN": align,
            "WIDE": wide(x) or wide(torch.empty(y_size, device="meta")),
            "BLOCK_M": block_m, "BLOCK_C": block_c,
        }  # fmt: skip

    @staticmethod
    def takes(window: tuple[tuple[int, int], ...], x: Tensor) -> bool:
        """Whether maps like x are for this kernel; torch has one for all of them."""
        return (
            (x.is_cuda or INTERPRETED)
            and str(x.dtype)[6:] in DTYPES
            and (x.dim() == 4 and x.numel() > 0 and x.shape[1] > 1 and x.stride(1) == 1)
            and math.prod(window[0]) <= _TAPS
            and at_hand(x.device)
        )

    def launch(
        self,
        x: Tensor,  # [N, C, H, W]
        y: Tensor,  # [N, C, P, Q], dense and channels_last
    ) -> Launch:
        return Launch(max_pool_kernel, self.grid, {"x": x, "y": y, **self.arguments}, _THREADS // 32, 1)

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride() != self.strides:
            return TritonMaxPool(self.window, x, self.y_size)(x)
        y = torch.empty(self.y_size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        self.launch(x, y).run(x.device)
        return y
