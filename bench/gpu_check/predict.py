"""What the cost models expect of a GPU, for the first one that is at hand to confirm or refute. Nothing is measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu_check.checks import PASSES
from bench.gpu_check.rows import Setting
from stripe_kernels.testing import predicted_on_gpu, without_memory

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, side
KERNELS = ("triton", "stripe_gemm")


def rows(batch: int = 128, densities: tuple[float, ...] = (0.24, 0.1)) -> Iterator[list[str]]:
    """Head and lines: bfloat16, channels_last, 3x3, padding 1; microseconds of dense, and each kernel's best
    configuration over dense."""
    yield ["layer", "d", "pass", "dense us", *(f"{name} x" for name in KERNELS), "triton configuration"]
    for channels, side in LAYERS:
        for density in densities:
            for which in PASSES:
                case = Setting(channels, side, batch, density, "bfloat16", which).case()
                operands = without_memory(case, torch.bfloat16, "channels_last")
                (dense,) = predicted_on_gpu(case, operands, which, "dense").values()
                best = {
                    name: next(iter(predicted_on_gpu(case, operands, which, name).items()))
                    for name in KERNELS
                }
                gains = [f"{dense.predicted / best[name][1].predicted:.2f}" for name in KERNELS]
                head = [f"{channels}@{side}x{side}", f"{density:.2f}", which, f"{dense.predicted * 1e6:.0f}"]
                yield [*head, *gains, str(list(best["triton"][0]))]
