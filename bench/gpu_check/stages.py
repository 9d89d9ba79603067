"""Stages as processes of their own: an illegal address ends a process's use of the GPU, a kernel that hangs ends
nothing at all. The parent launches nothing on the GPU, so it always writes the record."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu_check.journal import Journal
from bench.gpu_check.record import ROOT

DEVICE_LOST = 70  # exit status of a stage whose GPU no longer answers
_RESTARTS = 4
_ENOUGH = 3000  # characters of output kept


def run_stage(
    name: str,
    journal: Journal,
    end: float,
    options: list[str],
    launch: Callable[..., Any] = subprocess.run,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Runs `python -m bench.gpu_check --stage name` until it is done or the clock says `end`. A stage that crashes
    starts again, reads in the journal what it died of, and leaves that out. Returns what became of it."""
    start, crashes = clock(), []
    while True:
        left = end - clock()
        if left <= 1 or len(crashes) > _RESTARTS:
            status = "no time" if left <= 1 else "given up after crashes"
            break
        # The stage stops by itself where it can say what it leaves out; the parent allows it a little more.
        command = [
            sys.executable,
            "-m",
            "bench.gpu_check",
            "--stage",
            name,
            "--seconds",
            f"{left:.1f}",
            *options,
        ]
        try:
            done = launch(
                [*command, "--journal", str(journal.path)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=left + 15,
            )
        except subprocess.TimeoutExpired:
            status = "stopped at its deadline"
            break
        if done.returncode == 0:
            status = "done"
            break
        crashes.append({"status": done.returncode, "output": (done.stdout + done.stderr)[-_ENOUGH:]})
    return {"status": status, "seconds": round(clock() - start, 1), "crashes": crashes}


def start_parts(name: str, folder: Path, parts: int, options: list[str]) -> list[tuple[Any, Journal]]:
    """As many processes of one stage, each with a part of its work and a journal."""
    found = []
    for part in range(parts):
        journal = Journal(folder / f"{name}-{part}")
        command = [sys.executable, "-m", "bench.gpu_check", "--stage", name, "--journal", str(journal.path)]
        process = subprocess.Popen(
            [*command, "--part", str(part), "--parts", str(parts), *options],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found.append((process, journal))
    return found


def wait_for(parts: list[tuple[Any, Journal]], end: float) -> dict[str, Any]:
    """Until all are over, or the clock says `end` and the others are killed."""
    stopped = 0
    for process, _ in parts:
        try:
            process.wait(timeout=max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stopped += 1
    failed = [line["what"] for _, journal in parts for line in journal.lines("failed")]
    statuses = sorted({process.returncode for process, _ in parts})
    status = "stopped at its deadline" if stopped else "done" if statuses in ([], [0]) else f"exit {statuses}"
    return {"status": status, "processes": len(parts), "stopped": stopped, "failed": failed}
