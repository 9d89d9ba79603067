"""From gates to the stripe kernels: equal outputs, and a loop of one's own."""

from __future__ import annotations

import runpy
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

import iessp
from iessp.data import load
from iessp.finetune import follow
from iessp.models import build
from iessp.runs import thaw
from iessp.timing import compare, interleave
from stripe_kernels import StripeConv2d

EXAMPLE = Path(__file__).parents[2] / "examples/prune_your_own.py"


def settled(name: str = "resnet20", budget: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    model = iessp.attach(build(name, 10, width=0.5))
    for gate in iessp.gates(model).values():
        gate.phase = "learn"
        with torch.no_grad():
            gate.bias.add_(torch.randn_like(gate.bias))
    model.train()(torch.randn(8, 3, 32, 32))
    iessp.settle(model, budget)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_frozen_equals_masked_within_the_error_budget(name: str) -> None:
    model = settled(name)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    frozen = iessp.freeze(model)
    x = torch.randn(5, 3, 32, 32)
    equality = compare(frozen, model, x)
    assert equality.ok, equality
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), (
        "the model is left as it was"
    )
    layers = {n: m for n, m in frozen.named_modules() if isinstance(m, StripeConv2d)}
    skeletons = iessp.skeletons(model)
    assert layers.keys() == {n for n, s in skeletons.items() if not s.all()}
    assert all(torch.equal(layer.skeleton, skeletons[n]) for n, layer in layers.items())
    assert compare(frozen, thaw(frozen), x).ok


def test_comparison_notices_a_difference() -> None:
    model = settled()
    frozen = iessp.freeze(model)
    layer = next(m for m in frozen.modules() if isinstance(m, StripeConv2d))
    with torch.no_grad():
        layer.weight[0, 0] += 1e-2
    assert not compare(frozen, model, torch.randn(5, 3, 32, 32)).ok


def test_finetuning_the_packed_weights_follows_the_masked_network() -> None:
    """20 steps: packed training strays no further from a float64 run than masked dense training, median of 10
    seeds: single ones span two orders of magnitude, and of 5 it is a toss."""
    splits = load("digits")
    curves = [follow("resnet20", 0.25, splits, seed, batch=16, size=8, smooth=True) for seed in range(10)]
    drifts = {kind: median(curve.drift(kind) for curve in curves) for kind in ("dense", "packed")}
    assert drifts["packed"] <= drifts["dense"], drifts
    assert 0 < drifts["dense"] < 1e-2
    assert all(curve.exact[-5:].mean() < curve.exact[:5].mean() for curve in curves), "it trains"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten lines are enough for a network and a loop of one's own."""
    runpy.run_path(str(EXAMPLE))["main"](steps=60)
    line = capsys.readouterr().out
    assert line.startswith("25.0% of the MACs kept"), line
    assert float(line.split("kept, ")[1].split("%")[0]) > 60


def test_interleaved_timing_counts_every_contestant() -> None:
    calls = {"a": 0, "b": 0}

    def contestant(name: str) -> None:
        calls[name] += 1

    times = interleave({n: (lambda n=n: contestant(n)) for n in calls}, seconds=0.01)
    assert calls["a"] > 5
    assert calls["b"] > 5
    assert all(t.n >= 5 and t.low <= t.median <= t.high for t in times.values())
