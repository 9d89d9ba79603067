"""Every kernel against the float64 oracle on the device, and the promises a GPU alone can break."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.gpu_check.device import FAILURES, Device, set_precision
from bench.gpu_check.journal import Journal
from bench.gpu_check.tools import WRONG
from stripe_kernels import FilterSkeleton, StripeConv2d, list_kernels
from stripe_kernels.testing import (
    CASES,
    Budget,
    Budgets,
    Case,
    Operands,
    Pass,
    Trial,
    budgets,
    evaluate,
    failure,
    poisoned_memory,
    prepared,
)

PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")
RESULT = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}
SMALL = (
    "lopsided",
    "grouped lopsided",
)  # for a first try, and for the sanitizer, which slows kernels by tens
CONFIGS = 4  # of one kernel that are checked; of Triton's, which have to be compiled first, one
_NOT_ALL_PASSES = {"cuda_mma_tf32": "no wgrad", "triton_stem": "fprop alone"}
_STRAND = 50  # microseconds of other work that a promise about streams is tested behind


def kernels(device: Device, without: Collection[str] = ()) -> list[str]:
    """Whatever is registered and is no CPU kernel, those compiled when first called last; the oracle is checked against
    itself by nobody."""
    names = [
        n
        for n in list_kernels()
        if n not in {"reference", *without} and (device.type == "cpu" or not n.startswith("cpu_"))
    ]
    return sorted(names, key=lambda n: n.startswith("triton"))


def aligned(case: Case) -> Case:
    """The same geometry with channels and filters in multiples of 16 bytes, which tensor cores ask for."""
    s = case.shape
    c, k = (-(-n // (8 * s.groups)) * 8 * s.groups for n in (s.C, s.K))
    return replace(case, name=f"{case.name}, aligned", shape=replace(s, C=c, K=k))


def cases(names: tuple[str, ...]) -> Iterator[tuple[Case, torch.dtype, str]]:
    """Each case as it is and aligned, in every dtype, in one memory format: formats alternate, aligned cases are
    channels_last."""
    for number, name in enumerate(names):
        for case in (CASES[name], aligned(CASES[name])):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                layout = ("contiguous", "channels_last")[(number + (dtype != torch.float32)) % 2]
                yield case, dtype, "channels_last" if case.name.endswith("aligned") else layout


def _prepared(names: tuple[str, ...], device: Device) -> Iterator[tuple[Case, Operands, Operands, Any]]:
    """Operands of the cases on the device, the same rounded to tf32, and the budget. The oracle runs on the CPU: cuDNN
    would try every algorithm for its float64."""
    for case, dtype, layout in cases(names):
        operands = case.operands(dtype, layout)
        yield case, _placed(operands, device), _placed(_rounded(operands), device), budgets(case, operands)


def _placed(operands: Operands, device: Device) -> Operands:
    return Operands(*(t.to(device.type) for t in operands))


def _rounded(operands: Operands) -> Operands:
    """float32 values that tf32 has: their products are exact in float32, and only the sums are left to judge."""
    if operands.x.dtype != torch.float32:
        return operands

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t.copy_((t.view(torch.int32) & ~0x1FFF).view(torch.float32))

    return Operands(*(cut(t.clone()) for t in operands))


def _drawn(case: Case, like: Operands, draw: int, rounded: bool) -> Operands:
    """Another draw of the values of `like`, in its dtype, memory format and place."""
    last = like.x.is_contiguous(memory_format=torch.channels_last) and not like.x.is_contiguous()
    operands = case.operands(like.x.dtype, "channels_last" if last else "contiguous", draw=draw)
    operands = _rounded(operands) if rounded else operands
    return Operands(*(t.to(like.x.device) for t in operands))


def _tf32_budgets(case: Case, operands: Operands, only: Pass | None = None) -> Budgets:
    """Of tf32's products, from operands that tf32 has: torch's own is cuDNN's tf32 beside the CPU's float32. Tensor
    cores cut sums off where float32 rounds them, cuDNN's as anybody's."""
    found = budgets(case, Operands(*(t.cpu() for t in operands)), only)
    set_precision("tf32")
    torch.backends.cudnn.benchmark = False  # trying every algorithm takes longer than all kernels
    try:
        formats = (torch.contiguous_format, torch.channels_last)
        own = [evaluate(case, operands, torch.float32, f, only=only) for f in formats]
    finally:
        set_precision("float32")
        torch.backends.cudnn.benchmark = True
    cudnn = [Budget.of(b.expected, *(r[i].cpu() for r in own)) for i, b in enumerate(found)]
    pairs = zip(found, cudnn, strict=True)
    return Budgets(*(replace(a, largest=max(a.largest, b.largest), rms=max(a.rms, b.rms)) for a, b in pairs))


def _one(case: Case, operands: Operands, which: Pass, kernel: str, budget: Budgets) -> Iterator[str]:
    """What is wrong with the configurations predicted to be best; the layers' rows check others."""
    most = 1 if kernel.startswith("triton") else CONFIGS
    for name, (call, _) in list(prepared(case, operands, which, kernel).items())[:most]:
        with poisoned_memory():
            first = call(operands)
            again = call(operands)

        def trial(draw: int, name: str = name, first: torch.Tensor = first) -> Trial:
            if draw == 0:
                return Trial(budget.of(which), first)
            drawn = _drawn(case, operands, draw, "tf32" in kernel)
            with poisoned_memory():
                result = prepared(case, drawn, which, kernel)[name].call(drawn)
            if "tf32" in kernel:
                return Trial(_tf32_budgets(case, drawn, which).of(which), result)
            on_cpu = Operands(*(t.cpu() for t in drawn))
            return Trial(budgets(case, on_cpu, which).of(which), result)

        found = failure(trial)
        if found:
            yield f"{name} {which} of {case.name}, {operands.x.dtype}: {found}"
        elif not torch.equal(first, again):
            yield f"{name} {which} of {case.name}, {operands.x.dtype}: two runs differ"


