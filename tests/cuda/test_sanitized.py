"""The emulated kernels under the address sanitizer: tensors, tables and shared memory end where they end."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.cuda import emulated
from tests.tree import NO_COMPILER, needs_compiler, needs_sources

FLAGS = ("-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer")


def runtime() -> str | None:
    """The sanitizer's library: it has to be loaded before Python's own allocations."""
    if NO_COMPILER:
        return None
    command = [*emulated.CXX.split(), "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@needs_sources
@needs_compiler
@pytest.mark.skipif(runtime() is None, reason=f"{emulated.CXX} has no libasan.so")
@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="building needs pybind11")
def test_no_kernel_leaves_its_memory() -> None:
    extension = emulated.build(*FLAGS)
    # Leaks are Python's own; fibers live on heap memory, which the use-after-return checker cannot follow.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    result = subprocess.run(
        [sys.executable, "-m", "tests.cuda.sanitized", str(extension)],
        cwd=emulated.ROOT,
        env={**os.environ, "LD_PRELOAD": runtime(), "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.stdout.endswith("launches within their budgets\n")
