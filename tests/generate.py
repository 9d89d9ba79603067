"""Generated problems against the float64 oracle.

    python -m tests.generate --count 20000 [--seed N] [--kernel NAME] [--record tests/records/generated.json]
    python -m tests.generate --only 'Generated("cpu_gather_avx2", "dgrad", ..., case("", N=1, ...))'

Every problem is one line that makes it again; a failure shrinks before it is printed. Problems run in child processes,
so that a crash is a failure like any other.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stripe_kernels import ops, registry
from stripe_kernels.epilogue import ACTIVATIONS, apply_epilogue
from stripe_kernels.geometry import ConvShape
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.snapshots import kept_form
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import (
    LAYOUTS,
    PATTERNS,
    Budget,
    Case,
    Operands,
    Trial,
    budgets,
    case,
    failure,
    poisoned_memory,
)
from stripe_kernels.version import __version__
from tests.guarded import guarded
from tests.passes import KERNELS, NATIVE, PAIRED, problem_of, run, spoil_scratch

CHUNK = 500  # problems a child process
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TERMS = ("bias", "scale", "residual")
# What makes one pass's sums long, fprop's, dgrad's and wgrad's, and sizes that keep the rest small beside it.
_FEW = {"N": (1, 1, 2), "H": (1, 2, 4), "W": (1, 2, 5), "C": (3, 8, 17), "K": (3, 8, 17)}
_LONG = {
    "channels": _FEW | {"C": (256, 257, 320, 512, 1030, 2048)},
    "filters": _FEW | {"K": (256, 257, 320, 512, 1030)},
    "pixels": _FEW | {"N": (64, 129, 300), "H": (8, 13), "W": (7, 16)},
}
REFUSED = "refused"


class _Refused(Exception):
    """The kernel does not take the problem."""


@dataclass(frozen=True)
class Generated:
    """One pass of one case by one kernel ("auto": the planner's choice, through the public operators).

    `pick` chooses among the kernel's configurations; `epilogue` lists fprop's terms and its activation; `guard` puts
    the operands against a forbidden page, at their "end" or "begin".
    """

    kernel: str
    which: Pass
    dtype: str
    layout: str
    threads: int
    case: Case
    pick: int = 0
    epilogue: tuple[str, ...] = ()
    guard: str = ""

    def failure(self) -> str | None:
        """What is wrong, or None: the result is within its budget, or the kernel refuses the problem."""
        failure = self.outcome()
        return None if failure == REFUSED else failure

    def outcome(self, notes: Tally | None = None) -> str | None:
        """`failure`, but REFUSED where the kernel does not take the problem. `notes` counts the problems that
        several draws of values had to decide."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        draws: list[int] = []

        def trial(draw: int) -> Trial:
            draws.append(draw)
            return self._trial(draw)

        try:
            found = failure(trial)
        except _Refused:
            return REFUSED
        except Exception as error:  # noqa: BLE001 - whatever a problem raises is a finding, and shrinks
            return f"is an exception: {error!r}"
        finally:
            torch.set_num_threads(before)
        if notes is not None:
            notes.update(
                ["decided by/several draws of values" if len(draws) > 1 else "decided by/one draw of values"]
            )
        return found

    def _trial(self, draw: int) -> Trial:
        dtype = getattr(torch, self.dtype)
        operands = self.case.operands(dtype, self.layout, draw=draw)
        with ExitStack() as stack:
            if self.guard:
                end = self.guard == "end"
                operands = Operands(*(stack.enter_context(guarded(t, end)) for t in operands))
            result = self._result(operands)
            del operands
        return Trial(self._budget(self.case.operands(dtype, self.layout, draw=draw)), result)

    def _result(self, operands: Operands) -> Tensor:
        terms = [getattr(operands, name) if name in self.epilogue else None for name in _TERMS]
        if self.kernel == "auto":
            op = StripeOp.of(*self.case.arguments, "auto")
            with poisoned_memory(), torch.no_grad():
                if self.which == "dgrad":
                    return ops.dgrad(op, operands.dy, operands.weight, self.case.shape.input_size[2:])
                if self.which == "wgrad":
                    return ops.wgrad(op, operands.dy, operands.x)
                return ops.fprop(op, operands.x, operands.weight, *terms, self._activation)
        problem, kernel = problem_of(self.case, operands, self.which), registry.find(self.kernel)
        if kernel.refuse(problem, self.which):
            raise _Refused
        found = list(kernel.candidates(problem, self.which))
        runner = kernel.build(problem, self.which, found[self.pick % len(found)])
        with poisoned_memory():
            spoil_scratch(runner, self.which, operands)
            if not self.epilogue:
                return run(runner, self.which, operands)
            return runner(operands.x, kept_form(runner, operands.weight), *terms, self._activation)

    @property
    def long(self) -> str | None:
        """What this problem has many of."""
        s = self.case.shape
        sizes = {"channels": s.group_c, "filters": s.group_k, "pixels": s.N * s.P * s.Q}
        return next((name for name, n in sizes.items() if n >= (4096 if name == "pixels" else 256)), None)

    @property
    def _activation(self) -> str:
        return next((name for name in self.epilogue if name in ACTIVATIONS), "none")

    def _budget(self, operands: Operands) -> Budget:
        found = budgets(self.case, operands, self.which).of(self.which)
        if not self.epilogue:
            return found
        # torch's own y is not kept: the epilogue of y rounded to the dtype stands for it, and its error adds to y's.
        wide = Operands(*(t.double() for t in operands))
        terms = [getattr(wide, name) if name in self.epilogue else None for name in _TERMS]
        expected = apply_epilogue(found.expected.clone(), *terms, self._activation)
        gain = 1.0 if terms[1] is None else max(1.0, float(terms[1].abs().max()))
        rounded = [None if t is None else t.to(found.dtype) for t in terms]
        own = apply_epilogue(found.expected.to(found.dtype), *rounded, self._activation)
        rounding = Budget.of(expected, own)
        return dataclasses.replace(
            rounding, largest=rounding.largest + gain * found.largest, rms=rounding.rms + gain * found.rms
        )

    def __repr__(self) -> str:
        """The line that makes this problem again."""
        s, c = self.case.shape, self.case
        sizes = dataclasses.asdict(s)
        made = {**sizes, "density": c.density, "pattern": c.pattern, "seed": c.seed}
        arguments = ", ".join(f"{name}={value!r}" for name, value in made.items())
        head = ", ".join(repr(v) for v in (self.kernel, self.which, self.dtype, self.layout, self.threads))
        return f'Generated({head}, case("", {arguments}), {self.pick}, {self.epilogue!r}, {self.guard!r})'


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
        if rng.random() < 0.15:
            groups, sizes = 1, _LONG[str(rng.choice(list(_LONG)))]
            shape |= {name: size(*choices) for name, choices in sizes.items()}
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
        kernel, which = str(rng.choice(kernels)), PASSES[int(rng.integers(len(PASSES)))]
        native = kernel in NATIVE or kernel in PAIRED
        wide = 0.0 if native else 0.1  # native kernels refuse float64
        dtype = str(rng.choice(_DTYPES, p=[0.5 - wide, 0.25, 0.25, wide]))
        if dtype == "bfloat16" and kernel in ("auto", "dense", "reference"):
            dtype = "float16"  # torch's own convolution in bfloat16 corrupts memory: see SECURITY.md
        if dtype == "float16" and kernel in ("dense", "reference") and made.shape.idle_column():
            dtype = "float32"  # and in float16 it can end the process there
        if kernel in PAIRED:  # which refuse all else
            dtype, step = "bfloat16", 32 if kernel.endswith("_amx") else 2
            channels = -(-made.shape.group_c // step) * step * groups
            made = dataclasses.replace(made, shape=dataclasses.replace(made.shape, C=channels))
        layout, threads, pick = str(rng.choice(list(LAYOUTS))), size(1, 1, 2, 3), int(rng.integers(16))
        epilogue: tuple[str, ...] = ()
        if which == "fprop" and rng.random() < 0.5:
            terms = [name for name in _TERMS if rng.random() < 0.5]
            epilogue = (*terms, *([str(rng.choice(list(ACTIVATIONS)))] if rng.random() < 0.6 else []))
        guard = str(rng.choice(["", "end", "begin"], p=[0.5, 0.3, 0.2])) if native else ""
        return Generated(kernel, which, dtype, layout, threads, made, pick, epilogue, guard)


def problems(count: int, seed: int, kernels: list[str] | None = None, first: int = 0) -> Iterator[Generated]:
    """Problems first, first + 1, ... of a seed; each is drawn on its own."""
    for i in range(first, first + count):
        yield draw(np.random.default_rng([seed, i]), kernels or ["auto", *KERNELS, *PAIRED])


def _smaller(problem: Generated) -> Iterator[Generated]:
    """Simpler neighbours, the boldest steps first."""
    s = problem.case.shape
    simple: list[dict[str, object]] = [{"threads": 1}, {"layout": "contiguous"}, {"dtype": "float32"}]
    simple += [{"pick": 0}, {"epilogue": ()}, {"guard": ""}]
    for changes in simple:
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


def shrink(problem: Generated, fails: Callable[[Generated], object] = lambda p: p.failure()) -> Generated:
    """A smallest problem that still fails, found greedily."""
    while True:
        for candidate in _smaller(problem):
            if candidate != problem and fails(candidate):
                problem = candidate
                break
        else:
            return problem


# The run: children work through chunks, and say in a file of their own what they are at and what they have done.


class Tally(collections.Counter[str]):
    """How many problems were tried, by axis and value, as "axis/value"; refusals and failures are two more axes."""

    def count(self, problem: Generated, outcome: str | None) -> None:
        p = problem
        kind = "refused" if outcome == REFUSED else "failed" if outcome else "within budget"
        axes = {
            "outcome": kind,
            "kernel, dtype, pass": f"{p.kernel} {p.dtype} {p.which}",
            "layout": p.layout,
            "skeleton": p.case.pattern,
            "threads": p.threads,
            "guard page": p.guard or "none",
            "epilogue": "with" if p.epilogue else "without",
            "images": "none" if p.case.shape.N == 0 else "some",
            "long sums over": p.long or "none",
        }
        self.update(f"{axis}/{value}" for axis, value in axes.items())

    def tables(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for name, n in sorted(self.items()):
            axis, value = name.split("/", 1)
            found.setdefault(axis, {})[value] = n
        return found


def _child(arguments: argparse.Namespace) -> int:
    """Problems [first, first + count): after each, the tally so far and the next problem's line go to the file."""
    tally = Tally()
    with open(arguments.child, "w") as progress:
        for done, problem in enumerate(
            problems(arguments.count, arguments.seed, arguments.kernel, arguments.first)
        ):
            progress.seek(0)
            progress.write(json.dumps({"done": done, "line": repr(problem), "tally": tally}))
            progress.truncate()
            progress.flush()
            outcome = problem.outcome(tally)
            tally.count(problem, outcome)
            if outcome not in (None, REFUSED):
                small = shrink(problem)
                print(f"FAILED {small!r}\n    the result {small.failure()}", flush=True)
        progress.seek(0)
        progress.write(json.dumps({"done": arguments.count, "line": "", "tally": tally}))
        progress.truncate()
    return 0


def parse(line: str) -> Generated:
    return eval(line, {"Generated": Generated, "case": case})


def _crashes(problem: Generated) -> bool:
    command = [sys.executable, "-m", "tests.generate", "--only", repr(problem)]
    return subprocess.run(command, capture_output=True).returncode < 0


def _chunk(arguments: argparse.Namespace, first: int, last: int) -> Tally:
    """Problems [first, last) in child processes, a new one after every crash."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        while first < last:
            options = [f"--count={last - first}", f"--seed={arguments.seed}", f"--first={first}"]
            options += [f"--kernel={name}" for name in arguments.kernel or []]
            progress = Path(folder) / "progress"
            command = [sys.executable, "-m", "tests.generate", f"--child={progress}", *options]
            status = subprocess.run(command).returncode
            if status > 0:
                raise RuntimeError(f"a child process ended with status {status}")
            state = json.loads(progress.read_text())
            tally.update(state["tally"])
            first += state["done"]
            if status < 0:
                problem = parse(state["line"])
                print(f"FAILED {shrink(problem, _crashes)!r}\n    {signal.Signals(-status).name}", flush=True)
                tally.count(problem, "crash")
                first += 1
    return tally


def _run(arguments: argparse.Namespace) -> Iterator[tuple[int, Tally]]:
    """After every chunk of problems: how many were tried, and what came of them."""
    tally, last = Tally(), arguments.first + arguments.count
    starts = range(arguments.first, last, CHUNK)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        chunks = pool.map(lambda first: _chunk(arguments, first, min(last, first + CHUNK)), starts)
        for done, found in enumerate(chunks, 1):
            tally.update(found)
            print(f"{done} of {len(starts)} chunks", file=sys.stderr, flush=True)
            yield min(done * CHUNK, arguments.count), tally


def sources() -> dict[str, str]:
    """The commit, and a hash of what the native kernels are made of, which other files' changes leave alone."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(
        p for part in ("core", "cpu") for p in (root / "csrc" / part).rglob("*") if p.is_file()
    ):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return {"commit": git.stdout.strip(), "sha256 of csrc/core and csrc/cpu": digest.hexdigest()}


def _write(
    arguments: argparse.Namespace, kernels: dict[str, str], done: int, tables: dict[str, dict[str, int]]
) -> None:
    first = f" --first {arguments.first}" if arguments.first else ""
    options = f"--count {arguments.count} --seed {arguments.seed}{first}"
    written = {
        "command": f"python -m tests.generate {options} --record {arguments.record}",
        "versions": {
            "stripe_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "kernels": kernels,
        "instruction sets": sorted({name.rsplit("_", 1)[1] for name in NATIVE + PAIRED}),
        "problems": done,
        "outcome": tables["outcome"],
        **{axis: values for axis, values in tables.items() if axis != "outcome"},
    }
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(written, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem of the seed")
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="child processes at once")
    parser.add_argument("--only", metavar="LINE", help="run the problem that a failure printed")
    parser.add_argument("--record", type=Path, help="write the counts here as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        failure = parse(arguments.only).failure()
        print(failure or "within its budget")
        return 1 if failure else 0
    if arguments.child:
        return _child(arguments)
    kernels = sources()
    tables: dict[str, dict[str, int]] = {}
    for done, tally in _run(arguments):
        tables = tally.tables()
        if arguments.record:
            _write(arguments, kernels, done, tables)
    outcomes = tables.pop("outcome", {})
    for axis, values in tables.items():
        print(f"\n{axis}")
        for value, n in values.items():
            print(f"    {value:40s} {n:6d}")
    print(f"\n{arguments.count} problems, seed {arguments.seed}: {outcomes}")
    return 1 if outcomes.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
