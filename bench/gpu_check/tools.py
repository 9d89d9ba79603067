"""Programs around the check: the build, kernels tried by themselves, and compute-sanitizer over a small set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.gpu_check.record import ROOT

_ENOUGH = 4000  # characters of output kept
WRONG = 1  # status of --checks-only when results are wrong, and nothing worse


def run(
    command: list[str], seconds: float, keep: bool = False, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """What became of a program: its output where it failed, or where it is to be kept."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
        )
        code, output = done.returncode, done.stdout + ("" if keep and done.returncode == 0 else done.stderr)
    except subprocess.TimeoutExpired as stopped:
        code, output = None, f"stopped after {stopped.timeout:.0f} s"
    return {
        "command": " ".join(command),
        "ok": code == 0,
        "code": code,
        "seconds": round(time.perf_counter() - start, 1),
        "output": output[-_ENOUGH:] if keep or code != 0 else "",
    }


def build(seconds: float) -> dict[str, Any]:
    """Both extensions in place. The CUDA one is optional to the build: the compiler's words are kept when it failed."""
    found = run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, keep=True)
    if found["ok"] and "WITHOUT the CUDA extension" not in found["output"]:
        found["output"] = ""
    return found


def _alone(kernels: list[str]) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_check", "--checks-only", "--kernels", *kernels]


def first_tries(kernels: list[str], seconds: float) -> dict[str, str]:
    """Each kernel, or pass of one, over few cases in a process of its own, all at once: name -> why it may not run in
    this one. A kernel that hangs or leaves its memory takes its process along; wrong results do not."""
    with ThreadPoolExecutor(max(1, len(kernels))) as pool:
        found = list(pool.map(lambda name: run(_alone([name]), seconds, keep=True), kernels))
    reasons = {}
    for name, result in zip(kernels, found, strict=True):
        if result["code"] not in (0, WRONG):
            what = "hangs" if result["code"] is None else f"ends with status {result['code']}"
            reasons[name] = f"{what}: {result['output'][-600:]}"
    return reasons


def sanitize(kernels: list[str], seconds: float) -> list[dict[str, Any]]:
    """memcheck and racecheck over few cases of these kernels."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if shutil.which(tool) is None:
        return [{"command": "compute-sanitizer", "ok": None, "output": "not installed"}]
    # Every tensor an allocation of its own: inside the allocator's large ones memcheck sees no end of a tensor.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--error-exitcode", "9", "--print-limit", "20"]

    def check(name: str) -> dict[str, Any]:
        return run([tool, "--tool", name, *options, *_alone(kernels)], seconds, environment=alone)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(check, ("memcheck", "racecheck")))