def small_set(device: Device, names: list[str]) -> int:
    """What a first try and compute-sanitizer run, for a process of its own: 0, or tools.WRONG."""
    tried = names or kernels(device, {"dense"})
    return WRONG if correctness(device, SMALL, float("inf"), tried, Journal(None)) else 0


def names_of(dry_run: bool) -> tuple[str, ...]:
    """The cases that are checked."""
    return SMALL[:1] if dry_run else tuple(CASES)


def beside(dry_run: bool) -> set[str]:
    """torch's own are no kernels of ours: they are timed, not checked."""
    return set() if dry_run else {"dense"}


def planned(names: tuple[str, ...], tried: Collection[str]) -> Iterator[tuple[str, str, int, Pass]]:
    """(what, kernel, number of the case, pass) of all checks of the kernels `tried`, or of passes of them
    ("cuda_wgmma:wgrad"), in their order."""
    listed = list(cases(names))
    for name in tried:
        kernel, _, only = name.partition(":")
        for number, (case, dtype, _) in enumerate(listed):
            if "tf32" in kernel and dtype != torch.float32:
                continue
            for which in PASSES:
                if only in ("", which):
                    yield f"{kernel} {which} of {case.name}, {str(dtype)[6:]}", kernel, number, which


def correctness(
    device: Device, names: tuple[str, ...], deadline: float, tried: Collection[str], journal: Journal
) -> list[str]:
    """Every check `planned`, twice each, into the journal, as far as there is time; what is wrong. float32 is strict.
    What the journal has already, and what a process died of, is left out."""
    before = {line["what"] for line in journal.lines("check")} | set(journal.unfinished("begun", "check"))
    found: list[str] = []
    set_precision("float32")
    every = list(_prepared(names, device))
    of_tf32: dict[int, Budgets] = {}  # by the number of the case
    for what, kernel, number, which in planned(names, tried):
        if what in before:
            continue
        if time.perf_counter() > deadline:
            break
        case, operands, rounded, budget = every[number]
        if "tf32" in kernel:  # its results are those of the rounded operands
            operands = rounded
            if number not in of_tf32:
                of_tf32[number] = _tf32_budgets(case, rounded)
            budget = of_tf32[number]
        journal.note("begun", what=what)
        result, text = _checked(case, operands, which, kernel, budget)
        device.leave_if_lost()
        journal.note("check", what=what, result=result, text=text)
        if result == "wrong":
            print(text, flush=True)
            found.append(text)
    return found


def _checked(case: Case, operands: Operands, which: Pass, kernel: str, budget: Budgets) -> tuple[str, str]:
    """("ok" | "refused" | "wrong", the reason)."""
    try:
        failures = list(_one(case, operands, which, kernel, budget))
    except FAILURES as error:
        if "does not run" in str(error):
            return "refused", f"{kernel} {which}: {str(error).rpartition(': ')[2]}"
        return "wrong", f"{kernel} {which} of {case.name}, {operands.x.dtype}: {str(error)[:500]}"
    return ("wrong", failures[0]) if failures else ("ok", "")


def _layer(device: Device, kernel: str, seed: int = 0) -> tuple[StripeConv2d, torch.Tensor]:
    """A layer with this kernel and an input, both as the kernel takes them. Another seed is another skeleton, for
    which nothing was planned yet."""
    live = torch.rand(64, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.3
    channels = 3 if kernel == "triton_stem" else 64
    skeleton = FilterSkeleton(live.numpy())
    layer = StripeConv2d(channels, 64, 3, padding=1, skeleton=skeleton, device=device.type)
    layer.kernel = kernel
    x = torch.randn(4, channels, 14, 14, device=device.type)
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

    torch.backends.cudnn.deterministic = (
        kernel == "auto"
    )  # untuned it is cuDNN, whose wgrad may add in any order
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


_Step = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def _waits(x: torch.Tensor, step: _Step) -> str | None:
    """Whether a step on a stream of its own waits for the x that is late there."""
    expected = step(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.full_like(x, torch.nan)
        torch.cuda._sleep(_STRAND * 2000)
        late.copy_(x)
        found = step(late)
    stream.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return None if same else "did not wait for its stream"


def _stream(device: Device, kernel: str) -> str | None:
    """Work queued on the current stream is waited for."""
    layer, x = _layer(device, kernel)
    with torch.no_grad():
        return _waits(x, lambda x: (layer(x),))


def _training_stream(device: Device, kernel: str) -> str | None:
    """The same in a step forward and back, whose gradients come on the stream that the layer ran on."""
    layer, x = _layer(device, kernel)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))

    torch.backends.cudnn.deterministic = kernel == "auto"
    return _waits(x, step)


