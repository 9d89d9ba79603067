"""y of every kernel, by name, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from stripe_kernels import testing
from stripe_kernels.testing import CASES, DTYPES, LAYOUTS
from tests.passes import KERNELS, PAIRED, check_pass


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", KERNELS + PAIRED)
def test_in_every_type_and_layout(kernel: str, case) -> None:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            check_pass(case, kernel, "fprop", dtype, layout)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", KERNELS + PAIRED)
def test_in_every_configuration(kernel: str, case) -> None:
    dtype = torch.bfloat16 if kernel in PAIRED else torch.float32
    for threads in (1, 2):  # other numbers: test_threads.py
        torch.set_num_threads(threads)
        for layout in ("contiguous", "channels_last"):
            check_pass(case, kernel, "fprop", dtype, layout, every=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_in_float64(kernel: str) -> None:
    for case in CASES.values():
        check_pass(case, kernel, "fprop", torch.float64, "contiguous")


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_over_many_channels(kernel: str) -> None:
    """torch adds many products in several sums; in one, they were up to twice as far off as the budget allows."""
    cases = [
        testing.case("2048 channels", N=1, C=2048, K=256, R=1, S=1, padding=(0, 0), density=0.5),
        testing.case("one tap of few pixels", N=1, C=256, H=2, W=3, K=512, pattern="one tap", seed=5),
    ]
    # Torch's own sums, these two, are beyond the budget there as well.
    if kernel not in ("dense", "reference"):
        small = {"N": 8, "C": 240, "H": 3, "W": 3, "K": 64, "R": 1, "S": 1, "padding": (0, 0)}
        cases.append(testing.case("1x1 on a small map", **small, pattern="full"))
    for made in cases:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check_pass(made, kernel, "fprop", torch.float32, "contiguous", every=True)
