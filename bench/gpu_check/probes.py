"""The rates that decide about wgmma (probes.cu): compiled and run on a device of compute capability 9.0."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.record import ROOT
from bench.gpu_check.tools import run

SOURCE = Path(__file__).with_name("probes.cu")
OPTIONS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a")


def compiler() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def probe(seconds: float) -> dict[str, Any]:
    """The rates, or the reason there are none."""
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return {
            "left_out": f"compute capability {capability[0]}.{capability[1]}, the probes are written for 9.0"
        }
    nvcc = compiler()
    if nvcc is None:
        return {"left_out": "nvcc is not installed"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/probes"
        built = run([nvcc, *OPTIONS, f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", program], seconds)
        if not built["ok"]:
            return {"left_out": built["output"]}
        ran = run([program], seconds - (time.perf_counter() - start), keep=True)
    if not ran["ok"]:
        return {"left_out": ran["output"]}
    found: dict[str, Any] = json.loads(ran["output"])
    return found
