"""A budget in milliseconds: the fit, the budget it becomes, and that dear stripes die first."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import iessp
from iessp import latency, pareto
from iessp.budget import cut
from iessp.data import load
from iessp.data.images import Images, Splits
from iessp.latency import Latency, measure, priced
from iessp.network import probe
from iessp.recipe import Recipe
from iessp.report import draw_front
from iessp.timing import Timing
from iessp.train import Trainer

STRIPE_MS = {"0": 0.004, "2": 0.001, "4": 0.0005}
OTHERS_MS = 0.002  # of networks with other names
FIXED_MS = 0.7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1, bias=False),
    )  # fmt: skip


def clock(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """A machine whose stripes take STRIPE_MS each, 0.1 ms a layer, and FIXED_MS whatever the network."""
    found = {}
    for key, call in calls.items():
        module = call.args[0]  # type: ignore[attr-defined]
        call()
        live = {
            n or key.split()[-1]: len(m.weight) if hasattr(m, "skeleton") else m.weight[:, 0].numel()
            for n, m in module.named_modules()
            if hasattr(m, "skeleton") or isinstance(m, nn.Conv2d)
        }
        time = sum(STRIPE_MS.get(n, OTHERS_MS) * count + 0.1 for n, count in live.items())
        found[key] = Timing(time + (FIXED_MS - 0.1 * len(live) if " " not in key else 0.0), 0.0, 0.0, 1)
    return found


def few_digits() -> Splits:
    whole = load("digits")

    def few(images: Images) -> Images:
        return Images(images.x[:64, :, ::4, ::4].contiguous(), images.y[:64])

    parts = (few(whole.train), few(whole.held_out), few(whole.test))
    return Splits("digits", *parts, whole.classes, whole.mean, whole.std, whole.flip)


@pytest.fixture
def exact_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "interleave", clock)


def test_a_layer_of_one_stripe_costs_as_good_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "interleave", clock)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 1, 1))
    found = measure(iessp.attach(net, pointwise=True), torch.zeros(1, 3, 8, 8))
    assert found.per_stripe["0"] == pytest.approx(STRIPE_MS["0"])
    assert 0 < found.per_stripe["2"] <= 1e-3 * STRIPE_MS["0"]


def test_the_fit_finds_what_each_stripe_costs(exact_clock: None) -> None:
    model = iessp.attach(network())
    before = copy.deepcopy(model.state_dict())
    found = measure(model, torch.zeros(2, 3, 8, 8))
    assert found.per_stripe == pytest.approx(STRIPE_MS)
    assert found.fixed == pytest.approx(FIXED_MS)
    assert found.batch == 2
    assert all(
        torch.equal(v, model.state_dict()[k]) for k, v in before.items() if isinstance(v, torch.Tensor)
    )
    half = {name: torch.rand(g.site.stripe_shape) < 0.5 for name, g in iessp.gates(model).items()}
    expected = FIXED_MS + sum(STRIPE_MS[name] * int(s.sum()) for name, s in half.items())
    assert found.of(half) == pytest.approx(expected)


def test_a_share_of_time_is_cut_to_that_time() -> None:
    times, plain = Latency(FIXED_MS, STRIPE_MS, 1, 1), probe(network(), torch.zeros(1, 3, 8, 8))
    scores = {site.name: torch.rand(site.stripe_shape) for site in plain.sites}
    for milliseconds in (0.8, 0.9, 1.1):
        share = times.share(milliseconds, plain)
        skeletons = cut(priced(plain, times), scores, share)
        spare = milliseconds - times.of(skeletons)
        assert -1e-9 <= spare <= min(STRIPE_MS.values()) + 1e-9
    whole = FIXED_MS + sum(STRIPE_MS[site.name] * site.stripes for site in plain.sites)
    for milliseconds, verdict in ((0.5, "is out of reach"), (100.0, "needs nothing cut")):
        with pytest.raises(
            ValueError,
            match=rf"{milliseconds:g} ms {verdict}: batch 1 on 1 thread takes 0\.7 ms without any stripe and "
            rf"{whole:.3g} ms",
        ):
            times.share(milliseconds, plain)


def test_a_layer_without_gain_keeps_its_place_and_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRIPE_MS, "2", -0.001)  # noise can make a layer faster with more stripes
    monkeypatch.setattr(latency, "interleave", clock)
    found = measure(iessp.attach(network()), torch.zeros(1, 3, 8, 8))
    assert 0 < found.per_stripe["2"] < 0.01 * found.per_stripe["4"]


def test_prices_take_the_place_of_macs_in_the_loss() -> None:
    model = iessp.attach(network(), "magnitude", prices={"0": 1.0, "2": 0.0, "4": 3.0})
    for name, gate in iessp.gates(model).items():
        gate.settle(torch.full(gate.site.stripe_shape, name != "0"))
    stripes = {name: gate.site.stripes for name, gate in iessp.gates(model).items()}
    expected = 3 * stripes["4"] / (stripes["0"] + 3 * stripes["4"])
    assert float(iessp.penalty(model)) == pytest.approx(expected)


def test_a_recipe_in_milliseconds_trains_resumes_and_keeps_to_it(exact_clock: None, tmp_path: Path) -> None:
    splits = few_digits()
    recipe = Recipe(name="t", model="resnet20", width=0.25, epochs=4, batch=16, gate_lr=0.2, budget="2 ms")
    trainer = Trainer(recipe, splits, tmp_path)
    trainer.run()
    stored = Latency(**json.loads((tmp_path / "latency.json").read_text()))
    # One stripe more does not fit, or fits to the last bit, which sum() rounds otherwise from CPython 3.12 on.
    assert 2 - OTHERS_MS - 1e-9 < stored.of(trainer.skeletons) <= 2 + 1e-9
    (tmp_path / "latency.json").write_text(json.dumps({**stored.as_dict(), "fixed": 1.0}))
    assert Trainer(recipe, splits, tmp_path).budget < trainer.budget, "read back, not measured again"


@pytest.mark.parametrize("budget", ["2.5", "fast ms", "-1 ms", "2 s"])
def test_what_is_no_budget_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'or a time such as "2.5 ms", got {budget!r}')):
        Recipe(name="t", budget=budget)
    with pytest.raises(ValueError, match="slim has no budget in milliseconds"):
        Recipe(name="t", method="slim", budget="2.5 ms")


def test_the_front_gives_both_kinds_of_budget_the_same_time(
    exact_clock: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pareto, "time_networks", timed_by_name)
    recipe = Recipe(name="t", model="resnet20", width=0.25, epochs=4, batch=16, gate_lr=0.2, timed_batch=2)
    points = pareto.front(recipe, few_digits(), tmp_path, [0.4], 2, 0.0)
    assert [(p["kind"], p["share"], p["seed"]) for p in points] == [
        (kind, 0.4, seed) for seed in (0, 1) for kind in pareto.KINDS
    ]
    for first, second in zip(points[::2], points[1::2], strict=True):
        assert first["macs_kept"] == pytest.approx(first["budget"], abs=0.002)
        assert float(second["budget"].removesuffix(" ms")) == pytest.approx(first["predicted_ms"], rel=1e-3)
        assert second["predicted_ms"] == pytest.approx(first["predicted_ms"], abs=OTHERS_MS + 1e-3)
    assert [p["ms"] for p in points] == [float(i) for i in range(4)]
    assert json.loads((tmp_path / "pareto.json").read_text())["points"] == points
    assert [row[1] for row in pareto.rows(points)] == ["2"] * 2
    draw_front(points, pareto.KINDS, tmp_path / "pareto.svg")
    picture = (tmp_path / "pareto.svg").read_text()
    assert "budget in milliseconds" in picture
    assert "fill: #ffffff" not in picture, "no background"
    monkeypatch.setattr(pareto, "measure", None)  # nothing is measured or trained again
    again = pareto.front(recipe, few_digits(), tmp_path, [0.4], 2, 0.0)
    assert again == points


def timed_by_name(
    networks: dict[str, nn.Module], x: torch.Tensor, seconds: float
) -> dict[str, tuple[Timing, str]]:
    assert len(x) == 2
    return {name: (Timing(-1.0 if name == "dense" else float(name), 0, 0, 1), "") for name in networks}
