"""Whole networks in CUDA graphs: dense, dense with BN folded, compiled by torch, frozen, optimized."""

from __future__ import annotations

import copy
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bench.gpu_check.device import FAILURES, Device, interleave, set_precision
from bench.gpu_check.journal import Journal
from bench.skeletons import iid
from bench.timing import Ratio
from iessp.models import build
from stripe_kernels import freeze, optimize, tune
from stripe_kernels.testing import Budget

DENSITY = 0.24
_SECONDS = 0.05  # of measuring one layer
# name, classes, side, batches
NETWORKS = (("vgg16", 10, 32, (1024, 1)), ("resnet18", 1000, 224, (64, 1)))
# Networks that torch compiles too: that takes as long as all else of a row.
COMPILED = ("vgg16", "resnet20")
# How torch compiles, the best first; what takes longer than this many seconds gives way to the next, for good. Its own
# convolutions are left out: to tune them takes minutes.
_MODES: dict[str, dict[str, Any]] = {
    "max-autotune, convolutions by cuDNN": {"max_autotune": True, "max_autotune_conv_backends": "ATEN"},
    "default": {},
}
_COMPILE_SECONDS = 40.0
_CHECKED = 64  # images of a batch whose result is compared with float64 on the CPU
DRY = (("resnet20", 10, 8, (2,)),)


def settings(dry_run: bool) -> dict[str, tuple[str, int, int, int]]:
    """Name, classes, side and batch of every row, by what the row is called, in the order of their worth."""
    return {
        f"{name} N={batch}": (name, classes, side, batch)
        for name, classes, side, batches in (DRY if dry_run else NETWORKS)
        for batch in batches
    }


def _masked(name: str, classes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with random weights, zeros in the dead stripes of its 3x3 convolutions, and those
    skeletons."""
    torch.manual_seed(0)
    network = build(name, classes).eval()
    skeletons = {}
    for where, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels > 3:
            live = iid((module.out_channels, 3, 3), DENSITY, f"{name} {where}")
            skeletons[where] = torch.tensor(live.live)
            with torch.no_grad():
                module.weight.mul_(skeletons[where][:, None])
    return network, skeletons


def _contestants(network: nn.Module, skeletons: dict[str, Tensor], x: Tensor) -> dict[str, nn.Module]:
    """Every one with the same function of x."""
    last = torch.channels_last

    def placed(module: nn.Module) -> nn.Module:
        return module.to(x.device, x.dtype, memory_format=last)

    frozen = placed(freeze(network, skeletons))
    folder = tempfile.mkdtemp(prefix="gpu_check_tune")  # what another run measured may be of another code
    tune(frozen, x, cuda_graphs=True, seconds=_SECONDS, folder=folder)
    return {
        "dense": placed(copy.deepcopy(network)),
        "dense, BN folded": placed(fuse(copy.deepcopy(network))),
        "frozen": frozen,
        "optimized": optimize(placed(freeze(network, skeletons)), x, cuda_graphs=True, folder=folder),
    }


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError, again every second, once the time is over: a compiler may catch the first ones."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compiled(device: Device, module: nn.Module, x: Tensor, left: dict[str, str]) -> dict[str, nn.Module]:
    """`module` as torch compiles it, called once; {} where it cannot, and the reasons in `left`."""
    for mode, options in list(_MODES.items()):
        on_a_gpu = device.type == "cuda"
        how: dict[str, Any] = {"options": options} if on_a_gpu else {"backend": "eager"}
        name = f"dense, BN folded, torch.compile {mode if on_a_gpu else 'eager'}"
        torch.compiler.reset()
        try:
            with _within(_COMPILE_SECONDS):
                compiled = torch.compile(module, dynamic=False, **how)
                compiled(x)
            return {name: compiled}  # type: ignore[dict-item]
        except Exception as error:  # noqa: BLE001 -- whatever a compiler raises, the others' row is to be had
            left[name] = f"{type(error).__name__}: {str(error)[:300]}"
            del _MODES[mode]
    return {}


def network_row(
    device: Device, name: str, classes: int, side: int, batch: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    set_precision("tf32")
    network, skeletons = _masked(name, classes)
    sets = [
        torch.randn(batch, 3, side, side, device=device.type).to(dtype, memory_format=torch.channels_last)
        for _ in range(4)
    ]
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(sets[0][:_CHECKED].cpu().double())
        contestants = _contestants(network, skeletons, sets[0])
        budget = Budget.of(exact, contestants["dense"](sets[0])[:_CHECKED].cpu())
        wrong, left, ready = {}, {}, {}  # type: ignore[var-annotated]
        if name in COMPILED:
            contestants |= _compiled(device, contestants["dense, BN folded"], sets[0], left)
        for which, module in contestants.items():
            failure = budget.failure(module(sets[0])[:_CHECKED].cpu())
            if failure:
                wrong[which] = failure
            else:
                ready[which] = device.repeated([_call(module, x) for x in sets])
        samples = interleave(ready, rounds)
    base = min((sample for n, sample in samples.items() if n.startswith("dense")), key=lambda s: s.median)
    return {
        "network": name, "batch": batch, "side": side, "dtype": str(dtype)[6:], "density": DENSITY,
        "wrong": wrong, "left_out": left,
        "contestants": {
            which: {"seconds": s.median, "spread": s.spread, "n": s.n, **_ratio(Ratio.of(base, s))}
            for which, s in samples.items()
        },
    }  # fmt: skip


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return partial(module, x)


def _ratio(ratio: Ratio) -> dict[str, float]:
    return {"over_dense": ratio.value, "low": ratio.low, "high": ratio.high}


def network_rows(device: Device, deadline: float, dry_run: bool, rounds: int, journal: Journal) -> None:
    """Rows, and the networks that raised, with the reason, into the journal, as far as there is time."""
    over = {line["what"] for line in journal.lines("tried")} | set(journal.unfinished("trying", "tried"))
    for what, (name, classes, side, batch) in settings(dry_run).items():
        if what in over:
            continue
        if time.perf_counter() > deadline:
            break
        dtype = torch.float32 if dry_run else torch.bfloat16
        journal.note("trying", what=what)
        try:
            journal.note("row", row=network_row(device, name, classes, side, batch, dtype, rounds))
        except FAILURES as error:
            journal.note("left", what=what, reason=str(error)[:500])
        device.leave_if_lost()
        journal.note("tried", what=what)
