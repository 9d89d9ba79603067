"""diagnose: what this machine has, which kernels it runs and why not the others, and whether they compute right."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stripe_kernels import backends, registry, testing
from stripe_kernels.compile import cache
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import (
    CASES,
    DTYPES,
    Budgets,
    Case,
    Operands,
    Trial,
    budgets,
    failure,
    poisoned_memory,
    prepared,
)
from stripe_kernels.version import __version__

_LAYOUTS = ("contiguous", "channels_last")
# The first says whether a kernel takes an ordinary layer: channels in 32s, for those that multiply in AMX.
_CASES = (testing.case("ordinary", N=2, C=128, H=7, W=6, K=67, density=0.15), *CASES.values())
_COMPILERS = ("c++", "nvcc", "ninja")


def diagnose(seconds: float = 10.0) -> dict[str, Any]:
    """What a report of a problem should begin with, ready for JSON.

    versions, processor (name, cores, isas), threads, gpus (name, capability, bytes), compilers (name -> first line of
    its version, or None), cache (folder, files, bytes, unreadable, writable), missing (backend -> reason), kernels
    (name -> state "automatic", "by name" or "refuses", reason, checks, failures) and self_test: every kernel that
    runs here against the float64 oracle, each pass, dtype and layout at least once, then for about `seconds`.
    """
    backends.load()
    kernels = {name: _state(name) for name in registry.kernels()}
    return {
        "versions": _versions(),
        "processor": {"name": _processor(), "cores": os.cpu_count(), "isas": _isas(kernels)},
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "compilers": {name: _version_of(name) for name in _COMPILERS},
        "cache": _cache(cache.default_folder()),
        "missing": registry.missing(),
        "kernels": kernels,
        "self_test": _self_test(kernels, seconds),
    }


def _versions() -> dict[str, str]:
    return {
        "stripe_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()} (torch uses {torch.backends.cpu.get_cpu_capability()})"


def _isas(kernels: dict[str, dict[str, Any]]) -> list[str]:
    """Instruction sets that the native kernels are built for and that this processor has, as their names say."""
    return list(dict.fromkeys(name.rpartition("_")[2] for name in kernels if name.startswith("cpu_")))


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "bytes": p.total_memory} for p in found]


def _version_of(program: str) -> str | None:
    """The line of `program --version` that has a number, or None where there is no such program."""
    path = shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    lines = [line.strip() for line in said.splitlines() if any(c.isdigit() for c in line)]
    numbered = [line for line in lines if "release" in line]  # nvcc begins with years
    return (numbered or lines or ["of unknown version"])[0]


def _cache(folder: Path) -> dict[str, Any]:
    """The folder of measured choices: how much is in it, and whether it can be read and written."""
    files = list(folder.glob("*.json")) if folder.exists() else []
    above = next(p for p in (folder, *folder.parents) if p.exists())
    return {
        "folder": str(folder),
        "files": len(files),
        "bytes": sum(f.stat().st_size for f in files),
        "unreadable": sum(not _whole(f) for f in files),
        "writable": os.access(above, os.W_OK | os.X_OK),
    }


def _whole(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text())["candidates"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _state(name: str) -> dict[str, Any]:
    """Whether "auto" may take a kernel, or why not."""
    kernel = registry.find(name)
    reasons = {d: reason for d in dict.fromkeys(("cpu", _device())) if (reason := _refusal(name, d))}
    entry: dict[str, Any] = {"state": "automatic", "reason": None, "checks": 0, "failures": []}
    if "cpu" in reasons and (_device() == "cpu" or _device() in reasons):
        entry["state"], entry["reason"] = "refuses", reasons[_device()]
    elif not kernel.automatic:
        entry["state"], entry["reason"] = "by name", "not taken by itself: kernel=NAME runs it"
        if name.startswith("cpu_"):
            entry["reason"] = "a better instruction set is there"
    return entry


def _refusal(name: str, device: str) -> str | None:
    """Why a kernel does not take an ordinary layer on a device in any dtype; None where it does."""
    ordinary = _CASES[0]
    reasons = []
    for dtype, last in product(DTYPES, (False, True)):
        op = StripeOp.of(*ordinary.arguments, name)
        problem = op.problem(ordinary.shape.input_size, dtype, torch.device(device), last)
        reasons.append(registry.find(name).refuse(problem, "fprop"))
    return None if None in reasons else reasons[0]


def _self_test(kernels: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Adds checks and failures to the kernels; the sums. The oracle is not checked against itself."""
    start = time.perf_counter()
    tested = [name for name, k in kernels.items() if k["state"] != "refuses" and name != "reference"]
    for number, (case, layout, dtype) in enumerate(product(_CASES, _LAYOUTS, DTYPES)):
        if time.perf_counter() - start > seconds and number >= len(_LAYOUTS) * len(DTYPES):
            break
        operands = case.operands(dtype, layout, _device())
        budget = budgets(case, operands)
        for name, which in product(tested, PASSES):
            found = _check(case, operands, layout, name, which, budget)
            if found is not False:
                kernels[name]["checks"] += 1
                kernels[name]["failures"] += (
                    [f"{which} of {case.name}, {dtype}, {layout}: {found}"] if found else []
                )
    return {
        "seconds": time.perf_counter() - start,
        "device": _device(),
        "checks": sum(k["checks"] for k in kernels.values()),
        "failures": sum(len(k["failures"]) for k in kernels.values()),
    }


def _check(
    case: Case, operands: Operands, layout: str, name: str, which: Pass, budget: Budgets
) -> str | bool | None:
    """What is wrong with a kernel's first choice on a case; None if nothing is, False where it refuses."""
    device = operands.x.device

    def trial(draw: int) -> Trial:
        drawn = case.operands(operands.x.dtype, layout, device.type, draw) if draw else operands
        allowed = budgets(case, drawn, which) if draw else budget
        if name.startswith("cpu_"):
            drawn = Operands(*(t.cpu() for t in drawn))
        ready = next(iter(prepared(case, drawn, which, name).values()))
        with poisoned_memory():
            return Trial(allowed.of(which), ready.call(drawn).to(device))

    try:
        return failure(trial)
    except RuntimeError as error:
        return False if "does not run" in str(error) else str(error).splitlines()[0]
    except (ValueError, TypeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
