"""From gates to the stripe kernels: equal outputs, and a loop of one's own."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from math import log
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import iessp
import stripe_kernels
from iessp.data import load
from iessp.finetune import Curves, follow
from iessp.models import build
from iessp.runs import thaw
from iessp.timing import compare, interleave
from stripe_kernels import StripeConv2d

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/prune_your_own.py"


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


class Headed(nn.Module):
    """A submodule by the name that wrappers give to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(x))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, AveragedModel, torch.compile])
@pytest.mark.parametrize("first", ["attached", "wrapped"])
def test_the_whole_model_is_frozen(wrap: Callable[[nn.Module], nn.Module], first: str) -> None:
    model = Headed()
    if first == "attached":
        wrapped = wrap(iessp.attach(model, "magnitude"))
    else:
        wrapped = iessp.attach(wrap(model), "magnitude")
    iessp.settle(wrapped, 0.5)
    frozen = iessp.freeze(wrapped.eval())
    assert type(frozen) is Headed
    assert any(isinstance(m, StripeConv2d) for m in frozen.modules())
    assert not any(m._forward_pre_hooks for m in frozen.modules()), "no gate looks on"
    assert compare(frozen, wrapped, torch.randn(2, 3, 7, 6)).ok


def test_comparison_notices_a_difference() -> None:
    model = settled()
    frozen = iessp.freeze(model)
    layer = next(m for m in frozen.modules() if isinstance(m, StripeConv2d))
    with torch.no_grad():
        layer.weight[0, 0] += 1e-2
    assert not compare(frozen, model, torch.randn(5, 3, 32, 32)).ok


def small() -> nn.Module:
    """Five convolutions without a sharp edge: drifts of larger networks differ a hundredfold from seed to seed, and
    hide what the kernels add."""
    layers: list[nn.Module] = []
    for c, stride in ((3, 1), (32, 2), (32, 1), (32, 2), (32, 1)):
        layers += [nn.Conv2d(c, 32, 3, stride, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def excess(curves: list[Curves]) -> tuple[float, float]:
    """The logarithm of packed drift over dense drift: its mean over the seeds, and what chance adds to it (99 %, one
    side)."""
    ratios = [log(curve.drift("packed") / curve.drift("dense")) for curve in curves]
    return mean(ratios), 2.33 * stdev(ratios) / len(ratios) ** 0.5


def test_finetuning_the_packed_weights_follows_the_masked_network() -> None:
    """20 steps: packed training strays no further from a float64 run than masked dense training, seed by seed. Both
    drifts are rounding alone, so that either is the larger one in half of all seeds: what is tested is that their ratio
    is not above 1 by more than chance, with seeds enough that a quarter would be noticed."""
    splits, name = load("digits"), f"{__name__}:small"
    curves = [follow(name, 1.0, splits, seed, batch=8, size=8) for seed in range(20)]
    found, chance = excess(curves)
    assert found <= chance, (found, chance)
    assert chance < log(1.25), "too few seeds to say"
    assert all(0 < curve.drift("dense") < 1e-5 for curve in curves)
    assert all(curve.exact[-5:].mean() < curve.exact[:5].mean() for curve in curves), "it trains"


def test_kernels_that_lose_a_bit_or_two_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def inexact(layer: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y * (1 + 2**-22 * torch.randn_like(y))

    def freeze(model: nn.Module, chosen: dict[str, torch.Tensor]) -> nn.Module:
        frozen = original(model, chosen)
        for layer in frozen.modules():
            if isinstance(layer, StripeConv2d):
                layer.register_forward_hook(inexact)
        return frozen

    original = stripe_kernels.freeze
    monkeypatch.setattr(stripe_kernels, "freeze", freeze)
    splits, name = load("digits"), f"{__name__}:small"
    found, chance = excess([follow(name, 1.0, splits, seed, batch=8, size=8) for seed in range(10)])
    assert found > chance, (found, chance)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten lines are enough for a network and a loop of one's own."""
    runpy.run_path(str(EXAMPLE))["main"](steps=60)
    line = capsys.readouterr().out
    assert line.startswith("25.0% of the MACs kept"), line
    assert float(line.split("kept, ")[1].split("%")[0]) > 60


@pytest.mark.parametrize(
    ("program", "wrong", "message"),
    [
        (["examples/prune_your_own.py"], "--steps=0", "--steps must be at least 1, got 0"),
        (["-m", "iessp.finetune"], "--model=nosuch", 'unknown model "nosuch": Valid: vgg16'),
        (["-m", "iessp.finetune"], "--width=0", "width must be positive, got 0.0"),
        (["-m", "iessp.finetune"], "--seeds=0", "--seeds, --steps and --batch must be at least 1"),
    ],
)
def test_programs_refuse_what_they_cannot_do(program: list[str], wrong: str, message: str) -> None:
    ran = subprocess.run([sys.executable, *program, wrong], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert message in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_interleaved_timing_counts_every_contestant() -> None:
    calls = {"a": 0, "b": 0}

    def contestant(name: str) -> None:
        calls[name] += 1

    times = interleave({n: (lambda n=n: contestant(n)) for n in calls}, seconds=0.01)
    assert calls["a"] > 5
    assert calls["b"] > 5
    assert all(t.n >= 5 and t.low <= t.median <= t.high for t in times.values())
