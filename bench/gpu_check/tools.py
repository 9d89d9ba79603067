"""Programs around the check: the build, and compute-sanitizer over a small set."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import Any

from bench.gpu_check.record import ROOT

_ENOUGH = 4000  # characters of output kept


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds))
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, output = None, f"stopped after {stopped.timeout:.0f} s"
    return {
        "command": " ".join(command),
        "ok": code == 0,
        "seconds": round(time.perf_counter() - start, 1),
        "output": "" if code == 0 else output[-_ENOUGH:],
    }


def build(seconds: float) -> dict[str, Any]:
    """Both extensions in place. The CUDA one is optional to the build, so the record names the kernels that
    exist."""
    return _run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds)


def sanitize(seconds: float) -> list[dict[str, Any]]:
    """memcheck and racecheck over `python -m bench.gpu_check --checks-only`, which loads few cases."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if shutil.which(tool) is None:
        return [{"command": "compute-sanitizer", "ok": None, "output": "not installed"}]
    inner = [sys.executable, "-m", "bench.gpu_check", "--checks-only"]
    options = ["--error-exitcode", "1", "--print-limit", "20"]
    found = []
    for index, check in enumerate(("memcheck", "racecheck")):
        left = seconds / 2 if index == 0 else seconds - sum(row["seconds"] for row in found)
        found.append(_run([tool, "--tool", check, *options, *inner], left))
    return found
