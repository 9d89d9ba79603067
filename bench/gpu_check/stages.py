"""Stages as processes of their own: an illegal address ends a process's use of the GPU, a kernel that hangs ends
nothing at all. The parent launches nothing on the GPU, so it always writes the record."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.gpu_check import programs
from bench.gpu_check.journal import Journal

DEVICE_LOST = 70  # exit status of a stage whose GPU no longer answers
_RESTARTS = 4
_ENOUGH = 3000  # characters of output kept
# Seconds before its end at which a stage should stop by itself, where it can say what it leaves out: what it began last
# is finished in them. At most this part of what it has.
_GRACE, _GRACE_PART = 15.0, 0.2


def _command(name: str, journal: Journal, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "bench.gpu_check"),
        *("--stage", name, "--journal", str(journal.path), *options),
    ]


def run_stage(
    name: str,
    journal: Journal,
    end: float,
    options: list[str],
    launch: Callable[[Sequence[str], float], programs.Ended] = programs.run,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Runs `python -m bench.gpu_check --stage name` until it is done, or stops it when the clock says `end`. A stage
    that crashes starts again, reads in the journal what it died of, and leaves that out. Returns what became of it."""
    start, crashes = clock(), []
    while True:
        left = end - clock()
        if left <= 1 or len(crashes) > _RESTARTS:
            status = "no time" if left <= 1 else "given up after crashes"
            break
        seconds = left - min(_GRACE, _GRACE_PART * left)
        done = launch(_command(name, journal, "--seconds", f"{seconds:.1f}", *options), left)
        if done.code in (0, None):
            status = "done" if done.code == 0 else "stopped at its deadline"
            break
        crashes.append({"status": done.code, "output": (done.stdout + done.stderr)[-_ENOUGH:]})
    return {"status": status, "seconds": round(clock() - start, 1), "crashes": crashes}


@contextmanager
def parts_of(
    name: str, folder: Path, parts: int, options: list[str]
) -> Iterator[list[tuple[programs.Program, Journal]]]:
    """As many processes of one stage, each with a part of its work and a journal, behind all that is not nice."""
    journals = [Journal(folder / f"{name}-{part}") for part in range(parts)]
    commands = [
        ["nice", "-n", "19", *_command(name, journal, "--part", str(part), "--parts", str(parts), *options)]
        for part, journal in enumerate(journals)
    ]
    with programs.together(commands) as running:
        yield list(zip(running, journals, strict=True))


def wait_for(parts: list[tuple[programs.Program, Journal]], end: float) -> dict[str, Any]:
    """Until all are over; those that are not when the clock says `end` are stopped."""
    codes = [process.wait(end).code for process, _ in parts]
    failed = [line["what"] for _, journal in parts for line in journal.lines("failed")]
    bad = sorted({code for code in codes if code})
    status = "stopped at its deadline" if None in codes else f"exit {bad}" if bad else "done"
    return {"status": status, "processes": len(parts), "stopped": codes.count(None), "failed": failed}
