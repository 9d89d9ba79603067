"""The built extension stripe_kernels._cuda: which chips it has code for, and what it says where there is no driver."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import lru_cache

import pytest

from tests.cuda.test_errors import CALLS
from tests.cuda.test_machine_code import (
    KERNELS,
    architectures_of_nvcc,
    disassembler,
    needs_disassembler,
    needs_nvcc,
)
from tests.tree import ROOT, needs_sources

SPEC = importlib.util.find_spec("stripe_kernels._cuda")
needs_extension = pytest.mark.skipif(SPEC is None, reason="stripe_kernels._cuda is not built")
built_here = pytest.mark.skipif(
    SPEC is None or not str(SPEC.origin).startswith(str(ROOT)),
    reason="stripe_kernels._cuda was not built here",
)

# Every call of the extension that needs a driver, in a process of its own, which a crash ends.
WITHOUT_A_DRIVER = """
import json
from stripe_kernels import _cuda
from tests.cuda.test_errors import CALLS, launch_of

for name in ("devices", *CALLS):
    launch = _cuda.devices if name == "devices" else launch_of(_cuda, name, packs=False)
    try:
        launch()
        says = ["nothing", ""]
    except Exception as error:
        says = [type(error).__name__, str(error)]
    print(json.dumps([name, *says]), flush=True)
"""


@needs_extension
def test_without_a_driver_every_call_is_an_error_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_DRIVER],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},  # where there is a GPU
        capture_output=True,
        text=True,
    )
    found = {name: rest for name, *rest in map(json.loads, result.stdout.splitlines())}
    assert result.returncode == 0, f"the process ended after {list(found)}: {result.stderr[-2000:]}"
    assert set(found) == {"devices", *CALLS}
    for name, (kind, says) in found.items():
        assert kind == "RuntimeError", (name, kind, says)
        assert re.search(rf"stripe_kernels\._cuda: {name}: CUDA error \d+: .*(driver|device)", says), (
            name,
            says,
        )


@needs_extension
def test_every_export_is_known() -> None:
    """A new one is called above, or needs no driver, as these."""
    from stripe_kernels import _cuda

    exported = {name for name in dir(_cuda) if not name.startswith("__")}
    launchers = {
        name for name in CALLS if "_" not in name or name in ("copy_rows", "stripe_sum", "stripe_spread")
    }
    assert exported == {"devices", "Kernel", "shared_bytes", *launchers}


@lru_cache
def chips_by_kernel(*options: str) -> dict[str, set[str]]:
    """Of every kernel the chips that the extension has its machine code for, or its PTX."""
    assert SPEC is not None
    listing = subprocess.run(
        [str(disassembler()), *options, str(SPEC.origin)], capture_output=True, text=True, check=True
    ).stdout
    found = defaultdict(set)
    for part in re.split(r"^Fatbin (?:elf|ptx) code:$", listing, flags=re.MULTILINE)[1:]:
        target = re.search(r"^\.target (\w+)", part, re.MULTILINE) or re.search(
            r"^arch = (\w+)", part, re.MULTILINE
        )
        assert target is not None, part[:200]
        for name in re.findall(r"(?:Function |\.entry )(\w+)", part):
            (kernel,) = (k for k in KERNELS if f"{len(k) + 7}{k}_kernel" in name)
            found[kernel].add(target.group(1))
    return dict(found)


@needs_sources
@needs_nvcc
@needs_disassembler
@built_here
def test_every_kernel_has_code_for_every_chip() -> None:
    """sm_90 code is that of 90a: Hopper's own instructions are in no other, and PTX of 90a would run nowhere else."""
    machine, ptx = chips_by_kernel("-res-usage"), chips_by_kernel("-ptx")
    every = set(architectures_of_nvcc())
    assert every >= {"sm_80", "sm_90a"}
    hopper = {kernel for kernel in KERNELS if kernel.endswith("sm90")}
    assert machine == {kernel: {"sm_90a"} if kernel in hopper else every for kernel in KERNELS}
    assert ptx == {kernel: {"sm_80", "sm_90"} for kernel in KERNELS if kernel not in hopper}
