"""Device functions the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unravel(index, rows, columns):
    """index = (n * rows + i) * columns + j -> n, i, j."""
    j = index % columns
    rest = index // columns
    return rest // rows, rest % rows, j


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, CAST: tl.constexpr):
    """acc + a @ b, summed in float32. CAST: the interpreter multiplies the raw bits of bfloat16, so there
    operands widen first."""
    if CAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def gathered(base, pixel, step, inside, live, LAST: tl.constexpr):
    """[pixels, filters]: values at base + pixel[m] + step[k]. Where nothing is known of the addresses Triton lays
    a warp's lanes along a tile's first dimension, so that is the one whose neighbours are neighbours in memory:
    filters of channels_last (LAST), pixels otherwise."""
    if LAST:
        at = step[:, None] + pixel[None, :]
        return tl.trans(tl.load(base + at, live[:, None] & inside[None, :], 0.0))
    return tl.load(base + (pixel[:, None] + step[None, :]), inside[:, None] & live[None, :], 0.0)


@triton.jit
def is_inside(i, j, real, rows, columns):
    return real & (i >= 0) & (i < rows) & (j >= 0) & (j < columns)


@triton.jit
def taps_met(i, j, real, tap, taps, rows, columns, BITS: tl.constexpr):
    """Which taps t meet the map from pixel (i, j), as bit t of a word of BITS: later one operation a step says
    whether a value is inside."""
    met = tl.zeros_like(i).to(tl.int32 if BITS == 32 else tl.int64)
    one = met + 1
    for t in range(taps):
        p = i + tl.load(tap + 2 * t)
        q = j + tl.load(tap + 2 * t + 1)
        met = met | tl.where(is_inside(p, q, real, rows, columns), one << t, 0)
    return met


@triton.jit
def is_met(met, t):
    return (met & (tl.full((), 1, met.dtype) << t)) != 0


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """Comparisons are turned so that a NaN stays one."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "relu6":
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    elif ACTIVATION == "silu":
        v = v / (1 + tl.exp(-v))
    elif ACTIVATION == "hardswish":
        v = v * tl.where(v < -3, 0.0, tl.where(v > 3, 6.0, v + 3)) / 6
    return v


@triton.jit
def finish(v, k, used, residual_at, kept, bias, scale, residual, ACTIVATION: tl.constexpr):
    """act(scale[k] * v + bias[k] + residual) of a tile. k, used: the channels of one side of it, which are there."""
    if scale is not None:
        v *= tl.load(scale + k, used, 0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + k, used, 0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + residual_at, kept, 0.0).to(tl.float32)
    return activate(v, ACTIVATION)
