"""The dense network at its best: what a speed-up has to be quoted over.

Eager with its norms folded, and the inference runtimes that are installed. Whatever cannot compete says why in a
warning and is left out.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import stripe_kernels

_ERROR = 1e-3  # of the largest output: float32 sums of another order stay below
_NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


def folded(model: nn.Module) -> nn.Module | None:
    """A copy with every batch norm in the convolution before it; None where torch.fx cannot follow the model, or there
    is nothing to fold."""
    with left_out("dense, folded"):
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            return fuse(model.eval())
    return None


def runtimes(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """A call of the dense `model` on x [N, C, H, W] in every runtime that is installed, as many threads as torch's."""
    found: dict[str, Callable[[], object]] = {}
    for name, needed in _NEEDS.items():
        if x.dtype != torch.float32 or any(importlib.util.find_spec(package) is None for package in needed):
            continue
        with left_out(f"dense, {name}"):
            threads = torch.get_num_threads()
            if name == "onnxruntime":
                call = onnxruntime_call(_exported(model, x), x, threads)
            else:
                call = openvino_call(model, x, threads)
            with torch.inference_mode():
                expected = model(x)
            error = float((torch.as_tensor(call()) - expected).abs().max() / expected.abs().max())
            if error > _ERROR:
                raise RuntimeError(f"it is off by {error:.1e} of the largest output")
            found[f"dense, {name}"] = call
    return found


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """Makes what goes wrong inside a warning that `name` does not compete."""
    before = logging.root.manager.disable
    try:
        logging.disable()  # exporters tell of every package that they could also use
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # noqa: BLE001 # whatever an exporter or a runtime raises
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        warnings.warn(f"{name} is left out: {reason}", stacklevel=3)
    finally:
        logging.disable(before)


def onnxruntime_call(model: bytes, x: Tensor, threads: int) -> Callable[[], np.ndarray]:
    """A call of an ONNX model on x, with a session and a pool of `threads` of its own; its output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


@cache
def openvino_core() -> Any:
    """The process's one Core, kept to its end.

    A Core's CPU plugin gives the thread a signal stack and takes it away when it goes. Of two that overlap the second
    to go leaves the thread on the first one's, which is unmapped by then: the next signal with a handler in Python
    ends the process, without a word from faulthandler (2026.4).
    """
    import openvino

    return openvino.Core()


def openvino_call(
    model: bytes | nn.Module, x: Tensor, threads: int, precision: str = "f32"
) -> Callable[[], np.ndarray]:
    """A call on x of a module, or of an ONNX model, in one stream; its output, which the next call overwrites.

    precision: f32 or bf16; left alone it takes bf16 where the CPU has it.
    """
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    if isinstance(model, bytes):
        read = openvino_core().read_model(model, b"")
    else:
        read = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    request = openvino_core().compile_model(read, "CPU", settings).create_infer_request()
    images = x.contiguous()
    request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))

    def call() -> np.ndarray:
        request.infer()
        return request.get_output_tensor(0).data

    call.images = images  # type: ignore[attr-defined]  # which the shared tensor does not keep alive
    return call


def _exported(model: nn.Module, x: Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        stripe_kernels.export_onnx(model, x, path)
        return path.read_bytes()
