"""Predicted seconds of a GPU kernel, so that an untuned plan sorts its candidates. Torch-free.

    seconds = launches * LAUNCH + max(2 * macs / math, gathered / GATHER, loaded / L2, moved / HBM) / occupancy
    occupancy = programs / (programs rounded up to whole waves of SMS)

One nominal device stands for all, an H100: its bfloat16 GEMM and copy rates are published, tf32 is half of
bfloat16 by the instruction's rate, strict float32 runs on the ordinary units, the others are estimates. No
constant was fitted to a kernel of this library: tune() replaces predictions by measurements.
"""

from __future__ import annotations

SMS = 132
LAUNCH = 4e-6  # estimate: a launch and its tail
HBM = 3.0e12  # bytes/s of a large copy
L2 = 5.5e12  # bytes/s from L2 to all SMs, an estimate
# Values/s that every SM together loads one by one: 4 warp instructions a clock of 1.755 GHz, and 8 of them
# for 32 values, which is what the compiled loops hold (tests/triton/test_compiled.py has the bound).
GATHER = SMS * 4 * 1.755e9 / 8 * 32
# FLOP/s of a large GEMM.
MATH = {"bfloat16": 790e12, "float16": 790e12, "tf32": 395e12, "float32": 50e12, "float64": 60e12}


def math_type(dtype: str, tf32: bool) -> str:
    """The key of MATH: what the multipliers of a GPU make of a dtype."""
    return "tf32" if dtype == "float32" and tf32 else dtype


def gpu_seconds(
    math: str,
    *,
    macs: float,
    moved: float,
    loaded: float = 0.0,
    gathered: float = 0.0,
    share: float = 1.0,
    programs: int = SMS,
    launches: int = 1,
) -> float:
    """macs: multiply-adds executed, at `share` of the GEMM rate. moved: bytes to and from memory, each
    counted once. loaded: bytes that programs load in total, repeats included. gathered: values loaded one by
    one. programs: thread blocks of the launch."""
    waves = -(-max(1, programs) // SMS)
    occupancy = max(1, programs) / (waves * SMS)
    work = max(2 * macs / (share * MATH[math]), gathered / GATHER, loaded / L2, moved / HBM)
    return launches * LAUNCH + work / occupancy


def item_size(dtype: str) -> int:
    """Bytes of one value."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)
