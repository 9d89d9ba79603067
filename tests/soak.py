"""Mixed shapes for minutes: the process's memory has to stay flat.

    python -m tests.soak [--seconds 600] [--record tests/records/soak.json]      (make soak)

Layers of a few hundred generated problems run forwards and backwards with "auto" and with kernels by name, with 1 to 3
threads and in every layout; now and then a network with a skeleton of its own is frozen, saved and loaded, and a layer
with that skeleton makes the training steps that give it native calls of its own.

Every new skeleton takes a place in the caches of settings, skeletons and plans, which are bounded. The same mix, with
more networks, fills them first, until what a new network pushes out is like what it brings: a plan of three threads has
more candidates than one of a single thread, and caches full of the latter would grow as the former replace them. What
grows then grows for ever. Sampled are the bytes malloc has given out, in which a leak of native code or of a tensor
shows; Python's blocks, in which one of objects does; the anonymous memory beyond what malloc keeps free, in which any
other does; and the mappings. Through each goes a straight line over the rounds. Flat is where the upper end of its 95 %
interval stays below 1 % of the size over the whole run and, however many rounds that was, below what a round may keep
(A_ROUND).

What malloc keeps free is a high-water mark: it rises in steps of MiB where large tensors find no hole, ever more
rarely, and no line describes it. It is bounded instead (FREE), as threads are by those of the run's first half. What is
resident is told, not judged: malloc's steps are in it.

Others keep something without us. What torch.fx keeps of every graph, and CPython of looked-up names, is dropped before
each sample. What safetensors loses with every tensor that it reads cannot be: it is measured in the same run, on the
same file with nothing of ours (`lost_by_safetensors`), and not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import linecache
import math
import random
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from stripe_kernels import FilterSkeleton, StripeConv2d, freeze, load, ops, save
from stripe_kernels.plan import make_plan
from stripe_kernels.stripe_op import StripeOp
from tests.generate import Generated, problems
from tests.passes import NATIVE

DISTINCT = 300  # problems
SAMPLE, STORE = 20, 100  # rounds between samples, and between networks
FILL = 2  # rounds between the networks that fill the caches: each problem comes again before its settings are evicted
GROWTH = 0.01  # of the size, that the upper end of the interval may reach in the run
A_ROUND = {  # and a round: one chunk of malloc's smallest; one of Python's blocks for every network
    "MiB from malloc": 32 / 2**20,
    "thousand Python blocks": 1 / 1000 / STORE,
}
FREE = 0.5  # of the bytes given out, that malloc may keep free besides
JUDGED = (
    "MiB from malloc",
    "thousand Python blocks",
    "MiB anonymous beyond malloc's free",
    "mappings",
)  # by a line
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
    """What this process holds: MiB and thousands of blocks, mappings and threads. malloc's figures are glibc's, of all
    its arenas."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    anonymous, resident = (int(status[name].split()[0]) / 2**10 for name in ("RssAnon", "VmRSS"))
    free = info.fordblks / 2**20
    return {
        "MiB from malloc": (info.uordblks + info.hblkhd) / 2**20,
        "thousand Python blocks": sys.getallocatedblocks() / 1000,
        "MiB anonymous beyond malloc's free": anonymous - free,
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "MiB free in malloc": free,
        "threads": int(status["Threads"]),
        "MiB resident": resident,
    }


def train(problem: Generated, kernel: str) -> None:
    operands = problem.case.operands(torch.float32, problem.layout)
    op = StripeOp.of(*problem.case.arguments, kernel)
    x, weight = operands.x.detach().requires_grad_(), operands.weight.requires_grad_()
    y = ops.fprop(op, x, weight, operands.bias, operands.scale, operands.residual, "silu")
    torch.autograd.grad(y, (x, weight), operands.dy)


def store(path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    # As many filters live at every tap: what comes into the caches is then as large as what goes.
    live = {"0": torch.rand(16, 3, 3).argsort(0) < 5, "2": torch.rand(8, 3, 3).argsort(0) < 3}
    save(freeze(body, live), path)
    load(path)(torch.randn(2, 8, 9, 9))
    steps(StripeConv2d(8, 16, 3, padding=1, skeleton=FilterSkeleton(live["0"].numpy())))


def steps(layer: StripeConv2d) -> None:
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    for _ in range(5):  # from the fourth on it makes its calls as one (front.py)
        torch.autograd.grad(layer(x).sum(), (x, *layer.parameters()))


def forget_what_others_keep() -> None:
    """torch.fx (2.13) keeps the text of every graph that was ever compiled, 2 KiB a network. CPython's cache of 4096
    look-ups in types keeps the names that were looked up, and torch's C++ makes a new string of a name for every
    look-up: rounds fill it slowly with strings, and a network, whose names are interned, empties part of it."""
    torch.fx.graph_module._loader.eval_cache.clear()
    linecache.clearcache()
    if sys.version_info >= (3, 13):
        sys._clear_internal_caches()
    else:
        sys._clear_type_cache()


def caches() -> dict[str, Any]:
    """Those that keep what a new skeleton, or a new shape, asks for."""
    return {
        "settings": StripeOp.of,
        "skeletons": FilterSkeleton.from_text,
        "plans": make_plan,
    }


class Mix:
    """Rounds of generated problems, and networks between them."""

    def __init__(self, folder: Path) -> None:
        self.drawn = list(problems(DISTINCT, seed=0, kernels=NATIVE))
        self.path, self.stored = folder / "network", 0

    def round(self, problem: Generated) -> None:
        torch.set_num_threads(problem.threads)
        train(problem, "auto")
        train(problem, problem.kernel)

    def network(self) -> None:
        torch.set_num_threads(1 + self.stored % 3)  # in turn, so that what is evicted is like what comes
        store(self.path)
        self.stored += 1

    def fill_caches(self) -> int:
        """Until every cache holds all it may, and of plans only those of networks; how many networks that took."""
        again = itertools.cycle(self.drawn)
        for _ in self.drawn:
            self.round(next(again))
        largest = max(c.cache_info().maxsize for c in caches().values())
        while 2 * self.stored < largest:  # a network has two layers
            self.network()
            for _ in range(FILL):
                self.round(next(again))
        info = {name: c.cache_info() for name, c in caches().items()}
        assert all(i.currsize == i.maxsize for i in info.values()), info
        return self.stored


def lost_by_safetensors(path: Path, reads: int = 500) -> float:
    """Python's blocks for ever, from one reading of the file by safetensors (0.8.0) alone: two a tensor, the ints of
    the slice that it makes (PySlice::new of pyo3 0.28 lets go of neither), but for those up to 256."""

    def read() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)

    counts = []
    for _ in range(2):
        for _ in range(reads):
            read()
        gc.collect()
        counts.append(sys.getallocatedblocks())
    return (counts[1] - counts[0]) / reads


