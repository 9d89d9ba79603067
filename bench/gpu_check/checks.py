"""Every kernel against the float64 oracle on the device, and the promises a GPU alone can break."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.gpu_check.device import FAILURES, Device, set_precision
from stripe_kernels import FilterSkeleton, StripeConv2d, list_kernels
from stripe_kernels.testing import CASES, Case, Operands, budgets, poisoned_memory, prepared

PASSES = ("fprop", "dgrad", "wgrad")
RESULT = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}
SMALL = (
    "lopsided",
    "grouped lopsided",
)  # for a first try, and for the sanitizer, which slows kernels by tens
CONFIGS = 4  # of one kernel that are checked; of Triton's, which have to be compiled first, one
_STRAND = 50  # microseconds of other work that a promise about streams is tested behind


def kernels(device: Device, without: Collection[str] = ()) -> list[str]:
    """Whatever is registered and is no CPU kernel, those compiled when first called last; the oracle is checked against
    itself by nobody."""
    names = [
        n
        for n in list_kernels()
        if n not in {"reference", *without} and (device.type == "cpu" or not n.startswith("cpu_"))
    ]
    return sorted(names, key=lambda n: n == "triton")


def aligned(case: Case) -> Case:
    """The same geometry with channels and filters in multiples of 16 bytes, which tensor cores ask for."""
    s = case.shape
    c, k = (-(-n // (8 * s.groups)) * 8 * s.groups for n in (s.C, s.K))
    return replace(case, name=f"{case.name}, aligned", shape=replace(s, C=c, K=k))


def _checked(names: tuple[str, ...], device: Device) -> Iterator[tuple[Case, Operands, Operands, Any]]:
    """Cases in every dtype: operands on the device, the same rounded to tf32, and the budget. Layouts alternate;
    aligned cases are channels_last. The oracle runs on the CPU: cuDNN would try every algorithm for its float64."""
    for number, name in enumerate(names):
        for case in (CASES[name], aligned(CASES[name])):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                layout = ("contiguous", "channels_last")[(number + (dtype != torch.float32)) % 2]
                operands = case.operands(dtype, "channels_last" if case.name.endswith("aligned") else layout)
                budget = budgets(case, operands)
                yield case, _placed(operands, device), _placed(_rounded(operands), device), budget


def _placed(operands: Operands, device: Device) -> Operands:
    return Operands(*(t.to(device.type) for t in operands))


def _rounded(operands: Operands) -> Operands:
    """float32 values that tf32 has: their products are exact in float32, so that one budget serves both."""
    if operands.x.dtype != torch.float32:
        return operands

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t.copy_((t.view(torch.int32) & ~0x1FFF).view(torch.float32))

    return Operands(*(cut(t.clone()) for t in operands))


def _one(case: Case, operands: Operands, which: str, kernel: str, budget: Any) -> Iterator[str]:
    """What is wrong with the configurations predicted to be best; the layers' rows check others."""
    most = 1 if kernel == "triton" else CONFIGS
    for name, (call, _) in list(prepared(case, operands, which, kernel).items())[:most]:
        with poisoned_memory():
            first = call(operands)
            again = call(operands)
        failure = getattr(budget, RESULT[which]).failure(first)
        if failure:
            yield f"{name} {which} of {case.name}, {operands.x.dtype}: {failure}"
        elif not torch.equal(first, again):
            yield f"{name} {which} of {case.name}, {operands.x.dtype}: two runs differ"


def correctness(
    device: Device, names: tuple[str, ...], deadline: float, tried: Collection[str]
) -> dict[str, Any]:
    """Kernel x case x dtype x pass, twice each, for the kernels `tried`."""
    done, skipped = 0, 0
    failures: list[str] = []
    refused: set[str] = set()
    set_precision("float32")
    cases = list(_checked(names, device))
    for kernel in tried:
        for case, operands, rounded, budget in cases:
            if "tf32" in kernel:  # its results are those of the rounded operands
                if operands.x.dtype != torch.float32:
                    continue
                operands, budget = rounded, budgets(case, Operands(*(t.cpu() for t in rounded)))
            for which in PASSES:
                if time.perf_counter() > deadline:
                    skipped += 1
                    continue
                try:
                    failures += _one(case, operands, which, kernel, budget)
                    done += 1
                except FAILURES as error:
                    if "does not run" not in str(error):
                        failures.append(f"{kernel} {which} of {case.name}, {operands.x.dtype}: {error}")
                    else:
                        refused.add(f"{kernel} {which}: {str(error).rpartition(': ')[2]}")
    return {"done": done, "failures": failures, "refused": sorted(refused), "skipped_for_time": skipped}


