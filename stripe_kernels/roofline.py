"""Predicted seconds of a GPU kernel, so that an untuned plan sorts its candidates. Torch-free.

    seconds = launches * LAUNCH + max(2 * macs / math, loaded / L2, moved / HBM) / occupancy
    occupancy = programs / (programs rounded up to whole waves of SMS)

One nominal device stands for all, an H100: its bfloat16 GEMM and copy rates are published, tf32 is half of
bfloat16 by the instruction's rate, the others are estimates. No constant was fitted to a kernel of this
library: tune() replaces predictions by measurements.
"""

from __future__ import annotations

SMS = 132
LAUNCH = 4e-6  # estimate: a launch and its tail
HBM = 3.0e12  # bytes/s of a large copy
L2 = 5.5e12  # bytes/s from L2 to all SMs, an estimate
# FLOP/s of a large GEMM; float32 as tf32.
MATH = {"bfloat16": 790e12, "float16": 790e12, "float32": 395e12, "float64": 60e12}


def gpu_seconds(
    dtype: str,
    *,
    macs: float,
    moved: float,
    loaded: float = 0.0,
    share: float = 1.0,
    programs: int = SMS,
    launches: int = 1,
) -> float:
    """macs: multiply-adds executed, at `share` of the GEMM rate. moved: bytes to and from memory, each
    counted once. loaded: bytes that programs load in total, repeats included. programs: thread blocks of
    the launch."""
    waves = -(-max(1, programs) // SMS)
    occupancy = max(1, programs) / (waves * SMS)
    return launches * LAUNCH + max(2 * macs / (share * MATH[dtype]), loaded / L2, moved / HBM) / occupancy


def item_size(dtype: str) -> int:
    """Bytes of one value."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)