def means(values: list[float]) -> np.ndarray:
    """Of BATCHES stretches, in their order."""
    return np.array([stretch.mean() for stretch in np.array_split(np.array(values, dtype=float), BATCHES)])


def line(rounds: list[float], samples: list[float]) -> tuple[float, float]:
    """A size's growth a round, by a straight line through the means of BATCHES stretches: the estimate, and the upper
    end of its two-sided 95 % interval."""
    at, size = means(rounds), means(samples)
    slope = np.polyfit(at, size, 1)[0]
    rest = size - size.mean() - slope * (at - at.mean())
    error = math.sqrt(float(rest @ rest) / (BATCHES - 2) / float(((at - at.mean()) ** 2).sum()))
    return float(slope), float(slope + 2.101 * error)  # Student's t, of 18 degrees of freedom


def judge(rounds: list[float], samples: list[dict[str, float]]) -> tuple[dict[str, dict[str, Any]], bool]:
    """What is told of every size, and whether all are flat. ValueError for too few samples."""
    if len(samples) < 2 * BATCHES:
        raise ValueError(
            f"{len(samples)} samples are too few for a line through {BATCHES} means: soak longer"
        )
    values = {name: [s[name] for s in samples] for name in samples[0]}
    found = {
        name: {"largest": round(max(v), 3), "means over time": [round(m, 3) for m in means(v).tolist()]}
        for name, v in values.items()
    }
    flat = True
    for name in JUDGED:
        slope, upper = line(rounds, values[name])
        share = (rounds[-1] - rounds[0]) / float(np.mean(values[name]))
        flat &= upper * share < GROWTH and upper < A_ROUND.get(name, math.inf)
        found[name] |= {
            "growth in the run": round(slope * share, 5),
            "upper end of its 95 % interval": round(upper * share, 5),
            "growth in 1,000 rounds": round(slope * 1000, 5),
            "upper end of that": round(upper * 1000, 5),
        }
        if name in A_ROUND:
            found[name]["that has to stay below"] = round(A_ROUND[name] * 1000, 5)
    free, threads = "MiB free in malloc", values["threads"]
    found[free]["that has to stay below"] = round(FREE * min(values["MiB from malloc"]), 3)
    flat &= max(values[free]) < FREE * min(values["MiB from malloc"])
    found["threads"]["largest of the first half"] = max(threads[: len(threads) // 2])
    flat &= max(threads) == found["threads"]["largest of the first half"]
    return found, flat


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="after the caches are full")
    parser.add_argument("--record", type=Path, help="write what was seen here as JSON")
    arguments = parser.parse_args()
    rng = random.Random(0)
    # A list of samples is itself six of Python's blocks each, which grow. This grows as well, by 8 bytes a value: 3.2 a
    # round, and the record's line of what malloc gave out has hardly another slope.
    kept = array("d")
    with tempfile.TemporaryDirectory() as folder:
        mix = Mix(Path(folder))
        networks = mix.fill_caches()
        lost = lost_by_safetensors(mix.path)
        rounds, begin = 0, time.monotonic()
        while time.monotonic() - begin < arguments.seconds:
            if rounds % SAMPLE == 0:
                forget_what_others_keep()
                gc.collect()
                sample = sizes()
                sample["thousand Python blocks"] -= (mix.stored - networks) * lost / 1000
                kept.extend((rounds, *sample.values()))
            mix.round(rng.choice(mix.drawn))
            rounds += 1
            if rounds % STORE == 0:
                mix.network()
    width = 1 + len(sample)
    at = list(kept[::width])
    samples = [dict(zip(sample, kept[i + 1 : i + width], strict=True)) for i in range(0, len(kept), width)]
    found, flat = judge(at, samples)
    written = {
        "command": " ".join(["python -m tests.soak", *sys.argv[1:]]),
        "networks that filled the caches": networks,
        "caches": {name: c.cache_info()._asdict() for name, c in caches().items()},
        "rounds": rounds,
        "networks among them": mix.stored - networks,
        "Python blocks a network that safetensors loses, not counted": round(lost, 2),
        "seconds": round(time.monotonic() - begin),
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
