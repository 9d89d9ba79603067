"""Every Triton kernel compiled ahead of time: tensor cores used, registers kept, shared memory within the
device's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The instruction that multiplies matrices, and shared memory a block may have (CUDA programming guide,
# table of limits).
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes outside registers. For sm_100 the assembler caps the planar fprop at 168 registers, and a few values
# of the epilogue do not fit.
STACK = {80: 0, 90: 0, 100: 64}
REGISTERS = 65536  # of a multiprocessor
# wgmma and tcgen05 take 64 rows and more: narrower tiles run on the older instruction.
OLDER = "HMMA"


def compiled(capability: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def is_product(row: dict[str, Any]) -> bool:
    return row["kernel"].startswith(("fprop", "dgrad", "wgrad"))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability: int) -> None:
    rows = compiled(capability)
    assert {"fprop", "dgrad", "wgrad", "sum", "gather"} == {
        row["kernel"].split("[")[0].split()[0] for row in rows
    }
    for row in rows:
        assert row["stack"] <= STACK[capability], f"spills registers: {row}"
        assert row["registers"] * row["threads"] <= REGISTERS, row
        assert row["shared"] <= SHARED[capability], row
        if "strict" in row["kernel"]:
            assert not {TENSOR_CORE[capability], OLDER} & set(row["instructions"]), f"rounds to tf32: {row}"
        elif is_product(row):
            assert {TENSOR_CORE[capability], OLDER} & set(row["instructions"]), f"no tensor cores: {row}"
    wide = [row for row in rows if is_product(row) and "float16" in row["kernel"]]
    assert wide
    for row in wide:
        assert TENSOR_CORE[capability] in row["instructions"], f"not this architecture's tensor cores: {row}"
    copies = [row for row in rows if row["kernel"].startswith("fprop") and "channels_last" in row["kernel"]]
    assert copies
    for row in copies:
        assert "LDGSTS" in row["instructions"], f"operands are not copied asynchronously: {row}"
