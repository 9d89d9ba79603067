"""tune: the kernel of every layer chosen by measurement."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stripe_kernels import backends, plan, registry
from stripe_kernels.compile import cache
from stripe_kernels.compile.network import Network, as_arguments, threads_of
from stripe_kernels.plan import Candidate, Plan
from stripe_kernels.registry import PASSES, Pass, Problem
from stripe_kernels.snapshots import kept_bias, kept_form
from stripe_kernels.stripe_op import StripeOp, is_channels_last

_HOPELESS = 4.0  # predicted this many times slower than the best prediction: not measured
_IN_GRAPH = 10  # calls a graph holds: one alone takes less time than its launch
_SLOW = 2.0  # measured this many times slower than the best at first sight: not measured further
_DISTURBED = 1.0  # scatter of the best: up to .6 on quiet cores, above 1 where a team met other work on them


class Timing(NamedTuple):
    """Seconds of a call."""

    median: float
    scatter: float  # what the middle half of the samples spans, in medians; infinite where there is one


@dataclass(frozen=True)
class Site:
    """One call of the operator: the layer's name, its settings, tensors like the ones it was given."""

    name: str
    op: StripeOp
    problem: Problem
    x: Tensor
    bias: Tensor | None
    scale: Tensor | None
    residual: Tensor | None
    activation: str

    @property
    def epilogue(self) -> str:
        parts = [n for n in ("scale", "bias", "residual") if getattr(self, n) is not None]
        return "+".join([*parts, self.activation])

    def call(self, candidate: Candidate, weight: Tensor, which: Pass) -> Callable[[], Tensor]:
        """A closure that runs the candidate once on tensors like the site's; dy is laid out as x.

        dgrad packs the weight in every call, as training does.
        """
        runner = plan.Plan(self.problem, which, candidate, ()).build()
        if which != "fprop":
            dy = _like(self.x, self.problem.shape.output_size)
            x = self.x
            return (lambda: runner(dy, runner.pack(weight))) if which == "dgrad" else (lambda: runner(dy, x))
        packed = kept_form(runner, weight)
        x, bias = self.x, kept_bias(runner, self.bias)
        scale, residual, activation = self.scale, self.residual, self.activation
        return lambda: runner(x, packed, bias, scale, residual, activation)


def tune(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    seconds: float = 0.2,
    folder: str | Path | None = None,
    training: bool = False,
    cuda_graphs: bool = False,
) -> dict[str, Plan]:
    """Measures every stripe layer's candidates, dense included, as `model` calls them on `example_input`.

    From then on "auto" takes the fastest for problems of this size, dtype, layout and number of threads, in
    this process, in files that `save` writes, and, through the user's cache folder, in later processes on
    this kind of machine; the next process measures again where times scattered as they do beside other work.

    seconds: time a layer's measurements may take. folder: where choices are kept; default the user's cache
    folder. training: measure dgrad and wgrad too, each for as long. cuda_graphs: on a GPU measure calls inside
    CUDA graphs, for a network that will be captured into one; otherwise the time Python needs to launch a
    kernel counts. A kernel that fails on the device is left out. Returns the plans of fprop by layer name.
    The model runs in inference mode and is not changed.
    """
    store = cache.default_folder() if folder is None else Path(folder)
    plans: dict[str, Plan] = {}
    unwritable: OSError | None = None
    inputs = as_arguments(example_input)
    with threads_of(model, inputs):
        for site in sites(model, inputs):
            for which in PASSES if training else PASSES[:1]:
                try:
                    _choose(site, seconds, store, which, cuda_graphs)
                except OSError as error:
                    unwritable = error
            site.op.forget()
            plans[site.name] = plan.make_plan(site.problem, "fprop", site.op.kernel)
    if unwritable is None:
        cache.prune(store)
    else:
        warnings.warn(f"tuned choices last for this process only: {unwritable}", stacklevel=2)
    for module in model.modules():
        if isinstance(module, Network):
            module.unbind()
    return plans


