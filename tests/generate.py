"""Generated problems against the float64 oracle.

    python -m tests.generate --count 20000 [--seed N] [--kernel NAME]
    python -m tests.generate --only 'Generated("cpu_gather_avx2", "dgrad", ..., case("", N=1, ...), 0)'

Every problem is one line that makes it again; a failure shrinks before it is printed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from stripe_kernels import registry
from stripe_kernels.geometry import ConvShape
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.testing import LAYOUTS, PATTERNS, Case, budgets, case, poisoned_memory
from tests.passes import KERNELS, problem_of, run, spoil_scratch

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Generated:
    """One pass of one case by one kernel; `pick` chooses among the kernel's configurations."""

    kernel: str
    which: Pass
    dtype: str
    layout: str
    threads: int
    case: Case
    pick: int = 0

    def failure(self) -> str | None:
        """What is wrong, or None: the result is within its budget, or the kernel refuses the problem."""
        operands = self.case.operands(getattr(torch, self.dtype), self.layout)
        torch.set_num_threads(self.threads)
        problem, kernel = problem_of(self.case, operands, self.which), registry.find(self.kernel)
        if kernel.refuse(problem, self.which):
            return None
        found = list(kernel.candidates(problem, self.which))
        runner = kernel.build(problem, self.which, found[self.pick % len(found)])
        with poisoned_memory():
            spoil_scratch(runner, self.which, operands)
            result = run(runner, self.which, operands)
        torch.set_num_threads(1)
        return budgets(self.case, operands)[PASSES.index(self.which)].failure(result)

    def __repr__(self) -> str:
        """The line that makes this problem again."""
        s, c = self.case.shape, self.case
        sizes = dataclasses.asdict(s)
        made = {**sizes, "density": c.density, "pattern": c.pattern, "seed": c.seed}
        arguments = ", ".join(f"{name}={value!r}" for name, value in made.items())
        head = ", ".join(repr(v) for v in (self.kernel, self.which, self.dtype, self.layout, self.threads))
        return f'Generated({head}, case("", {arguments}), {self.pick})'


def draw(rng: np.random.Generator, kernels: list[str]) -> Generated:
    """A random problem: small, lopsided, with every border case likely."""

    def size(*choices: int) -> int:
        return int(rng.choice(choices))

    while True:
        groups = size(1, 1, 1, 2, 3)
        shape = {
            "N": size(0, 1, 1, 2, 3, 5, 16, 17, 33),
            "C": groups * size(1, 2, 3, 5, 8, 16, 17, 31, 48),
            "H": size(1, 2, 3, 4, 5, 7, 8, 13, 20),
            "W": size(1, 2, 3, 4, 6, 7, 9, 16, 19, 35),
            "K": groups * size(1, 2, 3, 4, 7, 8, 9, 16, 25),
            "R": size(1, 1, 2, 3, 3, 3, 4, 5),
            "S": size(1, 1, 2, 3, 3, 3, 5, 7),
            "stride": (size(1, 1, 1, 2, 3), size(1, 1, 1, 2, 4)),
            "padding": tuple(size(0, 0, 1, 1, 2, 4) for _ in range(4)),
            "dilation": (size(1, 1, 1, 2, 3), size(1, 1, 1, 2)),
        }
        if rng.random() < 0.8:
            shape["padding"] = shape["padding"][:2] * 2
        try:
            made = case(
                "",
                **shape,
                groups=groups,
                density=round(float(rng.choice([0.05, 0.2, 0.5, 0.9])), 2),
                pattern=str(rng.choice(PATTERNS, p=[0.64, *[0.06] * (len(PATTERNS) - 1)])),
                seed=int(rng.integers(1 << 16)),
            )
        except RuntimeError:  # the filter is larger than the padded input
            continue
        which: Pass = PASSES[int(rng.integers(len(PASSES)))]
        dtype = str(rng.choice(_DTYPES, p=[0.5, 0.25, 0.25]))
        layout, threads, pick = str(rng.choice(list(LAYOUTS))), size(1, 1, 2, 3), int(rng.integers(16))
        return Generated(str(rng.choice(kernels)), which, dtype, layout, threads, made, pick)


def problems(count: int, seed: int, kernels: list[str] | None = None) -> Iterator[Generated]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield draw(rng, kernels or KERNELS)


def _smaller(problem: Generated) -> Iterator[Generated]:
    """Simpler neighbours, the boldest steps first."""
    s = problem.case.shape
    for changes in ({"threads": 1}, {"layout": "contiguous"}, {"dtype": "float32"}, {"pick": 0}):
        yield dataclasses.replace(problem, **changes)  # type: ignore[arg-type]
    steps: list[dict[str, object]] = [{"stride": (1, 1)}, {"dilation": (1, 1)}, {"padding": (0, 0, 0, 0)}]
    steps.append({"groups": 1})
    for name in ("N", "C", "H", "W", "K", "R", "S"):
        now = getattr(s, name)
        steps += [{name: smaller} for smaller in (1, now // 2, now - 1) if 1 <= smaller < now]
    for step in steps:
        try:
            shape: ConvShape = dataclasses.replace(s, **step)  # type: ignore[arg-type]
        except (ValueError, RuntimeError):
            continue
        yield dataclasses.replace(problem, case=dataclasses.replace(problem.case, shape=shape))


def shrink(problem: Generated) -> Generated:
    """A smallest problem that still fails, found greedily."""
    while True:
        for candidate in _smaller(problem):
            if candidate != problem and candidate.failure():
                problem = candidate
                break
        else:
            return problem


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--only", metavar="LINE", help="run the problem that a failure printed")
    arguments = parser.parse_args()
    if arguments.only:
        problem = eval(arguments.only, {"Generated": Generated, "case": case})
        failure = problem.failure()
        print(failure or "within its budget")
        return 1 if failure else 0
    tried: collections.Counter[tuple[str, str]] = collections.Counter()
    failed = 0
    for problem in problems(arguments.count, arguments.seed, arguments.kernel):
        tried[problem.kernel, problem.dtype] += 1
        if problem.failure():
            failed += 1
            small = shrink(problem)
            print(f"FAILED {small!r}\n    the result {small.failure()}", flush=True)
    for (kernel, dtype), n in sorted(tried.items()):
        print(f"{kernel:28s} {dtype:9s} {n:6d}")
    print(f"{arguments.count} problems, seed {arguments.seed}, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
