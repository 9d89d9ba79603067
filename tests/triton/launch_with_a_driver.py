"""Launches through Triton's own run-time, compiler included, up to a driver that notes what it is given.

    python launch_with_a_driver.py

No GPU is needed: tensors have no memory. Shows what the interpreter cannot: which arguments a kernel is compiled
anew for, the stream, and the device. Prints JSON.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from stripe_kernels import backends, registry
from stripe_kernels.backends.triton import launch
from stripe_kernels.registry import Problem
from stripe_kernels.testing import case

log: list[Any] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        log.append({"grid": [x, y, z], "stream": stream, "function": function, "device": Driver.device})


class Utils:
    loaded = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        Utils.loaded += 1
        return Utils.loaded, Utils.loaded, 64, 0, 1024


class Driver:
    device = 0
    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self) -> int:
        return Driver.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def on_device(device: torch.device):  # type: ignore[no-untyped-def]
    before, Driver.device = Driver.device, device.index
    yield
    Driver.device = before


def meta(*size: int, offset: int = 0) -> torch.Tensor:
    n, c, h, w = size
    flat = torch.empty(n * c * h * w + offset, dtype=torch.bfloat16, device="meta")[offset:]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def main() -> None:
    driver.set_active(Driver())
    torch.cuda.current_device = lambda: Driver.device
    torch.cuda.device = on_device
    backends.load()
    kernel = registry.find("triton")
    found: dict[str, Any] = {}

    def compiled(what: str, images: int, side: int, device: torch.device) -> None:
        """One fprop in a fixed configuration: how many binaries it took."""
        shape = case("", N=images, C=64, H=side, W=side, K=64, density=0.3)
        problem = Problem(shape.shape, shape.skeleton, "bfloat16", "cuda", True, 1)
        runner = kernel.build(problem, "fprop", (128, 32, 64, 0, 4, 4))
        packed = runner.pack(torch.empty(shape.skeleton.stripes, 64, dtype=torch.bfloat16, device="meta"))
        x, y = meta(*shape.shape.input_size), meta(*shape.shape.output_size)
        before = Utils.loaded
        runner.launch(x, packed, y).run(device)
        found[what] = Utils.loaded - before

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    compiled("first", 4, 14, first)
    compiled("other batch", 9, 14, first)
    compiled("other map", 4, 6, first)
    before = len(log)
    with launch.compiling():
        compiled("compiled only", 3, 14, first)
    found["launches of compiling()"] = len(log) - before
    compiled("other device", 4, 14, second)
    found["launches"] = log
    found["device after"] = Driver.device
    print(json.dumps(found))


if __name__ == "__main__":
    main()
