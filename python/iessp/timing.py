"""Are two networks equal, and which is faster: an error budget against float64, and interleaved timings."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

EQUALITY_IMAGES = 64  # the largest of ten errors varies threefold by chance, that of hundreds does not


@dataclass(frozen=True)
class Equality:
    """Distances from a float64 run: `error` of the network under test, `allowed` by the budget."""

    error: float
    allowed: float
    rms_error: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed and self.rms_error <= self.rms_allowed


@torch.inference_mode()
def compare(model: nn.Module, reference: nn.Module, x: Tensor, batch: int | None = None) -> Equality:
    """Is `model` as close to a float64 run of `reference` as twice the reference's own float32 run, plus 2
    ulp?

    Of the reference's runs in both memory formats, which add in another order, the worse counts. The ulp is that of
    the largest output; the relative RMS has the same budget. x float32 [N, C, H, W]; `model` gets `batch`
    images a call, for it may compute other batches in another way.
    """
    model, reference = (copy.deepcopy(m).eval() for m in (model, reference))
    exact_model = copy.deepcopy(reference).double()
    ours = torch.cat([model(part) for part in x.split(batch or len(x))]).double()
    exact = exact_model(x.double())
    own = []
    for layout in (torch.contiguous_format, torch.channels_last):
        arranged = copy.deepcopy(reference).to(memory_format=layout)  # type: ignore[call-overload]
        own.append(arranged(x.contiguous(memory_format=layout)).double())
    largest = exact.abs().max().float()
    ulp = float(torch.nextafter(largest, largest.new_tensor(torch.inf)) - largest)
    scale = float(exact.square().mean().sqrt()) or 1.0

    def rms(y: Tensor) -> float:
        return float((y - exact).square().mean().sqrt()) / scale

    return Equality(
        error=float((ours - exact).abs().max()),
        allowed=2 * max(float((y - exact).abs().max()) for y in own) + 2 * ulp,
        rms_error=rms(ours),
        rms_allowed=2 * max(map(rms, own)) + 2 * ulp / float(largest),
    )


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles of n measurements."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleave(contestants: Mapping[str, Callable[[], object]], seconds: float = 8.0) -> dict[str, Timing]:
    """Time the contestants round by round, each round starting with another one, for about `seconds` in all.

    A measurement repeats its call to last about 2 ms; each contestant gets at least five measurements.
    """
    repeats, spent = {}, 0.0
    for name, call in contestants.items():
        call()
        start = time.perf_counter()
        call()
        spent += (once := time.perf_counter() - start)
        repeats[name] = max(1, round(2e-3 / once))
    rounds = max(5, round(seconds / max(spent, 2e-3 * len(contestants))))
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call = contestants[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) * 1e3 / repeats[name])
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def time_networks(
    networks: dict[str, nn.Module],
    x: Tensor,
    seconds: float = 8.0,
    others: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, tuple[Timing, str]]:
    """Inference time of each network on x [N, C, H, W], in the faster of both memory formats: name -> (time,
    format). `others` are calls that compete as they are, in a format of their own.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    contestants: dict[str, Callable[[], object]] = dict(others or {})
    for name, network in networks.items():
        for title, fmt in formats.items():
            arranged, given = copy.deepcopy(network).eval(), x.contiguous(memory_format=fmt)
            for module in arranged.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=fmt)  # type: ignore[call-overload]
            contestants[f"{name}/{title}"] = partial(arranged, given)
    with torch.inference_mode():
        times = interleave(contestants, seconds)
    best = {name: min(formats, key=lambda title: times[f"{name}/{title}"].median) for name in networks}
    found = {name: (times[f"{name}/{title}"], title) for name, title in best.items()}
    return found | {name: (times[name], "its own") for name in others or {}}


def busy() -> str | None:
    """A warning when other processes load the machine, which makes timings of several threads worthless."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    own = torch.get_num_threads()
    return f"load {load:.1f} on {cores} cores: timings are disturbed" if load > own + 0.5 else None
