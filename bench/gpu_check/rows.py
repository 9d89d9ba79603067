"""The rows of the table: layers by pass, dtype and density, beside cuDNN; and whole networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise, product
from math import log, sqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_check.checks import PASSES, RESULT, kernels
from bench.gpu_check.device import FAILURES, Device, interleave, set_precision
from bench.gpu_check.journal import Journal
from bench.job import Oracle
from bench.skeletons import iid
from bench.timing import Ratio, Sample
from stripe_kernels import FilterSkeleton
from stripe_kernels.testing import GPU_MARGIN, Case, Operands, Prepared, case, poisoned_memory, prepared

ROUNDS = 21
NEAR = 0.7  # of a roof: what is nearer is held by it
CONFIGS = 6  # of one kernel that are measured, the best predicted first
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Setting:
    """One line of the table: a 3x3 layer, padding 1, channels_last."""

    channels: int
    side: int
    batch: int
    density: float
    dtype: str
    which: str

    @property
    def name(self) -> str:
        return f"{self.channels}-{self.channels}@{self.side}x{self.side}"

    @property
    def what(self) -> str:
        return f"{self.which} {self.dtype} {self.name} N={self.batch} d={self.density}"

    def case(self) -> Case:
        size = (self.channels, 3, 3)
        live = iid(size, self.density, f"{self.name} {self.density}")
        base = case(self.name, N=self.batch, C=self.channels, H=self.side, W=self.side, K=self.channels)
        return _Given(base.name, base.shape, self.density, "given", 0, live)


@dataclass(frozen=True)
class _Given(Case):
    """A case whose skeleton comes from elsewhere."""

    live: FilterSkeleton = None  # type: ignore[assignment]

    @property
    def skeleton(self) -> FilterSkeleton:
        return self.live


def settings(dry_run: bool) -> list[Setting]:
    """In the order of their worth: when time runs out the last ones are missing."""
    if dry_run:
        return [Setting(16, 5, 2, 0.24, "float32", which) for which in PASSES]
    shapes = ((512, 7), (256, 14), (128, 28), (64, 56))
    first = [
        Setting(c, side, 128, d, "bfloat16", w) for d in (0.24, 0.1) for c, side in shapes for w in PASSES
    ]
    crossover = [
        Setting(c, side, 128, d, "bfloat16", w) for d in (0.5, 0.75) for c, side in shapes for w in PASSES
    ]
    others = [
        Setting(c, side, 128, d, dtype, w)
        for dtype, d, (c, side), w in product(("float16", "tf32"), (0.24, 0.1), shapes, PASSES)
    ]
    single = [Setting(c, side, 1, d, "bfloat16", "fprop") for d in (0.24, 0.1) for c, side in shapes]
    strict = [Setting(c, side, 32, 0.24, "float32", w) for c, side in shapes[1:3] for w in PASSES]
    return first + crossover + others + single + strict


def _dense(problem: Case, which: str, weight: Tensor) -> Callable[[Operands], Tensor]:
    """cuDNN on the filter with its zeros."""
    s = problem.shape

    def backward(o: Operands, mask: list[bool]) -> Tensor:
        return torch.ops.aten.convolution_backward(
            o.dy, o.x, weight, None, s.stride, s.padding[:2], s.dilation, False, [0, 0], s.groups, mask
        )[mask.index(True)]

    if which == "fprop":
        return lambda o: F.conv2d(o.x, weight, None, s.stride, s.padding[:2], s.dilation, s.groups)
    return partial(backward, mask=[which == "dgrad", which == "wgrad", False])


def _contestants(
    device: Device, problem: Case, operands: Operands, which: str, dtype: str
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Contestants by name, and the reasons of those that refuse. Weights are packed once for fprop, in
    every call for dgrad."""
    live = torch.from_numpy(problem.skeleton.live.copy()).to(device.type)
    dense = operands.weight.new_zeros(*live.shape, problem.shape.group_c)
    dense[live] = operands.weight
    weight = dense.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    (_, predicted), *_ = prepared(problem, operands, which, "dense").values()
    found = {"cudnn": Prepared(_dense(problem, which, weight), predicted)}
    refused = {}
    for kernel in kernels(device):
        if kernel == "dense" or kernel.startswith("cpu_") or ("tf32" in kernel and dtype == "float32"):
            continue
        try:
            calls = prepared(problem, operands, which, kernel, repack=which == "dgrad")
        except FAILURES as error:
            refused[kernel] = str(error)[:500]
            continue
        found |= dict(list(calls.items())[:CONFIGS])
    return found, refused


