"""The inference runtimes: ONNX Runtime and OpenVINO, for single layers and whole networks.

Both keep a blocked layout of their own between layers. A single layer pays the conversion at both ends; in
whole networks only the first and the last one do.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.job import Entrant, Job, Refused
from iessp.dense import onnxruntime_call, openvino_call

_NEEDED = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def require(name: str) -> None:
    """Raises Refused, with what to install, where the runtime cannot compete here."""
    lacking = [p for p in _NEEDED[name] if importlib.util.find_spec(p) is None]
    if lacking:
        raise Refused(f"needs {' and '.join(lacking)}: pip install -e .[bench]")


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


def network_call(name: str, model: bytes, x: Tensor, threads: int) -> Callable[[], np.ndarray]:
    """A call of an ONNX model of a whole network on x, in the runtime of that name, float32."""
    return {"onnxruntime": onnxruntime_call, "openvino": openvino_call}[name](model, x, threads)


def _layer_model(name: str, job: Job) -> bytes:
    require(name)
    if job.which != "fprop":
        raise Refused("inference only")
    la = job.layer
    return convolution(job.dense_weight, tuple(job.operands.x.shape), la.stride, la.padding, la.groups)


def onnxruntime_layer(job: Job) -> Entrant:
    """The layer with its zeros, in ONNX Runtime."""
    if job.dtype != torch.float32:
        raise Refused(f"its CPU convolution takes float32, not {str(job.dtype)[6:]}")
    call = onnxruntime_call(_layer_model("onnxruntime", job), job.operands.x, job.threads)
    return Entrant("dense", call, lambda: job.oracle.far(torch.as_tensor(call())), job.dense_macs)


def openvino_layer(job: Job) -> Entrant:
    """The layer with its zeros, in OpenVINO; its way of bfloat16 is inside, between float32 tensors."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(job.dtype)
    if precision is None:
        raise Refused(f"takes float32 and bfloat16 on a CPU, not {str(job.dtype)[6:]}")
    call = openvino_call(_layer_model("openvino", job), job.operands.x.float(), job.threads, precision)

    def check() -> str | None:
        return job.oracle.far(torch.as_tensor(call()).to(job.dtype))

    return Entrant("dense", call, check, job.dense_macs)
