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
