"""Triton kernels for GPUs: fprop over clustered filter tiles, dgrad and wgrad over the stripes of each tap.

One name, `triton`, covers the passes. On CPU tensors it runs only in Triton's interpreter.
"""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"triton is not installed ({error}); run: pip install 'stripe-kernels[triton]'") from error

from stripe_kernels.backends.triton.candidates import candidates
from stripe_kernels.backends.triton.fprop import TritonFprop
from stripe_kernels.backends.triton.launch import INTERPRETED, refuse
from stripe_kernels.registry import Config, Kernel, Pass, Problem, register

_RUNNERS = {"fprop": TritonFprop}


def build(problem: Problem, which: Pass, config: Config) -> TritonFprop:
    return _RUNNERS[which](problem, config)


# The interpreter is for tests: nobody's "auto" should meet it.
register(Kernel("triton", refuse, candidates, build, automatic=not INTERPRETED))
