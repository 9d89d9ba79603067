"""Where the check runs: a GPU with CUDA graphs and events, or the CPU in a dry run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.gpu_check.stages import DEVICE_LOST
from bench.timing import Sample

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

# Of a kernel that cannot be compiled, launched or captured.
FAILURES = (RuntimeError, TritonError, ValueError, AssertionError, TypeError, AttributeError)


def set_precision(dtype: str) -> None:
    """tf32 or strict float32, for cuDNN, cuBLAS and the kernels here alike."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "float32"


@dataclass(frozen=True)
class Device:
    """`type` is torch's device type. `cache` is the bytes that inputs must exceed for a call to find none
    of them cached."""

    type: str
    name: str
    cache: int

    @classmethod
    def find(cls, dry_run: bool) -> Device:
        if dry_run:
            return cls("cpu", "dry run", 0)
        if not torch.cuda.is_available():
            raise SystemExit("gpu_check: no CUDA device answers; --dry-run runs the same code on the CPU")
        found = torch.cuda.get_device_properties(0)
        return cls("cuda", found.name, 2 * found.L2_cache_size)

    @property
    def slug(self) -> str:
        return "-".join(self.name.lower().split())

    def copies(self, bytes_of_a_call: int, most: int = 32) -> int:
        """Input sets to rotate through."""
        return max(2, min(most, -(-self.cache // max(1, bytes_of_a_call))))

    def synchronize(self) -> None:
        if self.type == "cuda":
            torch.cuda.synchronize()

    def leave_if_lost(self) -> None:
        """Ends the process where the GPU answers with errors only, as after an illegal address: whatever ran next
        would take the blame. The parent starts another one."""
        if self.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(error, flush=True)
                os._exit(DEVICE_LOST)

    def repeated(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        """A measurement: runs `calls` one after the other, captured as one CUDA graph, and gives seconds a
        call."""
        if self.type != "cuda":
            return lambda: _host_seconds(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, allocates and copies indices before the capture
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # A graph has only the addresses of what its calls read and write: both live as long as it.
            held = calls, [call() for call in calls]

        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / len(held[0])

        return measure


def _host_seconds(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def interleave(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Sample]:
    """Every round measures each contestant once and starts with another one."""
    names = list(measurements)
    for name in names:
        measurements[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(measurements[name]())
    return {name: Sample(np.array(times[name]), 1) for name in names}


def driver() -> str | None:
    """The driver's version, clocks and temperature as nvidia-smi has them, for the record."""
    query = "driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