def sites(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> list[Site]:
    """Every call of fprop in one run of the model, in order; a layer called twice is listed twice."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    inputs = as_arguments(example_input)
    with torch.inference_mode(), evaluating(model), _Watch(model) as watch:
        model(*inputs)
    return watch.sites


def candidates(site: Site, which: Pass = "fprop") -> tuple[Candidate, ...]:
    """Everything "auto" may choose from at a site, as predicted, refusals included."""
    backends.load()
    automatic = [name for name, kernel in registry.kernels().items() if kernel.automatic]
    return plan.candidates(site.problem, which, automatic)


def measure(
    site: Site, seconds: float, which: Pass = "fprop", cuda_graphs: bool = False
) -> tuple[tuple[Candidate, ...], bool]:
    """The site's candidates with medians of interleaved runs, and whether other work disturbed them.

    Refused and hopeless ones carry no time, those that fail on the device the reason.
    """
    every = candidates(site, which)
    runnable = [c for c in every if c.refusal is None]
    best = min(c.predicted or 0.0 for c in runnable)
    tried = [c for c in runnable if c.kernel == "dense" or (c.predicted or 0.0) <= _HOPELESS * best]
    device = site.x.device
    weight = torch.randn(site.op.skeleton.stripes, site.problem.shape.group_c, dtype=site.x.dtype)
    weight = weight.to(device)
    found: dict[int, Candidate] = {}
    calls: dict[int, Callable[[], Any]] = {}
    with torch.inference_mode():
        for c in tried:
            try:
                calls[id(c)] = _ready(site.call(c, weight, which), device, cuda_graphs)
            except Exception as error:  # whatever a compiler or driver raises
                if not _is_gpu(device) or c.kernel == "dense":
                    raise
                found[id(c)] = replace(c, refusal=f"failed on the device: {str(error)[:200]}")
        times = interleaved(list(calls.values()), seconds, device=device)
    a_call = _IN_GRAPH if cuda_graphs and _is_gpu(device) else 1
    ready = [c for c in tried if id(c) in calls]
    found |= {id(c): replace(c, measured=t.median / a_call) for c, t in zip(ready, times, strict=True)}
    return tuple(found.get(id(c), c) for c in every), min(times).scatter > _DISTURBED


def _ready(call: Callable[[], Any], device: torch.device, cuda_graphs: bool) -> Callable[[], Any]:
    """The call; on a GPU after one run, which compiles it, and as a graph of several where asked."""
    if not _is_gpu(device):
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize(device)
    if not cuda_graphs:
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_IN_GRAPH):
            call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], Any]) -> None:
    """Replays what was captured of `call`, which has to live as long: a graph only has the addresses of what it reads,
    packed weights for one, and torch gives freed memory back to the driver before the next capture."""
    graph.replay()


def interleaved(
    calls: list[Callable[[], Any]], seconds: float, least: int = 5, device: torch.device | None = None
) -> list[Timing]:
    """Times of each call, in rounds whose order rotates; clearly slower ones drop out early.

    A sample repeats its call for at least 50 us; where `device` is a GPU for 1 ms, and then waits for it. At
    least `least` rounds, then until `seconds` have passed.
    """
    for call in calls:
        call()  # pays for the first touch of weights and scratch memory
    first = [min(sample(call, 1, device) for _ in range(2)) for call in calls]
    repeats = [repeats_of(t, device) for t in first]
    racing = [i for i, t in enumerate(first) if t <= _SLOW * min(first)]
    samples: list[list[float]] = [[] if i in racing else [t] for i, t in enumerate(first)]
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for position in range(len(racing)):
            i = racing[(position + rounds) % len(racing)]
            samples[i].append(sample(calls[i], repeats[i], device))
        rounds += 1
    return [_timing(sorted(s)) for s in samples]


def _timing(samples: list[float]) -> Timing:
    n, median = len(samples), samples[len(samples) // 2]
    return Timing(median, (samples[3 * n // 4] - samples[n // 4]) / median if n > 1 else math.inf)


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def repeats_of(seconds: float, device: torch.device | None) -> int:
    """Calls of so many seconds that make a sample."""
    least = 1e-3 if _is_gpu(device) else 50e-6
    return max(1, min(100, int(least / max(seconds, 1e-7))))


def sample(call: Callable[[], Any], repeats: int, device: torch.device | None) -> float:
    """Seconds a call takes, over `repeats` calls; a GPU is waited for at the end."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if _is_gpu(device):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _like(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Random values of another size in x's dtype, device and memory format."""
    last = is_channels_last(x)
    values = torch.randn(size, dtype=x.dtype, device=x.device)
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _choose(site: Site, seconds: float, store: Path, which: Pass, cuda_graphs: bool) -> None:
    """Records the site's choice, from the cache where it is there."""
    if site.op.kernel != "auto":
        return
    runnable = [c for c in candidates(site, which) if c.refusal is None]
    epilogue = site.epilogue if which == "fprop" else "none"
    called = f"{epilogue} in CUDA graphs" if cuda_graphs and _is_gpu(site.x.device) else epilogue
    name = cache.key(site.problem, which, called, runnable)
    measured = cache.read(store, name)
    if measured is not None:
        plan.record(site.problem, which, measured)
        return
    timed, disturbed = measure(site, seconds, which, cuda_graphs)
    measured = tuple(c for c in timed if c.measured)
    plan.record(site.problem, which, measured)
    if not disturbed:
        cache.write(store, name, site.problem, which, measured)


class _Watch(TorchDispatchMode):
    """Notes every fprop that torch dispatches, with the name of the module that asked for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._names = {m: n for n, m in model.named_modules()}
        self._stack: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.stripe_kernels.fprop.default:
            x, activation, settings = args[0], args[5], args[6:]
            op = StripeOp.of_operator(settings)
            problem = op.problem(tuple(x.shape), x.dtype, x.device, is_channels_last(x))
            x = torch.randn_like(x)
            bias, scale, residual = (t if t is None else torch.randn_like(t) for t in args[2:5])
            name = self._stack[-1] if self._stack else ""
            self.sites.append(Site(name, op, problem, x, bias, scale, residual, activation))
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, every module's own flag restored."""
    training = {m: m.training for m in model.modules() if m.training}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