def _second_device(device: Device, kernel: str) -> str | None:
    layer, x = _layer(device, kernel)
    with torch.no_grad():
        expected = layer(x).to("cuda:1")
        found = layer.to("cuda:1")(x.to("cuda:1"))  # the current device stays 0
    return None if torch.equal(found, expected) else "differs on the second device"


def _first_call_in_a_graph_pool(device: Device, kernel: str) -> str | None:
    """torch.compile's warm-up allocates from the graph's memory: what outlives it may not lie there. No call comes
    before, and the weight is one whose packed form is kept."""
    layer, x = _layer(device, kernel, seed=1)
    layer.requires_grad_(False)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        found = [compiled(x).clone() for _ in range(4)]
        expected = layer(x)
    return None if all(torch.equal(f, expected) for f in found) else "differs from eager"


def _graph_outlives_its_plan(device: Device, kernel: str) -> str | None:
    """A graph reads tables and packed weights that the layer has forgotten since."""
    layer, x = _layer(device, kernel, seed=2)
    layer.requires_grad_(False)
    with torch.no_grad():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer._op.forget()
        layer.repack()
        gc.collect()
        torch.cuda.synchronize()
        litter = [torch.full((1 << n,), -1, dtype=torch.int32, device=x.device) for n in range(4, 20)]
        graph.replay()
        torch.cuda.synchronize()
    return None if torch.equal(y, expected) and litter else "a replay reads memory that was freed"


def _two_streams(device: Device, kernel: str) -> str | None:
    """Weights packed on a busy stream are waited for by another."""
    layer, x = _layer(device, kernel, seed=3)
    layer.requires_grad_(False)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    with torch.no_grad():
        for stream, wait in zip(streams, (_STRAND * 2000, 0), strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(wait)
                results.append(layer(x))
        torch.cuda.synchronize()
    return None if torch.equal(*results) else "the second stream did not wait for the packed weight"


def _odd_address(device: Device, kernel: str) -> str | None:
    """x begins one element after an aligned address."""
    layer, x = _layer(device, kernel)
    odd = (
        torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
        .as_strided(x.shape, x.stride(), 1)
        .copy_(x)
    )
    with torch.no_grad():
        return None if torch.equal(layer(odd), layer(x)) else "differs from an aligned input"


def _promises(device: Device) -> dict[str, Callable[[str], str | None]]:
    """By name, torch.compile, which is slow, last."""

    def on(test: Callable[..., str | None], *options: Any) -> Callable[[str], str | None]:
        return lambda kernel: test(device, kernel, *options)

    found = {"odd address": on(_odd_address)}
    if device.type != "cuda":
        return found | {"torch.compile": on(_compiled, None)}
    found |= {
        "CUDA graph": on(_graph),
        "CUDA graph outlives its plan": on(_graph_outlives_its_plan),
        "CUDA graph of training": on(_training_graph),
        "stream": on(_stream),
        "stream of training": on(_training_stream),
        "two streams": on(_two_streams),
    }
    if torch.cuda.device_count() > 1:
        found["second device"] = on(_second_device)
    return found | {
        "torch.compile": on(_compiled, None),
        "torch.compile, first call in a graph's memory": on(_first_call_in_a_graph_pool),
        "torch.compile reduce-overhead": on(_compiled, "reduce-overhead"),
    }


def _is_promised(name: str, kernel: str) -> bool:
    """The CUDA kernels reach torch.compile by the operators that "auto" tries, and not all have every pass."""
    if "compile" in name:
        return not kernel.startswith("cuda_")
    return "training" not in name or kernel not in _NOT_ALL_PASSES


def promised(device: Device) -> dict[str, tuple[Callable[[str], str | None], str]]:
    """Test and kernel of everything that is promised of graphs, streams, devices and compilation, by what it is."""
    names = ["auto", *kernels(device, {"dense"})] if device.type == "cuda" else ["stripe_gemm"]
    return {
        f"{name}, {kernel}": (test, kernel)
        for name, test in _promises(device).items()
        for kernel in names
        if _is_promised(name, kernel)
    }


def promises(device: Device, deadline: float, journal: Journal) -> None:
    """ "ok" or what went wrong, by what is promised, into the journal, as far as there is time."""
    over = {line["what"] for line in journal.lines("promise")} | set(
        journal.unfinished("promised", "promise")
    )
    for what, (test, kernel) in promised(device).items():
        if what in over:
            continue
        if time.perf_counter() > deadline:
            break
        journal.note("promised", what=what)
        try:
            result = test(kernel) or "ok"
        except FAILURES as error:
            result = f"{type(error).__name__}: {str(error)[:300]}"
        device.leave_if_lost()
        journal.note("promise", what=what, result=result)
