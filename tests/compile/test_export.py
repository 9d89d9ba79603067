"""Frozen and optimized networks leave: as plain torch, through torch.export and torch.compile, as ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from stripe_kernels import StripeConv2d, freeze
from stripe_kernels.compile import export_onnx, to_dense
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact
from tests.compile.test_compact import assert_same
from tests.compile.zoo import NETS, masked
from tests.tree import needs_compiler


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
    network = compact(frozen, (x,)) if optimized else frozen
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    assert_same(model, exported.module(), [x, torch.randn(7, *x.shape[1:])])


def test_torch_compile_sees_one_graph() -> None:
    model, frozen, x = masked("resnet20", 0.24)
    compiled = torch.compile(compact(frozen, (x,)), fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, [x])


def test_an_exported_dense_network_calls_torch_alone() -> None:
    """What AOTInductor needs: no operator that lives in Python."""
    model, frozen, x = masked("squeeze_excite", 0.24)
    exported = torch.export.export(to_dense(compact(frozen, (x,))), (x,))
    called = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert {name.split(".")[0] for name in called} == {"aten"}
    assert_same(model, exported.module(), [x])


@pytest.mark.slow
@needs_compiler
def test_an_aot_inductor_package_repeats_the_network(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(2, 3, 7, 6)
    frozen = freeze(model, {"0": torch.ones(8, 3, 3, dtype=torch.bool).tril()})
    exported = torch.export.export(to_dense(compact(frozen, (x,))), (x,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), frozen(x))


def test_a_state_dict_goes_both_ways() -> None:
    """Of dense layers into stripes and of stripes into dense layers: the names are the same."""
    model, frozen, x = masked("resnet20", 0.24)
    other, again, _ = masked("resnet20", 0.24, seed=1)
    pruned = {n: m for n, m in frozen.named_modules() if isinstance(m, StripeConv2d)}
    fresh = freeze(other, {n: m.skeleton for n, m in pruned.items()})
    fresh.load_state_dict(model.state_dict())
    back = to_dense(again)
    back.load_state_dict(to_dense(fresh).state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh(x), frozen(x))
        assert torch.equal(back(x), model(x))
    with pytest.raises(
        RuntimeError, match=r"weight has values in \d+ stripes that the skeleton counts as dead"
    ):
        fresh.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", ["squeeze_excite", "unet", "yolo_neck"])
def test_onnx_runtime_agrees(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, frozen, x = masked(name, 0.24)
    export_onnx(compact(frozen, (x,)), x, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", ""), "an export that went well says nothing"
    written = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for n in (2, 5):
        x = torch.randn(n, *x.shape[1:])
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            for y, expected in zip(outputs, tree_leaves(model(x)), strict=True):
                torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)