def alive(device: Device) -> bool:
    """Whether the device still answers: after an illegal access nothing in this process does."""
    try:
        return bool(torch.ones(1, device=device.type).sum().item() == 1)
    except RuntimeError:
        return False


def _layer(device: Device, kernel: str) -> tuple[StripeConv2d, torch.Tensor]:
    """A layer with this kernel and an input, both as the kernel takes them."""
    live = torch.rand(64, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    layer = StripeConv2d(64, 64, 3, padding=1, skeleton=FilterSkeleton(live.numpy()), device=device.type)
    layer.kernel = kernel
    x = torch.randn(4, 64, 14, 14, device=device.type)
    if kernel in {"cuda_mma", "cuda_wgmma"}:
        return layer.to(torch.bfloat16), x.to(torch.bfloat16, memory_format=torch.channels_last)
    return layer, x.to(memory_format=torch.channels_last) if kernel == "cuda_mma_tf32" else x


def _compiled(device: Device, kernel: str, mode: str | None) -> str | None:
    layer, x = _layer(device, kernel)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with torch.no_grad():
        expected = layer(x)
        for _ in range(3):
            found = compiled(x).clone()
    return None if torch.equal(found, expected) else "differs from eager"


def _graph(device: Device, kernel: str) -> str | None:
    """A captured call sees new inputs, and weights packed at capture are those of the layer."""
    layer, x = _layer(device, kernel)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        return None if torch.equal(y, layer(x)) else "a replay differs from a call"


def _training_graph(device: Device, kernel: str) -> str | None:
    """Forward and backward in one graph: nothing reads a device tensor on the host."""
    layer, x = _layer(device, kernel)
    x.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    return None if same else "a replay differs from a call"


def _stream(device: Device, kernel: str) -> str | None:
    """Work queued on the current stream is waited for."""
    layer, x = _layer(device, kernel)
    with torch.no_grad():
        expected = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = torch.full_like(x, torch.nan)
            torch.cuda._sleep(_STRAND * 2000)
            late.copy_(x)
            y = layer(late)
        stream.synchronize()
    return None if torch.equal(y, expected) else "did not wait for its stream"


def _second_device(device: Device, kernel: str) -> str | None:
    layer, x = _layer(device, kernel)
    with torch.no_grad():
        expected = layer(x).to("cuda:1")
        found = layer.to("cuda:1")(x.to("cuda:1"))  # the current device stays 0
    return None if torch.equal(found, expected) else "differs on the second device"


def promises(device: Device, deadline: float, without: Collection[str] = ()) -> dict[str, str]:
    """Graph capture, streams, devices, torch.compile (slow, so last): "ok" or what went wrong, by kernel. The CUDA
    kernels reach torch.compile and training by the operators that "auto" tries; one of them has no backward pass."""
    tests: dict[str, Any] = {"torch.compile": lambda k: _compiled(device, k, None)}
    names = ["auto", *kernels(device, {"dense", *without})] if device.type == "cuda" else ["stripe_gemm"]
    if device.type == "cuda":
        tests = {
            "CUDA graph": lambda k: _graph(device, k),
            "CUDA graph of training": lambda k: _training_graph(device, k),
            "stream": lambda k: _stream(device, k),
            **tests,
            "torch.compile reduce-overhead": lambda k: _compiled(device, k, "reduce-overhead"),
        }
        if torch.cuda.device_count() > 1:
            tests["second device"] = lambda k: _second_device(device, k)
    found = {}
    for what, test in tests.items():
        for kernel in names:
            if (kernel.startswith("cuda_") and "compile" in what) or (
                kernel == "cuda_wgmma" and "training" in what
            ):
                continue
            if time.perf_counter() > deadline:
                found[f"{what}, {kernel}"] = "no time"
                continue
            try:
                found[f"{what}, {kernel}"] = test(kernel) or "ok"
            except FAILURES as error:
                found[f"{what}, {kernel}"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found
