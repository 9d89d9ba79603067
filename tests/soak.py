"""Mixed shapes for minutes: the process's memory has to stay flat.

    python -m tests.soak [--seconds 600] [--record tests/records/soak.json]      (make soak)

Layers of a few hundred generated problems run forwards and backwards with "auto" and with kernels by name, with 1 to 3
threads and in every layout; now and then a network is frozen, saved and loaded. Caches fill in the first quarter of the
time. From then on the highest resident size may grow by 2 % or 8 MiB, whichever is more, from the second quarter to
the last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from stripe_kernels import freeze, load, ops, save
from stripe_kernels.ops import StripeOp
from tests.generate import Generated, problems
from tests.passes import NATIVE

DISTINCT = 300  # problems


def resident() -> float:
    """MiB of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--record", type=Path, help="write what was seen here as JSON")
    arguments = parser.parse_args()
    drawn, rng = list(problems(DISTINCT, seed=0, kernels=NATIVE)), random.Random(0)
    begin, calls, sizes = time.monotonic(), 0, []  # sizes: (seconds, MiB)
    with tempfile.TemporaryDirectory() as folder:
        while (now := time.monotonic() - begin) < arguments.seconds:
            problem = drawn[calls % DISTINCT] if calls < DISTINCT else rng.choice(drawn)
            torch.set_num_threads(problem.threads)
            train(problem, "auto")
            train(problem, problem.kernel)
            if calls % 20 == 0:
                store(Path(folder) / "network")
                sizes.append((now, resident()))
            calls += 1
    quarters: list[list[float]] = [[], [], [], []]
    for at, size in sizes:
        quarters[min(3, int(4 * at / arguments.seconds))].append(size)
    highest = [round(max(q), 1) for q in quarters]
    flat = highest[3] <= max(highest[1] * 1.02, highest[1] + 8)
    written = {
        "command": " ".join(["python -m tests.soak", *sys.argv[1:]]),
        "rounds": calls,
        "highest MiB in each quarter": highest,
        "flat": flat,
    }
    print(json.dumps(written, indent=1))
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
