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
            call = {"onnxruntime": _onnxruntime, "openvino": _openvino}[name](model, x)
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


def _onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        stripe_kernels.export_onnx(model, x, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


@cache
def _core() -> Any:
    """One for the process: the second of two to go takes the thread's signal stack from under it (2026.4)."""
    import openvino

    return openvino.Core()


def _openvino(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it takes bfloat16 where the processor has it
    }
    converted = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    request = _core().compile_model(converted, "CPU", settings).create_infer_request()
    images = x.contiguous()
    request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))

    def call() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    call.images = images  # type: ignore[attr-defined]  # which the shared tensor does not keep alive
    return call
