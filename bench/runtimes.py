"""The inference runtimes: ONNX Runtime and OpenVINO, for single layers and whole networks.

Both keep a blocked layout of their own between layers. A single layer pays the conversion at both ends; in
whole networks only the first and the last one do.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bench.job import Entrant, Job, Refused

if TYPE_CHECKING:
    import openvino

Runner = tuple[
    Callable[[], object], Callable[[], Tensor]
]  # the call, and the call with its result as a tensor
_NEEDED = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def absent() -> dict[str, str]:
    """Runtimes that cannot compete here, with what to install."""
    return {name: text for name in _NEEDED if (text := _absent(name))}


def _absent(name: str) -> str | None:
    lacking = [p for p in _NEEDED[name] if importlib.util.find_spec(p) is None]
    return f"needs {' and '.join(lacking)}: pip install -e .[bench]" if lacking else None


def convolution(
    weight: Tensor, x_size: tuple[int, ...], stride: int, padding: tuple[int, int], groups: int
) -> bytes:
    """An ONNX model of one convolution, float32."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "Conv", ["x", "weight"], ["y"], strides=[stride] * 2, pads=[*padding, *padding], group=groups,
        kernel_shape=list(weight.shape[2:]),
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x_size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.float().numpy(), "weight")],
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()


def network(model: nn.Module, x: Tensor) -> bytes:
    """An ONNX model of a network in evaluation mode."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter, though deprecated: the newer one takes up to three times as long (measured)
        # and needs another package; of these networks both write the same graph.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"], opset_version=17
        )
    return file.getvalue()


def onnxruntime_runner(model: bytes, x: Tensor, threads: int) -> Runner:
    """A session on the CPU with its own thread pool."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed), lambda: torch.from_numpy(session.run(None, feed)[0])


@cache
def openvino_core() -> openvino.Core:
    """The process's one Core, kept to its end.

    A Core's CPU plugin gives the thread a signal stack and takes it away when it goes. Of two that overlap the second
    to go leaves the thread on the first one's, which is unmapped by then: the next signal with a handler in Python
    ends the process, without a word from faulthandler (2026.4).
    """
    import openvino

    return openvino.Core()


def openvino_runner(model: bytes, x: Tensor, threads: int, precision: str) -> Runner:
    """A compiled model, one stream. precision: f32 or bf16; left alone it takes bf16 where the CPU has it."""
    import openvino

    core = openvino_core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(core.read_model(model, b""), "CPU", settings).create_infer_request()
    data = np.ascontiguousarray(x.numpy())
    request.set_input_tensor(openvino.Tensor(data, shared_memory=True))

    def call() -> np.ndarray:  # with the request it keeps `data` alive, which the shared tensor does not
        request.infer()
        return data

    def result() -> Tensor:
        call()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return call, result


def _layer_model(name: str, job: Job) -> bytes:
    reason = _absent(name)
    if reason:
        raise Refused(reason)
    if job.which != "fprop":
        raise Refused("inference only")
    la = job.layer
    return convolution(job.dense_weight, tuple(job.operands.x.shape), la.stride, la.padding, la.groups)


def onnxruntime_layer(job: Job) -> Entrant:
    """The layer with its zeros, in ONNX Runtime."""
    if job.dtype != torch.float32:
        raise Refused(f"its CPU convolution takes float32, not {str(job.dtype)[6:]}")
    call, result = onnxruntime_runner(_layer_model("onnxruntime", job), job.operands.x, job.threads)
    return Entrant("dense", call, lambda: job.oracle.far(result()), job.dense_macs)


def openvino_layer(job: Job) -> Entrant:
    """The layer with its zeros, in OpenVINO; its way of bfloat16 is inside, between float32 tensors."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(job.dtype)
    if precision is None:
        raise Refused(f"takes float32 and bfloat16 on a CPU, not {str(job.dtype)[6:]}")
    call, result = openvino_runner(
        _layer_model("openvino", job), job.operands.x.float(), job.threads, precision
    )
    return Entrant("dense", call, lambda: job.oracle.far(result().to(job.dtype)), job.dense_macs)
