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
REGISTERS = 65536  # of a multiprocessor
# Blocks that have to fit into them: others hide what one waits for. Those of products are few and large; of theirs the
# registers of today bound a thread's, and where offsets have 64 bits, or a tile 256 channels, only the assembler does.
BLOCKS = {"gather spread": 8, "sum of splits": 12, "gather sum": 3, "gather parts": 3, "stem": 2}
MOST_REGISTERS = {"fprop": 192, "dgrad": 224, "wgrad": 216}
# wgmma and tcgen05 take 64 rows and more: narrower tiles run on the older instruction.
OLDER = "HMMA"


def compiled(capability: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_registers(row: dict[str, Any]) -> None:
    name, given = row["kernel"], -(-row["registers"] // 8) * 8 * row["threads"]
    blocks = next((n for kind, n in BLOCKS.items() if name.startswith(kind)), 1)
    assert given * blocks <= REGISTERS, f"{blocks} blocks do not fit into a multiprocessor: {row}"
    most = MOST_REGISTERS.get(name.split("[")[0])
    if most is not None and not any(word in name for word in ("64-bit", ", 256, ", "strict")):
        assert row["registers"] <= most, f"more than {most} registers: {row}"


def is_product(row: dict[str, Any]) -> bool:
    return row["kernel"].startswith(("fprop", "dgrad", "wgrad"))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability: int) -> None:
    rows = compiled(capability)
    assert {"fprop", "dgrad", "wgrad", "sum", "gather", "max", "epilogue", "stem"} == {
        row["kernel"].split("[")[0].split()[0] for row in rows
    }
    for row in rows:
        # 64-bit addresses, for tensors of more than 2^31 values, take twice the registers of 32-bit ones.
        assert row["stack"] <= (16 if "64-bit" in row["kernel"] else 0), f"spills registers: {row}"
        check_registers(row)
        assert row["shared"] <= SHARED[capability], row
        if "strict" in row["kernel"]:
            assert not {TENSOR_CORE[capability], OLDER} & set(row["instructions"]), f"rounds to tf32: {row}"
        elif is_product(row):
            assert {TENSOR_CORE[capability], OLDER} & set(row["instructions"]), f"no tensor cores: {row}"
    wide = [row for row in rows if is_product(row) and "float16" in row["kernel"]]
    assert wide
    for row in wide:
        assert TENSOR_CORE[capability] in row["instructions"], f"not this architecture's tensor cores: {row}"
    for row in rows:
        if row["gathers"] and row["narrow_loads"] and "64-bit" not in row["kernel"]:
            # roofline.py's GATHER assumes 8 for a value. Before the loops were rewritten a step of 16 values took
            # 413 (dgrad) and 570 (wgrad).
            assert row["loop"] <= 220 + 10 * row["narrow_loads"], (
                f"too much arithmetic around gathered values: {row}"
            )
        if row["kernel"].startswith(("gather sum", "gather parts")) and "64-bit" not in row["kernel"]:
            assert row["loop"] <= 13 * row["narrow_loads"] or "float32" in row["kernel"], row
        if row["kernel"].startswith("gather spread pixel-major bfloat16"):
            # 4 bytes a lane fill a line a warp; 16 bytes a lane were slower on an H100.
            assert "STG.E.U16" not in row["accesses"], f"aligned columns are written one by one: {row}"
        if row["kernel"].startswith("gather sum bfloat16 channels_last"):
            assert "STG.E.128" in row["accesses"], f"filters of a sector are not written at once: {row}"
        if row["kernel"].startswith("stem"):
            assert {TENSOR_CORE[capability], OLDER} & set(row["instructions"]), f"no tensor cores: {row}"
            assert "STG.E.128" in row["accesses"], f"filters are not written 16 bytes at a time: {row}"
            assert row["loop"] <= 18 * row["narrow_loads"] or "64-bit" in row["kernel"], row
    moving = [row for row in rows if row["kernel"].startswith(("max pool", "epilogue"))]
    for row in moving:
        assert all(a.endswith("128") for a in row["accesses"]), f"not 16 bytes at a time: {row}"
        assert row["registers"] * row["threads"] * 10 <= REGISTERS, f"too few blocks hide a load: {row}"
    copies = [row for row in rows if row["kernel"].startswith("fprop") and "channels_last" in row["kernel"]]
    assert copies
    for row in copies:
        assert any(a.startswith("LDGSTS") and a.endswith("128") for a in row["accesses"]), (
            f"operands are not copied asynchronously, 16 bytes at a time: {row}"
        )
        assert not row["narrow_loads"], f"operands are loaded one by one: {row}"
