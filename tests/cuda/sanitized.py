"""Runs every kernel over a few lopsided problems in one process, for the address sanitizer: python -m tests.cuda.sanitized SO"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from stripe_kernels.backends import cuda_ffma, cuda_mma, cuda_mma_grad
from stripe_kernels.registry import PASSES
from tests.cuda import emulated
from tests.cuda.problems import check, problem_of
from tests.cuda.test_ffma import PROBLEMS as FFMA_PROBLEMS
from tests.cuda.test_mma import WIDE

MMA = {"fprop": cuda_mma.MmaFprop, "dgrad": cuda_mma_grad.MmaDgrad, "wgrad": cuda_mma_grad.MmaWgrad}


def main(extension: str) -> None:
    native, count = emulated.load(Path(extension)), 0
    for c in FFMA_PROBLEMS:
        for which in PASSES:
            runner = cuda_ffma.RUNNERS[which](native, problem_of(c, "channels_last"), (0, 2))
            check(runner, c, which, torch.float32, "channels_last", "ffma")
            count += 1
    for c in WIDE:
        for which in PASSES:
            for mode in (0, 1) if which == "fprop" else (0,):
                config = (mode, 1, 1) if which == "fprop" else (2,)
                runner = MMA[which](native, problem_of(c, "channels_last", torch.bfloat16), config)
                check(runner, c, which, torch.bfloat16, "channels_last", "mma")
                count += 1
    print(f"{count} launches within their budgets")


if __name__ == "__main__":
    main(sys.argv[1])
