"""From gates to the stripe kernels: equal outputs, and a loop of one's own."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iessp
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
    """Ten steps of SGD: packed training strays no further from a float64 run than masked dense training."""
    masked = iessp.detach(settled("resnet20"))
    masked_start = iessp.freeze(settled("resnet20"))
    exact = copy.deepcopy(masked).double()
    skeletons = iessp.skeletons(settled("resnet20"))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 10) for _ in range(10)]

    def curve(model: nn.Module, hold: bool) -> torch.Tensor:
        optimiser = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
        losses = []
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(model.classifier.weight.dtype)), y)
            optimiser.zero_grad()
            loss.backward()
            if hold:
                for name, skeleton in skeletons.items():
                    model.get_submodule(name).weight.grad *= skeleton[:, None]
            optimiser.step()
            losses.append(loss.detach().double())
        return torch.stack(losses)

    reference = curve(exact, hold=True)
    own = (curve(masked, hold=True) - reference).abs()
    packed = (curve(masked_start, hold=False) - reference).abs()
    assert packed.mean() <= 2 * own.mean() + 1e-6, (packed, own)


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
