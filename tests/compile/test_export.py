"""Frozen and optimized networks leave: as plain torch, through torch.export and torch.compile, as ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stripe_kernels import StripeConv2d
from stripe_kernels.compile import export_onnx, to_dense
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact
from tests.compile.test_compact import assert_same
from tests.compile.zoo import NETS, masked


@pytest.mark.parametrize("name", NETS)
def test_an_optimized_network_as_plain_torch(name: str) -> None:
    model, frozen, x = masked(name, 0.24)
    network = compact(frozen, (x,))
    dense = to_dense(network)
    assert not any(isinstance(m, (StripeConv2d, Network)) for m in dense.modules())
    assert_same(model, dense, [x, torch.randn(3, *x.shape[1:])])
    assert sum(isinstance(m, nn.Conv2d) for m in dense.modules()) > 0
    assert any(isinstance(m, StripeConv2d) for m in network.modules())


def test_a_network_inside_a_model() -> None:
    _, frozen, x = masked("vgg16", 0.24)
    model = nn.Sequential(compact(frozen, (x,)), nn.Softmax(1))
    with torch.inference_mode():
        torch.testing.assert_close(to_dense(model)(x), frozen(x).softmax(1))


@pytest.mark.parametrize("optimized", [False, True])
def test_torch_export_takes_other_batches(optimized: bool) -> None:
    model, frozen, x = masked("squeeze_excite", 0.24)
    network = compact(frozen, (x,)).body if optimized else frozen
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    assert_same(model, exported.module(), [x, torch.randn(7, *x.shape[1:])])


def test_torch_compile_sees_one_graph() -> None:
    model, frozen, x = masked("resnet20", 0.24)
    compiled = torch.compile(compact(frozen, (x,)), fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, [x])


@pytest.mark.parametrize("name", ["squeeze_excite", "unet"])
def test_onnx_runtime_agrees(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, frozen, x = masked(name, 0.24)
    export_onnx(compact(frozen, (x,)), x, tmp_path / "net.onnx")
    written = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for n in (2, 5):
        x = torch.randn(n, *x.shape[1:])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
