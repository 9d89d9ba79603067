"""Triton's run-time with a driver that only takes notes: what the interpreter cannot show without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, str(Path(__file__).with_name("launch_with_a_driver.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_sizes_are_no_reason_to_compile_anew(found: dict[str, Any]) -> None:
    assert found["first"] == 1
    assert found["other batch"] == found["other map"] == 0


def test_compiling_launches_nothing(found: dict[str, Any]) -> None:
    assert found["launches of compiling()"] == 0


def test_a_launch_goes_to_the_tensors_device_and_its_current_stream(found: dict[str, Any]) -> None:
    devices = [(one["device"], one["stream"]) for one in found["launches"]]
    assert devices == [(0, 1000)] * 3 + [(1, 1001)]
    assert found["device after"] == 0, "the current device is put back"
    assert found["other device"] == 1, "a binary is loaded once a device"
