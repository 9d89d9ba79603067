"""Mixed shapes for minutes: the process's memory has to stay flat.

    python -m tests.soak [--seconds 600] [--record tests/records/soak.json]      (make soak)

Layers of a few hundred generated problems run forwards and backwards with "auto" and with kernels by name, with 1 to 3
threads and in every layout; now and then a network with a skeleton of its own is frozen, saved and loaded.

Every new skeleton takes a place in the caches of settings, skeletons and plans, which are bounded. Networks fill them
first, so that the measured part lives on evictions: what grows then grows for ever. Three sizes are sampled: the bytes
malloc has given out, in which a leak of native code or of a tensor shows; Python's blocks, in which one of objects
does; and what is resident, to which fragmentation adds. Through each goes a straight line; flat is where the upper end
of its 95 % interval stays below 1 % over the whole run. What torch.fx itself keeps of every graph is dropped before
each sample.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import linecache
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stripe_kernels import FilterSkeleton, freeze, load, ops, save
from stripe_kernels.ops import StripeOp
from stripe_kernels.plan import make_plan
from tests.generate import Generated, problems
from tests.passes import NATIVE

DISTINCT = 300  # problems
SAMPLE, STORE = (
    20,
    100,
)  # rounds between samples, and between networks: safetensors keeps 0.1 KiB a tensor that it reads
GROWTH = 0.01  # of the size, that the upper end of the interval may reach in the run
BATCHES = 20  # means of so many stretches of samples are nearly independent


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def sizes() -> dict[str, float]:
    """What this process holds: MiB from malloc (glibc), thousands of Python's blocks, MiB resident."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB from malloc": (info.uordblks + info.hblkhd) / 2**20,
        "thousand Python blocks": sys.getallocatedblocks() / 1000,
        "MiB resident": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def train(problem: Generated, kernel: str) -> None:
    operands = problem.case.operands(torch.float32, problem.layout)
    op = StripeOp.of(*problem.case.arguments, kernel)
    x, weight = operands.x.detach().requires_grad_(), operands.weight.requires_grad_()
    y = ops.fprop(op, x, weight, operands.bias, operands.scale, operands.residual, "silu")
    torch.autograd.grad(y, (x, weight), operands.dy)


def store(path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    save(freeze(body, {"0": torch.rand(16, 3, 3) < 0.3, "2": torch.rand(8, 3, 3) < 0.3}), path)
    load(path)(torch.randn(2, 8, 9, 9))


def forget_sources() -> None:
    """torch.fx (2.13) keeps the text of every graph that was ever compiled, 2 KiB a network: not ours to judge."""
    torch.fx.graph_module._loader.eval_cache.clear()
    linecache.clearcache()


def caches() -> dict[str, Any]:
    """Those that keep what a new skeleton, or a new shape, asks for."""
    return {
        "settings": StripeOp.of,
        "skeletons": FilterSkeleton.from_text,
        "plans": make_plan,
    }


def fill_caches(path: Path) -> int:
    """Networks stored and loaded until every cache holds all it may, and nothing else but them; how many."""
    torch.set_num_threads(1)
    for stored in itertools.count():
        info = [c.cache_info() for c in caches().values()]
        if all(i.currsize == i.maxsize for i in info) and 2 * stored >= max(i.maxsize for i in info):
            return stored
        store(path)  # two layers
    raise AssertionError


def growth(seconds: list[float], samples: list[float]) -> tuple[float, float]:
    """By how much of itself a size grows from the first sample to the last, by a straight line through the means of
    BATCHES stretches: the estimate, and the upper end of its two-sided 95 % interval."""
    at, size = (
        np.array([b.mean() for b in np.array_split(np.array(v), BATCHES)]) for v in (seconds, samples)
    )
    slope, mean = np.polyfit(at, size, 1)[0], size.mean()
    rest = size - mean - slope * (at - at.mean())
    error = math.sqrt(float(rest @ rest) / (BATCHES - 2) / float(((at - at.mean()) ** 2).sum()))
    t = 2.101  # Student's, of 18 degrees of freedom
    span = seconds[-1] - seconds[0]
    return float(slope * span / mean), float((slope + t * error) * span / mean)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="after the caches are full")
    parser.add_argument("--record", type=Path, help="write what was seen here as JSON")
    arguments = parser.parse_args()
    drawn, rng = list(problems(DISTINCT, seed=0, kernels=NATIVE)), random.Random(0)
    at: list[float] = []
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:

        def one(problem: Generated, number: int) -> None:
            torch.set_num_threads(problem.threads)
            train(problem, "auto")
            train(problem, problem.kernel)
            if number % STORE == 0:
                store(Path(folder) / "network")

        networks = fill_caches(Path(folder) / "network")
        for number, problem in enumerate(
            [*drawn, *drawn]
        ):  # these push networks out, and fill torch's own caches
            one(problem, number)
        rounds, begin = 0, time.monotonic()
        while (now := time.monotonic() - begin) < arguments.seconds:
            if rounds % SAMPLE == 0:
                forget_sources()
                gc.collect()
                at.append(now)
                samples.append(sizes())
            one(rng.choice(drawn), rounds)
            rounds += 1
    found: dict[str, dict[str, float]] = {}
    for name in samples[0]:
        values = [s[name] for s in samples]
        estimate, upper = growth(at, values)
        found[name] = {
            "mean of the first tenth": round(float(np.mean(values[: len(values) // 10])), 2),
            "mean of the last tenth": round(float(np.mean(values[-(len(values) // 10) :])), 2),
            "growth in the run": round(estimate, 5),
            "upper end of its 95 % interval": round(upper, 5),
        }
    flat = all(f["upper end of its 95 % interval"] < GROWTH for f in found.values())
    written = {
        "command": " ".join(["python -m tests.soak", *sys.argv[1:]]),
        "networks that filled the caches": networks,
        "caches": {name: c.cache_info()._asdict() for name, c in caches().items()},
        "rounds": rounds,
        "samples": len(samples),
        "sizes": found,
        "flat": flat,
    }
    print(json.dumps(written, indent=1))
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
