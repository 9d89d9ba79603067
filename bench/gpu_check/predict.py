"""What the cost models expect of a GPU, for the first one that is at hand to confirm or refute. Nothing is measured."""

from __future__ import annotations

from collections.abc import Iterator

from stripe_kernels import backends, registry
from stripe_kernels.geometry import ConvShape
from stripe_kernels.registry import PASSES, Problem

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, side
KERNELS = ("triton", "stripe_gemm")


def rows(batch: int = 128, densities: tuple[float, ...] = (0.24, 0.1)) -> Iterator[list[str]]:
    """Head and lines: bfloat16, channels_last, 3x3, padding 1; microseconds of dense, and each kernel's best
    configuration over dense."""
    from bench.skeletons import iid

    backends.load()
    yield ["layer", "d", "pass", "dense us", *(f"{name} x" for name in KERNELS), "triton configuration"]
    for channels, side in LAYERS:
        for density in densities:
            skeleton = iid((channels, 3, 3), density, f"{channels}-{channels}@{side}x{side} {density}")
            shape = ConvShape(batch, channels, side, side, channels, 3, 3, (1, 1), (1, 1, 1, 1))
            problem = Problem(shape, skeleton, "bfloat16", "cuda", True, 1)
            for which in PASSES:
                (dense,) = registry.find("dense").candidates(problem, which).values()
                best = {
                    name: min(
                        registry.find(name).candidates(problem, which).items(), key=lambda item: item[1]
                    )
                    for name in KERNELS
                }
                gains = [f"{dense / best[name][1]:.2f}" for name in KERNELS]
                head = [f"{channels}@{side}x{side}", f"{density:.2f}", which, f"{dense * 1e6:.0f}"]
                yield [*head, *gains, str(list(best["triton"][0]))]
