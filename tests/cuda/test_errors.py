"""A call of the CUDA runtime that fails is an error that names the kernel and what the runtime says of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch

from stripe_kernels.backends import cuda_ffma, cuda_mma, cuda_mma_grad
from stripe_kernels.backends.cuda_gather import WgmmaDgrad
from stripe_kernels.backends.cuda_taps import TapsFprop
from stripe_kernels.backends.cuda_wgmma import WgmmaFprop
from stripe_kernels.backends.cuda_wgrad import WgmmaWgrad
from stripe_kernels.backends.cuda_whole import WholeFprop
from stripe_kernels.testing import Case, Operands, case
from tests.cuda import emulated
from tests.cuda.problems import operands_of, problem_of
from tests.cuda.test_stripe_gemm import runner_of as gemm_runner
from tests.tree import ROOT, needs_sources

SMALL = case("small", N=2, C=16, H=5, W=6, K=16)
LARGE = case("large", N=2, C=64, H=15, W=16, K=64)
RUNNERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "fprop_ffma": (cuda_ffma.FfmaFprop, (0, 1)),
    "dgrad_ffma": (cuda_ffma.FfmaDgrad, (0, 1)),
    "wgrad_ffma": (cuda_ffma.FfmaWgrad, (0, 1)),
    "fprop_mma": (cuda_mma.MmaFprop, (0, 0, 1)),
    "dgrad_mma": (cuda_mma_grad.MmaDgrad, (1,)),
    "wgrad_mma": (cuda_mma_grad.MmaWgrad, (1,)),
    "fprop_sm90": (WgmmaFprop, (96, 128)),
    "fprop_taps_sm90": (TapsFprop, (64, 64, 192)),
    "fprop_whole_sm90": (WholeFprop, (64,)),
    "dgrad_sm90": (WgmmaDgrad, (64,)),
    "wgrad_sm90": (WgmmaWgrad, (64, 64, 64, 1)),
}
# What a launch asks for before it begins: kernels of sm_90 encode tensor maps, persistent ones count multiprocessors.
LAUNCH = ("cudaLaunchKernelEx", "cudaGetLastError")
ENCODE = ("cudaGetDriverEntryPointByVersion", "cuTensorMapEncodeTiled")
COUNT = ("cudaGetDevice", "cudaDeviceGetAttribute")
CALLS = {
    **dict.fromkeys(RUNNERS, LAUNCH),
    **{name: (*LAUNCH, *ENCODE, *COUNT) for name in RUNNERS if name.endswith("sm90")},
    "wgrad_sm90": (*LAUNCH, *ENCODE),
    **dict.fromkeys(("reduce", "copy_rows", "stripe_sum", "stripe_spread"), LAUNCH),
}
SAYS = dict.fromkeys(
    (*LAUNCH, *COUNT, "cudaFuncSetAttribute", ENCODE[0]), "701: too many resources requested"
)
SAYS["cuTensorMapEncodeTiled"] = "1: invalid argument"


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name.endswith("ffma") else torch.bfloat16


def runner_of_kernel(native: ModuleType, name: str, c: Case) -> Any:
    kind, config = RUNNERS[name]
    runner = kind(native, problem_of(c, "channels_last", dtype_of(name)), config)
    assert runner.name == name
    return runner


def call_of(runner: Any, which: str, o: Operands) -> Callable[[], Any]:
    """A call of one launch: packing, which may be another, is done."""
    if which == "wgrad":
        return lambda: runner(o.dy, o.x)
    packed = runner.pack(o.weight)
    return lambda: runner(o.dy, packed) if which == "dgrad" else runner(o.x, packed, None, None, None, "none")


def launch_of(native: ModuleType, name: str, packs: bool = True) -> Callable[[], Any]:
    """A call of this launcher, and of no other before it but for what packs the weight, which may be one too."""
    values, rows = torch.ones(4, 8), torch.zeros(4, dtype=torch.int32)
    out = torch.empty_like(values)
    if name == "reduce":
        return lambda: native.reduce(0, values.data_ptr(), 1, out.data_ptr(), 0, 32, 1, 1, 0, 0, 0, 0)
    if name == "copy_rows":
        return lambda: native.copy_rows(0, values.data_ptr(), rows.data_ptr(), out.data_ptr(), 4, 32)
    if name in ("stripe_sum", "stripe_spread"):
        which = "fprop" if name == "stripe_sum" else "wgrad"
        runner = gemm_runner(native, SMALL, which, torch.bfloat16)
    else:
        which, runner = name.split("_")[0], runner_of_kernel(native, name, SMALL)
        if not packs:
            runner.pack = lambda weight: weight
    return call_of(runner, which, operands_of(SMALL, dtype_of(name), "channels_last"))


@needs_sources
def test_every_launcher_is_here() -> None:
    header = (ROOT / "csrc/cuda/kernels.h").read_text()
    assert set(re.findall(r"^int (\w+)\(const \w+&, void\* stream\);", header, re.MULTILINE)) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_is_an_error_of_the_kernel(native: ModuleType, name: str) -> None:
    launch = launch_of(native, name)
    for call in CALLS[name]:
        with emulated.failing(native, call), pytest.raises(RuntimeError) as error:
            launch()
        assert f"stripe_kernels._cuda: {name}: CUDA error {SAYS[call]}" in str(error.value), call
    launch()  # nothing of a failure stays


def test_shared_memory_that_is_not_given(native: ModuleType) -> None:
    """More than 48 KiB have to be asked for; for less nobody asks."""
    asked = []
    for name, c in product(("fprop_ffma", "fprop_mma", "dgrad_sm90"), (SMALL, LARGE)):
        runner = runner_of_kernel(native, name, c)
        launch = call_of(runner, name.split("_")[0], operands_of(c, dtype_of(name), "channels_last"))
        asked.append(native.shared_bytes(name, runner.code, runner.layout.integers()) > 48 * 1024)
        says = pytest.raises(RuntimeError, match=f"{name}: CUDA error 701") if asked[-1] else nullcontext()
        with emulated.failing(native, "cudaFuncSetAttribute"), says:
            launch()
    assert set(asked) == {True, False}


def test_devices_that_cannot_be_counted(native: ModuleType) -> None:
    assert native.devices() == 1
    with (
        emulated.failing(native, "cudaGetDeviceCount"),
        pytest.raises(RuntimeError, match="devices: CUDA error 701"),
    ):
        native.devices()
