"""Launches on several devices, against a stand-in for torch.cuda: no GPU is needed, and none is simulated beyond what a
runner asks of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stripe_kernels.backends import cuda_ffma, cuda_stripe_gemm, gemm
from stripe_kernels.testing import case
from tests.cuda.problems import problem_of

C = case("small", N=1, C=8, H=4, W=4, K=8)
OTHER = torch.device("cuda", 1)


class OnOther(Tensor):
    """A tensor of the second GPU, as it says."""

    device = OTHER


class FakeCuda:
    """Two GPUs; notes which is current."""

    def __init__(self) -> None:
        self.current = 0
        self.entered = 0

    def current_device(self) -> int:
        return self.current

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(cuda_stream=100 + device.index)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        self.entered += 1
        try:
            yield
        finally:
            self.current = before


class FakeNative:
    """The extension, which notes for each launch its name, stream and the current device."""

    def __init__(self, cuda: FakeCuda, fails: bool) -> None:
        self.cuda, self.fails, self.launches = cuda, fails, []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(stream: int, *arguments: Any) -> None:
            self.launches.append((name, stream, self.cuda.current))
            if self.fails:
                raise RuntimeError("CUDA error 701")

        return launch

    def Kernel(self, *arguments: Any) -> Any:
        return self


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr("stripe_kernels.indices.IndexArrays.on", _tables)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, device=None, **kw: empty(*size, **kw).as_subclass(OnOther)
    )
    return fake


def _tables(arrays: Any, device: torch.device) -> dict[str, Tensor]:
    assert device == OTHER
    return {name: torch.from_numpy(array) for name, array in arrays._host.items()}


def tensor(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    zeros = torch.zeros(size, dtype=dtype)
    return (zeros.contiguous(memory_format=torch.channels_last) if len(size) == 4 else zeros).as_subclass(
        OnOther
    )


def run_kernel(native: Any) -> list[str]:
    runner = cuda_ffma.FfmaFprop(native, problem_of(C, "channels_last"), (0, 1))
    runner.launch(tensor(C.shape.input_size), tensor((1,)), tensor(C.shape.output_size))
    return ["run"]


def run_split(native: Any) -> list[str]:
    runner = cuda_ffma.FfmaFprop(native, problem_of(C, "channels_last"), (0, 2))
    runner.launch(tensor(C.shape.input_size), tensor((1,)), tensor(C.shape.output_size))
    return ["run", "reduce"]


def run_rows(native: Any) -> list[str]:
    runner = cuda_ffma.FfmaFprop(native, problem_of(C, "channels_last"), (0, 1))
    runner.copy_rows(tensor((4, 8)), torch.zeros(3, dtype=torch.int32))
    return ["copy_rows"]


def run_sum(native: Any) -> list[str]:
    layout = gemm.Layout(problem_of(C, "channels_last", torch.bfloat16), "stripe")
    gather = cuda_stripe_gemm.CudaGather(native, layout)
    z, y = tensor((layout.values(1),), torch.bfloat16), tensor(C.shape.output_size, torch.bfloat16)
    gather.sum(z, y, None, None, None, "none")
    return ["stripe_sum"]


def run_spread(native: Any) -> list[str]:
    layout = gemm.Layout(problem_of(C, "channels_last", torch.bfloat16), "pixel", 8)
    gather = cuda_stripe_gemm.CudaGather(native, layout)
    dy, p = tensor(C.shape.output_size, torch.bfloat16), tensor((layout.values(1),), torch.bfloat16)
    gather.spread(dy, 0, p)
    return ["stripe_spread"]


RUNS = [run_kernel, run_split, run_rows, run_sum, run_spread]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_is_on_the_device_of_its_tensors(
    cuda: FakeCuda, run: Callable[[Any], list[str]], current: int
) -> None:
    cuda.current = current
    native = FakeNative(cuda, fails=False)
    names = run(native)
    assert native.launches == [(name, 101, 1) for name in names]
    assert cuda.current == current
    assert cuda.entered == (current != 1), "nothing is switched where the device is current already"


@pytest.mark.parametrize("run", RUNS)
def test_the_current_device_is_restored_when_a_launch_fails(
    cuda: FakeCuda, run: Callable[[Any], list[str]]
) -> None:
    native = FakeNative(cuda, fails=True)
    with pytest.raises(RuntimeError, match="701"):
        run(native)
    assert [device for *_, device in native.launches] == [1]
    assert cuda.current == 0
