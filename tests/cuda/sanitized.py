"""Every kernel over lopsided problems in one process, for the sanitizer: python -m tests.cuda.sanitized SO"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch

from stripe_kernels.backends import cuda_ffma, cuda_mma, cuda_mma_grad, cuda_stripe_gemm, cuda_wgmma
from stripe_kernels.backends.cuda_taps import CONFIGS as TAPS_CONFIGS
from stripe_kernels.backends.cuda_whole import CONFIGS as WHOLE_CONFIGS
from stripe_kernels.registry import PASSES
from stripe_kernels.testing import CASES
from tests.cuda import emulated
from tests.cuda.problems import check, problem_of
from tests.cuda.test_ffma import FAR
from tests.cuda.test_gather import check_dgrad
from tests.cuda.test_mma import WIDE
from tests.cuda.test_stripe_gemm import PROBLEMS as STRIPE_PROBLEMS
from tests.cuda.test_stripe_gemm import check_stripes
from tests.cuda.test_taps import PROBLEMS as TAPS_PROBLEMS
from tests.cuda.test_taps import check_fprop
from tests.cuda.test_wgmma import EVERYTHING, check_wgmma, refused
from tests.cuda.test_wgrad import PROBLEMS as WGRAD_PROBLEMS
from tests.cuda.test_wgrad import SHAPES as WGRAD_SHAPES
from tests.cuda.test_wgrad import check_wgrad, fitting
from tests.cuda.test_whole import PROBLEMS as WHOLE_PROBLEMS
from tests.cuda.test_whole import check_whole, taken

# Odd everywhere, so that no row, chunk or tile ends where its memory does.
NAMES = (
    "lopsided", "grouped lopsided", "depthwise", "batch of a prime", "stride beyond the filter", "wide row",
    "padding wider than the map", "uneven padding", "many channels", "empty", "one stripe",
)  # fmt: skip
MMA = {"fprop": cuda_mma.MmaFprop, "dgrad": cuda_mma_grad.MmaDgrad, "wgrad": cuda_mma_grad.MmaWgrad}


def main(extension: str) -> None:
    native, count = emulated.load(Path(extension)), 0
    for c in (*(CASES[name] for name in NAMES), FAR):
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
    for number, c in enumerate((*WIDE, EVERYTHING)):
        config = cuda_wgmma.CONFIGS[number % 2]
        if not refused(problem_of(c, "channels_last", torch.bfloat16), config):
            check_wgmma(native, c, torch.bfloat16, config)
            with emulated.late(native):
                check_wgmma(native, c, torch.bfloat16, config)
            count += 2
    for number, c in enumerate(TAPS_PROBLEMS):
        with emulated.late(native):
            check_fprop(native, c, torch.bfloat16, TAPS_CONFIGS[number % 3])
        check_dgrad(native, c, torch.bfloat16, (128,))
        count += 2
    for number, c in enumerate(WGRAD_PROBLEMS):
        config = fitting(c, WGRAD_SHAPES[number % len(WGRAD_SHAPES)], 2)
        if config is not None:
            with emulated.late(native):
                check_wgrad(native, c, torch.bfloat16, config)
            count += 1
    for number, c in enumerate(WHOLE_PROBLEMS):
        if taken(c, WHOLE_CONFIGS[number % 2]):
            with emulated.late(native):
                check_whole(native, c, torch.bfloat16, WHOLE_CONFIGS[number % 2])
            count += 1
    for c, which in product(STRIPE_PROBLEMS, PASSES):
        if cuda_stripe_gemm.refuse(problem_of(c, "channels_last", torch.bfloat16), which) is None:
            check_stripes(native, c, which, torch.bfloat16)
            check_stripes(native, c, which, torch.bfloat16, 2)
            count += 2
    print(f"{count} launches within their budgets")


if __name__ == "__main__":
    main(sys.argv[1])
