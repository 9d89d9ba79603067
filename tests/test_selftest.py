"""The CPU kernels' own test program (tests/native): under sanitizers, and for aarch64 under an emulator."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import CXX, ROOT, needs_sources

pytestmark = needs_sources
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
ARM_CXX = "aarch64-linux-gnu-g++"
ARM_RUN = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def can_sanitize() -> bool:
    command = [*CXX.split(), *SANITIZE.split(), "-x", "c++", "-", "-o", os.devnull]
    try:
        return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def build(output: Path, *options: str) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("setuptools", "ninja")):
        pytest.skip("building needs setuptools and ninja in this environment")
    command = [sys.executable, "setup.py", "-q", "selftest", f"--output={output}", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


def run(*command: str | Path) -> str:
    # The leak checker traces the process, which containers often forbid; bounds are what is tested here.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(not can_sanitize(), reason=f"{CXX} cannot link the address sanitizer")
def test_kernels_are_exact_and_stay_in_bounds_under_sanitizers(tmp_path: Path) -> None:
    output = run(build(tmp_path / "selftest", f"--flags={SANITIZE}"))
    assert output.endswith(" 0 failed\n")
    assert "generic" in output


@pytest.mark.skipif(shutil.which(ARM_CXX) is None, reason=f"no cross compiler: {ARM_CXX} is not installed")
@pytest.mark.skipif(ARM_RUN is None, reason="no emulator: qemu-aarch64 (qemu-user) is not installed")
def test_kernels_are_exact_on_aarch64(tmp_path: Path) -> None:
    options = ["--machine=aarch64", f"--cxx={ARM_CXX}", "--flags=-static"]
    output = run(str(ARM_RUN), build(tmp_path / "selftest", *options))
    assert output.endswith(" 0 failed\n")
    assert "neon" in output
