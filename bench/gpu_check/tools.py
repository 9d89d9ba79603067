"""Programs around the check: the build, kernels tried by themselves, and compute-sanitizer over a small set."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_check.programs import Ended, together

_ENOUGH = 4000  # characters of output kept
_ONE_TRY = 20.0  # seconds of a first try that has the machine to itself; all at once took 36 on an H200
WRONG = 1  # status of --checks-only when results are wrong, and nothing worse
# Own kernels that come with others' parts: stripe_gemm with its native gather, and the one that reads x value by value.
BESIDE_OWN = ("stripe_gemm", "triton_stem")


def run(command: Sequence[str], seconds: float, keep: bool = False) -> dict[str, Any]:
    """What became of a program: its output where it failed, or where it is to be kept."""
    return run_together([command], seconds, keep)[0]


def run_together(
    commands: Sequence[Sequence[str]],
    seconds: float,
    keep: bool = False,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The same of several, all at once and all within these seconds."""
    end = time.perf_counter() + max(1.0, seconds)
    with together(commands, environment) as programs:
        return [_told(c, p.wait(end), keep) for c, p in zip(commands, programs, strict=True)]


def _without_places(command: Sequence[str]) -> str:
    """A command as a record may hold it: what runs, not where it lies on this machine."""
    names = ("python" if part == sys.executable else part for part in command)
    return " ".join(Path(part).name if part.startswith("/") else part for part in names)


def _told(command: Sequence[str], ended: Ended, keep: bool) -> dict[str, Any]:
    output = (ended.stdout + ("" if keep and ended.code == 0 else ended.stderr))[-_ENOUGH:]
    if ended.code is None:
        output = f"stopped after {ended.seconds:.0f} s: {output}"
    return {
        "command": _without_places(command),
        "ok": ended.code == 0,
        "code": ended.code,
        "seconds": round(ended.seconds, 1),
        "output": output if keep or ended.code != 0 else "",
    }


def build(seconds: float) -> dict[str, Any]:
    """Both extensions in place. The CUDA one is optional to the build: the compiler's words are kept when it failed."""
    found = run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, keep=True)
    if found["ok"] and "WITHOUT the CUDA extension" not in found["output"]:
        found["output"] = ""
    return found


def _alone(kernels: list[str]) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_check", "--checks-only", "--kernels", *kernels]


def first_tries(
    kernels: list[str], seconds: float, most: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, str], list[str]]:
    """Each kernel, or pass of one, over few cases in a process of its own, all at once in `seconds`: name -> why it may
    not run in this one. A kernel that hangs or leaves its memory takes its process along; wrong results do not. All at
    once are slow, and one that hangs slows the others: who was not over is tried again alone, and hangs if it is not
    over then. Second, those that `most` seconds in all have no such time for: nothing is known of them."""
    end = clock() + most
    together_ = run_together([_alone([name]) for name in kernels], seconds, keep=True)
    found = dict(zip(kernels, together_, strict=True))
    reasons, unknown = {}, []
    for name, result in found.items():
        if result["code"] is None:
            if end - clock() < _ONE_TRY:
                unknown.append(name)
                continue
            result = run(_alone([name]), _ONE_TRY, keep=True)
        if result["code"] not in (0, WRONG):
            what = "hangs" if result["code"] is None else f"ends with status {result['code']}"
            reasons[name] = f"{what}: {result['output'][-600:]}"
    return reasons, unknown


def sanitize(sets: Sequence[list[str]], seconds: float) -> list[dict[str, Any]]:
    """memcheck and racecheck over few cases of each set of kernels, in a process each: what one set does not reach in
    its time, or others' kernels in it do wrong, says nothing of another."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if shutil.which(tool) is None:
        return [{"command": "compute-sanitizer", "ok": None, "output": "not installed"}]
    # Every tensor an allocation of its own: inside the allocator's large ones memcheck sees no end of a tensor.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--error-exitcode", "9", "--print-limit", "20"]
    commands = [
        [tool, "--tool", name, *options, *_alone(kernels)]
        for kernels in sets
        if kernels
        for name in ("memcheck", "racecheck")
    ]
    return run_together(commands, seconds, environment=alone)
