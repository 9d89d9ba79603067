"""Triton kernels for GPUs: fprop over clustered filter tiles, dgrad and wgrad over the live stripes of each
tap.

One name, `triton`, covers the three passes; `triton_stem` is fprop of few channels. CPU tensors they take only inside
Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"triton is not installed ({error}); run: pip install triton") from error

from stripe_kernels.backends.triton import configs, stem
from stripe_kernels.backends.triton.configs import candidates
from stripe_kernels.backends.triton.dgrad import TritonDgrad
from stripe_kernels.backends.triton.epilogue import epilogue
from stripe_kernels.backends.triton.fprop import TritonFprop
from stripe_kernels.backends.triton.gather import TritonGather
from stripe_kernels.backends.triton.launch import INTERPRETED, compiling, refuse
from stripe_kernels.backends.triton.pool import TritonMaxPool
from stripe_kernels.backends.triton.wgrad import TritonWgrad
from stripe_kernels.registry import Config, Kernel, Pass, Problem, provide, register

_RUNNERS = {"fprop": TritonFprop, "dgrad": TritonDgrad, "wgrad": TritonWgrad}


def build(problem: Problem, which: Pass, config: Config) -> Any:
    return _RUNNERS[which](problem, config)


# The interpreter is for tests: nobody's "auto" should meet it, and no network.
register(Kernel("triton", refuse, candidates, build, automatic=not INTERPRETED))
register(
    Kernel(
        "triton_stem",
        stem.refuse,
        lambda problem, which: configs.stem(problem),
        stem.TritonStem,
        automatic=not INTERPRETED,
    )
)
provide("gather", TritonGather)
if not INTERPRETED:
    provide("max_pool", TritonMaxPool)
    provide("epilogue", epilogue)
provide("compiling", compiling)