def _wrong(oracle: Oracle, problem: Case, which: str, result: Tensor) -> str | None:
    if which == "wgrad" and result.dim() == 4:  # cuDNN's dense gradient
        live = torch.from_numpy(problem.skeleton.live.copy()).to(result.device)
        result = result.permute(0, 2, 3, 1)[live]
    torch.backends.cudnn.benchmark = False  # trying every algorithm for float64 takes longer than any of them
    failure = oracle.wrong(**{RESULT[which]: result})
    torch.backends.cudnn.benchmark = True
    return failure


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes/s of a large copy, reads and writes counted, and FLOP/s of a large GEMM by dtype."""

    copy: float
    gemm: dict[str, float]

    @classmethod
    def probe(cls, device: Device) -> Ceilings:
        large = device.type == "cuda"
        source = torch.ones(2**29 if large else 2**20, dtype=torch.uint8, device=device.type)
        target = torch.empty_like(source)
        copy = device.repeated([lambda: target.copy_(source)] * 3)
        side, gemm = (8192 if large else 64), {}
        for name, dtype in DTYPES.items():
            set_precision(name)
            a, b = (torch.randn(side, side, device=device.type).to(dtype) for _ in range(2))
            product_ = device.repeated([partial(torch.mm, a, b)] * 3)
            gemm[name] = 2.0 * side**3 / min(product_() for _ in range(5))
        return cls(2.0 * source.numel() / min(copy() for _ in range(5)), gemm)

    def roofs(self, setting: Setting, problem: Case) -> dict[str, float]:
        """The least seconds the live work can take: bytes each moved once ("memory"), live operations ("math")."""
        s, stripes = problem.shape, problem.skeleton.stripes
        size = torch.finfo(DTYPES[setting.dtype]).bits // 8
        moved = (s.N * (s.C * s.H * s.W + s.K * s.P * s.Q) + stripes * s.group_c) * size / self.copy
        return {"memory": moved, "math": 2.0 * s.macs(stripes) / self.gemm[setting.dtype]}


def _operands(problem: Case, dtype: torch.dtype, device: Device) -> Operands:
    """As Case.operands in channels_last, drawn where they are used: the host takes a second for the largest."""
    s, generator = problem.shape, torch.Generator(device.type).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device.type)

    def image(*size: int) -> Tensor:
        return normal(*size).to(dtype).contiguous(memory_format=torch.channels_last)

    stripes = problem.skeleton.stripes
    weight = normal(stripes, s.group_c) / sqrt(max(1.0, stripes / s.K) * s.group_c)
    x, dy, residual = (image(*size) for size in (s.input_size, s.output_size, s.output_size))
    return Operands(x, weight.to(dtype), dy, normal(s.K).to(dtype), normal(s.K).to(dtype), residual)


@lru_cache(maxsize=1)
def _inputs(problem: Case, dtype: str, device: Device) -> tuple[Operands, Oracle, list[Operands]]:
    """What the three passes of a layer share: operands that the oracle knows, and sets to time with."""
    operands = _operands(problem, DTYPES[dtype], device)
    size = operands.x.element_size() * (operands.x.numel() + operands.dy.numel())
    sets = [_fresh(operands) for _ in range(device.copies(size))]
    return operands, Oracle(problem, operands), sets


def layer_row(
    device: Device, setting: Setting, ceilings: Ceilings, rounds: int, journal: Journal, lost: set[str]
) -> dict[str, Any]:
    """One line: every contestant's median, spread and paired ratio to cuDNN; those whose result is wrong are not
    timed, but for cuDNN, nor are those `lost` to a crash."""
    set_precision(setting.dtype)
    problem = setting.case()
    operands, oracle, sets = _inputs(problem, setting.dtype, device)
    calls, refused = _contestants(device, problem, operands, setting.which, setting.dtype)
    ready, wrong = {}, {}
    for name, (call, _) in calls.items():
        what = f"{setting.what}, {name}"
        if what in lost:
            wrong[name] = "a process did not survive it"
            continue
        journal.note("trying", what=what)
        try:
            with poisoned_memory():
                failure = _wrong(oracle, problem, setting.which, call(operands))
            if failure:
                wrong[name] = failure
            if not failure or name == "cudnn":
                ready[name] = device.repeated([partial(call, one) for one in sets])
        except FAILURES as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:300]}"
        device.leave_if_lost()
        journal.note("tried", what=what)
    samples = interleave(ready, rounds)
    roofs = ceilings.roofs(setting, problem)
    roof = max(roofs, key=roofs.__getitem__)
    return {
        **setting.__dict__,
        "layer": setting.name,
        "stripes": problem.skeleton.stripes,
        "roofs": roofs,
        "roof": roof,
        "contestants": {
            name: {**_numbers(sample, samples.get("cudnn"), roofs[roof]), "predicted": calls[name].predicted}
            for name, sample in samples.items()
        },
        "auto": _auto(samples, calls),
        "refused": refused,
        "wrong": wrong,
    }


def _fresh(operands: Operands) -> Operands:
    """The same layout and weight over other values of x and dy."""
    return operands._replace(x=torch.randn_like(operands.x), dy=torch.randn_like(operands.dy))


def _numbers(sample: Sample, base: Sample | None, roof: float) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": sample.median, "spread": sample.spread, "n": sample.n}
    if base is not None:
        ratio = Ratio.of(base, sample)
        found |= {"over_cudnn": ratio.value, "low": ratio.low, "high": ratio.high}
    return found | {"share_of_roof": roof / sample.median}


def _auto(samples: dict[str, Sample], calls: dict[str, Prepared]) -> dict[str, Any]:
    """What auto takes once tuned, cuDNN included, by plan.py's own rule: chosen in even rounds and compared in odd
    ones, so that its ratio is not that of a lucky draw. Untuned it takes cuDNN; `predicted` is what the cost model
    would have taken, for a judgement of the model."""
    found: dict[str, Any] = {"predicted": min(samples, key=lambda name: calls[name].predicted)}
    medians = {name: float(np.median(sample.seconds[::2])) for name, sample in samples.items()}
    tuned = min(medians, key=medians.__getitem__)
    if "cudnn" in samples:
        if medians["cudnn"] <= GPU_MARGIN * medians[tuned]:
            tuned = "cudnn"
        base, other = (Sample(samples[name].seconds[1::2], 1) for name in ("cudnn", tuned))
        ratio = Ratio.of(base, other)
        found |= {"over_cudnn": ratio.value, "low": ratio.low, "high": ratio.high}
    return found | {"tuned": tuned}


def layer_rows(device: Device, deadline: float, dry_run: bool, rounds: int, journal: Journal) -> None:
    """Ceilings, rows, and the settings that came to nothing, with the reason, into the journal, as far as there is
    time; what is there already is kept."""
    if not journal.lines("ceilings"):
        ceilings = Ceilings.probe(device)
        journal.note("ceilings", copy_bytes_per_second=ceilings.copy, gemm_flops=ceilings.gemm)
    measured = journal.lines("ceilings")[-1]
    ceilings = Ceilings(measured["copy_bytes_per_second"], measured["gemm_flops"])
    lost = set(journal.unfinished("trying", "tried"))
    over = {line["what"] for line in (*journal.lines("finished"), *journal.lines("left"))}
    crashed = [
        what for what in journal.unfinished("started", "finished") if not any(what in one for one in lost)
    ]
    for setting in settings(dry_run):
        if setting.what in over:
            continue
        if setting.what in crashed:
            journal.note("left", what=setting.what, reason="a process did not survive its timing")
        elif time.perf_counter() > deadline:
            break
        else:
            journal.note("started", what=setting.what)
            try:
                journal.note("row", row=layer_row(device, setting, ceilings, rounds, journal, lost))
            except FAILURES as error:
                device.leave_if_lost()
                journal.note("left", what=setting.what, reason=f"{type(error).__name__}: {str(error)[:300]}")
            journal.note("finished", what=setting.what)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def best(row: dict[str, Any], kernel: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """The fastest configuration of a kernel, or of all but cuDNN."""
    found = {
        name: numbers
        for name, numbers in row["contestants"].items()
        if name != "cudnn" and (kernel is None or name.split("[")[0] == kernel)
    }
    return min(found.items(), key=lambda item: item[1]["seconds"]) if found else None


def limit(row: dict[str, Any], numbers: dict[str, Any]) -> str:
    """What holds a contestant: the roof that it is near, or what it does beside the live work: dead stripes,
    products on their way through the caches, launches, waits."""
    return str(row["roof"]) if numbers["share_of_roof"] >= NEAR else "own work"


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The density at which each kernel is as fast as cuDNN: log-linear between the two densities around it;
    a bound (with "at least" or "below") where it lies outside the densities measured."""
    groups: dict[tuple[Any, ...], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        key = row["which"], row["dtype"], row["layer"], row["batch"]
        for kernel in {name.split("[")[0] for name in row["contestants"]} - {"cudnn"}:
            chosen = best(row, kernel)
            if chosen and "over_cudnn" in chosen[1]:
                point = row["density"], chosen[1]["over_cudnn"]
                groups.setdefault(key, {}).setdefault(kernel, []).append(point)
    found = []
    for key, by_kernel in groups.items():
        for kernel, points in by_kernel.items():
            density, bound = _crossover(sorted(points))
            names = dict(zip(("which", "dtype", "layer", "batch"), key, strict=True))
            found.append({**names, "kernel": kernel, "density": density, "bound": bound})
    return found


def _crossover(points: list[tuple[float, float]]) -> tuple[float, str]:
    """Where the ratio falls through 1, from (density, ratio) by rising density."""
    if points[0][1] < 1:
        return points[0][0], "below"
    for (d0, r0), (d1, r1) in pairwise(points):
        if r1 < 1:
            return d0 + (d1 - d0) * log(r0) / (log(r0) - log(r1)), "at"
    return points[-1][0], "at least"
