"""The budgeted loss: shares, schedule, controller, and that it ends on its budget."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iessp
from iessp.attach import METHODS, network_of
from iessp.gate import StripeGate
from iessp.loss import BAND, LAMBDA_RANGE, wanted_share


def toy(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)),
    )


@contextmanager
def defaulting(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def patterns(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bars in four directions with noise: [N, 2, 8, 8] and labels."""
    y = torch.randint(0, 4, (n,), generator=generator)
    i = torch.arange(8)
    shapes = torch.stack([
        (i % 3 == 0).expand(8, 8), (i % 3 == 0)[:, None].expand(8, 8),
        (i[:, None] + i) % 3 == 0, (i[:, None] - i) % 3 == 0,
    ]).float()  # fmt: skip
    return shapes[y][:, None].expand(-1, 2, -1, -1) + torch.randn(n, 2, 8, 8, generator=generator), y


def train(
    model: nn.Module, loss: iessp.StripeLoss, steps: int, gate_lr: float = 0.05
) -> list[dict[str, float]]:
    optimiser = torch.optim.AdamW(iessp.param_groups(model, 3e-3, gate_lr=gate_lr))
    generator, history = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        x, y = patterns(32, generator)
        ce = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss(ce).backward()
        optimiser.step()
        history.append(
            {
                "hard": iessp.macs_kept(network_of(model), iessp.skeletons(model)),
                "wanted": float(wanted_share(model)),
                "lambda": float(loss.lambda_now),
                "pressure": float(loss.pressure),
                "ce": ce.item(),
            }
        )
    return history


def test_penalty_is_the_weighted_share() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    assert iessp.penalty(model).item() == pytest.approx(1.0)
    found, network = iessp.gates(model), network_of(model)
    for gate in found.values():
        gate.phase = "learn"
    expected = sum(g.soft().sum().item() * g.site.stripe_macs for g in found.values()) / network.macs
    assert float(iessp.penalty(model)) == pytest.approx(expected, rel=1e-5)


def test_exact_gates_follow_the_target_and_lambda_does_not_wind_up() -> None:
    steps = 200
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.24, steps=steps)
    clock, targets = copy.deepcopy(loss), []
    for step in range(steps):
        clock.step.fill_(step)
        targets.append(clock.target())
    history = train(model, loss, steps, gate_lr=0.005)
    learning = range(round(0.1 * steps) + 1, round(0.75 * steps) - 1)
    missed = [abs(history[i]["hard"] - targets[i]) for i in learning]
    assert sum(missed) / len(missed) < 0.03, "but for what gates and target move between two cuts"
    assert max(h["pressure"] for h in history) < 10
    assert -1e-6 < 0.24 - history[-1]["hard"] < 0.002


@pytest.mark.parametrize("budget", [0.24, 0.6])
def test_controller_meets_the_target_in_time_and_does_not_wind_up(budget: float) -> None:
    steps = 300
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8), exact=False)
    loss = iessp.StripeLoss(model, budget=budget, steps=steps)
    history = train(model, loss, steps)
    by_then = history[round(0.6 * steps)]
    assert abs(by_then["hard"] - budget) < 0.03
    assert abs(by_then["wanted"] - budget) < 0.1, "the gates agree: the target is not merely forced on them"
    learning = [h["hard"] for h in history[: round(0.75 * steps)]]
    assert min(learning) > budget - 0.05, "held above the target, but for what gates move between two holds"
    assert max(h["pressure"] for h in history) < LAMBDA_RANGE[1] / 10, "lambda stays far from its bound"
    assert -1e-6 < budget - history[-1]["hard"] < 0.002, "to the cheapest stripe: 0.14 % of this network"
    assert history[-1]["ce"] < 0.7, "and the task is learned: chance is 1.39"


def controlled(model: nn.Module, **options: object) -> iessp.StripeLoss:
    loss = iessp.StripeLoss(model, budget=0.3, steps=1000, warmup=0.05, meet=0.5, settle=0.75, **options)
    for _ in range(60):
        loss(torch.tensor(0.5))
    return loss


def feed(loss: iessp.StripeLoss, task: float, steps: int) -> list[float]:
    """lambda_t over `steps` steps of a given output loss; the gates do not move."""
    found = []
    for _ in range(steps):
        loss(torch.tensor(task))
        found.append(float(loss.lambda_now))
    return found


def test_pressure_rises_while_the_share_is_above_its_target() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = controlled(model)
    pressure = feed(loss, 0.5, 300)
    assert pressure[-1] > pressure[100] > 0


def test_anti_windup_releases_the_pressure_below_the_target() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8), exact=False)
    loss = controlled(model)
    feed(loss, 0.5, 440)  # gates cannot follow: the share stays 1
    with torch.no_grad():
        for gate in iessp.gates(model).values():
            gate.bias.fill_(-5.0)
    (released,) = feed(loss, 0.5, 1)
    assert released == 0.0, f"the share is more than {BAND} below the target"
    before = float(loss.pressure)
    feed(loss, 0.5, 100)
    assert float(loss.pressure) < 0.5 * before
    assert float(loss.pressure) >= LAMBDA_RANGE[0]


def test_the_link_to_the_output_loss_is_not_integrated_away() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    calm, troubled = controlled(model), controlled(copy.deepcopy(model))
    low, high = feed(calm, 0.5, 200), feed(troubled, 3.0, 200)
    # A loss that stays high keeps the pressure low as long as it lasts, and holds the dual step meanwhile.
    assert all(b < 0.5 * a for a, b in zip(low[80:], high[80:], strict=True))
    assert float(troubled.pressure) < 0.5 * float(calm.pressure)
    # Over, the pressure comes back; and without the link there is no difference.
    assert feed(troubled, 0.5, 100)[-1] > high[-1]
    unlinked = [
        feed(controlled(copy.deepcopy(model), kappa=0.0, tolerance=9.0), ce, 50)[-1] for ce in (0.5, 3.0)
    ]
    assert unlinked[0] == unlinked[1]


def test_after_the_deadline_the_budget_wins() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = controlled(model)
    feed(loss, 3.0, 440)
    held = float(loss.pressure)
    feed(loss, 3.0, 50)
    assert float(loss.pressure) > held


def test_fixed_pressure_is_a_switch() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = controlled(model, adaptive=False, pressure=2.0, kappa=0.0)
    assert feed(loss, 0.5, 50) == [2.0] * 50


def test_decay_spares_the_dead() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8), module=False)
    loss = iessp.StripeLoss(model, budget=0.3, steps=100, warmup=0.0, weight_decay=0.1)
    gate, weight = iessp.gates(model)["3"], StripeGate.original(model[3])
    with torch.no_grad():
        gate.bias[:, 0] = -3.0
    loss(torch.zeros((), requires_grad=True)).backward()
    torch.testing.assert_close(weight.grad[:, :, 1:], 0.1 * weight.detach()[:, :, 1:])
    assert weight.grad[:, :, 0].abs().max() == 0


def test_every_parameter_gets_a_gradient_in_every_phase() -> None:
    """What DistributedDataParallel waits for."""
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.5, steps=3, warmup=0.34, meet=0.6, settle=0.67)
    for phase in ("warm", "learn", "settled"):
        assert loss.phase() == phase
        model.zero_grad()
        loss(F.cross_entropy(model(torch.randn(4, 2, 8, 8)), torch.arange(4))).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("with_gates", [False, True])
def test_gates_that_no_optimiser_moves_are_warned_of(
    with_gates: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model = toy()
    weights = list(model.parameters())
    iessp.attach(model, example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.4, steps=10)
    optimiser = torch.optim.AdamW(iessp.param_groups(model, 1e-3) if with_gates else weights)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, y = patterns(8, generator)
        optimiser.zero_grad()
        loss(F.cross_entropy(model(x), y)).backward()
        optimiser.step()
    assert ["no gate has moved" in str(w.message) for w in recwarn].count(True) == (0 if with_gates else 1)


def test_freezing_before_the_skeletons_are_settled_is_warned_of() -> None:
    model = toy()
    iessp.attach(model, example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.4, steps=10)
    train(model, loss, 4)
    with pytest.warns(UserWarning, match="the budget is not met yet"):
        iessp.freeze(model)


def test_evaluation_passes_the_loss_through() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.5, steps=3).eval()
    task = torch.tensor(1.25)
    assert loss(task) is task
    assert int(loss.step) == 0


@pytest.mark.parametrize("method", [m for m in METHODS if m != "iem"])
def test_rivals_end_on_the_same_budget(method: str) -> None:
    model = iessp.attach(toy(), method, example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.3, steps=60)
    train(model, loss, 60)
    kept = iessp.macs_kept(network_of(model), iessp.skeletons(model))
    if method == "l1-filter":  # its budget counts the channels that the next layer loses with a filter
        assert iessp.compacted_macs_kept(network_of(model), iessp.skeletons(model)) == pytest.approx(
            0.3, abs=0.03
        )
        assert kept > 0.3
    else:
        assert kept == pytest.approx(0.3, abs=0.003)


@pytest.mark.parametrize("method", ["magnitude", "filter-skeleton"])
def test_rivals_can_follow_the_falling_target(method: str) -> None:
    """Filter-skeleton by default as its authors', cut once."""
    options = {"exact": True} if method == "filter-skeleton" else {}
    model = iessp.attach(toy(), method, example_input=torch.zeros(1, 2, 8, 8), **options)
    loss = iessp.StripeLoss(model, budget=0.3, steps=60)
    meet = [round(h["hard"], 2) for h in train(model, loss, 60)][:30]
    targets = [0.3 + 0.7 * (1 + math.cos(math.pi * max(0, step - 6) / 24)) / 2 for step in range(1, 31)]
    assert meet == pytest.approx(targets, abs=0.03)


def test_a_budget_that_no_cut_can_meet_is_refused_before_any_training() -> None:
    """A depthwise 3x3 and a 1x1, which holds nearly all multiply-adds and has no gate unless asked for."""
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 64, 1))
    with pytest.raises(
        ValueError,
        match=r"1 are 1x1 \(0\.8767\), which attach\(..., pointwise=True\), iessp prune --pointwise",
    ):
        iessp.StripeLoss(iessp.attach(net), budget=0.5, steps=10)
    iessp.StripeLoss(iessp.attach(iessp.detach(net), pointwise=True), budget=0.5, steps=10)


def test_the_smallest_budget_leaves_its_stripes_alive() -> None:
    """One stripe a layer: the threshold is above all others, not above these."""
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    network = network_of(model)
    least = sum(site.stripe_macs for site in network.sites) / network.macs
    loss = iessp.StripeLoss(model, budget=least * (1 + 1e-9), steps=40, meet=0.3)
    train(model, loss, 20)
    for gate in iessp.gates(model).values():
        assert gate.gate().max() > 0.1
    train(model, loss, 20)
    assert float(loss.share_hard) == pytest.approx(least)


@pytest.mark.parametrize("order", ["model, loss", "loss, model", "model before StripeLoss is made"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_a_training_of_ones_own_goes_on_from_its_states_in_any_order(order: str, warmup: float) -> None:
    def made(model: nn.Module) -> iessp.StripeLoss:
        return iessp.StripeLoss(model, budget=0.4, steps=30, warmup=warmup)

    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = made(model)
    train(model, loss, 13)
    resumed = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    again = made(resumed) if order != "model before StripeLoss is made" else None
    if order == "loss, model":
        again.load_state_dict(loss.state_dict())
    resumed.load_state_dict(model.state_dict())
    again = again or made(resumed)
    again.load_state_dict(loss.state_dict())
    x = torch.randn(4, 2, 8, 8)
    assert torch.equal(resumed.eval()(x), model.eval()(x))
    assert train(model.train(), loss, 10) == train(resumed.train(), again, 10)


def test_a_pass_that_overflows_is_passed_over() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    for module in list(model):
        if isinstance(module, nn.BatchNorm2d):  # whose own statistics would not survive it
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    loss = iessp.StripeLoss(model, budget=0.4, steps=30, warmup=0.0)
    train(model, loss, 5)
    assert not loss(F.cross_entropy(model(torch.full((4, 2, 8, 8), torch.inf)), torch.arange(4))).isfinite()
    assert loss.output_loss.isfinite()
    history = train(model, loss, 24)
    assert history[-1]["lambda"] > 0
    assert history[-1]["hard"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("call", [torch.float64, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("construction", [torch.bfloat16, torch.float32], ids=str)
def test_the_schedule_is_in_float32_whatever_torchs_default_is(
    construction: torch.dtype, call: torch.dtype
) -> None:
    def pressures(construction: torch.dtype, call: torch.dtype) -> list[float]:
        model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
        with defaulting(construction):
            loss = iessp.StripeLoss(model, budget=0.4, steps=30)
        assert all(b.dtype in (torch.float32, torch.int64) for b in loss.buffers())
        with defaulting(call):
            return [float(loss(torch.tensor(1.0)).detach()) for _ in range(20)]

    assert pressures(construction, call) == pytest.approx(pressures(torch.float32, torch.float32))


@pytest.mark.parametrize("given", [torch.ones(8), torch.ones(1), 1.0], ids=["[8]", "[1]", "float"])
def test_the_loss_of_a_task_is_one_number(given: Any) -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.4, steps=30)
    got = re.escape(str(list(given.shape)) if isinstance(given, Tensor) else "float")
    with pytest.raises(ValueError, match=f"as one number.*got {got}"):
        loss(given)
    assert int(loss.step) == 0
    assert loss.eval()(given) is given


@pytest.mark.parametrize(
    "options", [{"budget": None}, {"budget": True}, {"steps": "10"}, {"steps": None}], ids=str
)
def test_what_is_no_number_is_shown(options: dict[str, Any]) -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=re.escape(repr(next(iter(options.values()))))):
        iessp.StripeLoss(model, **{"budget": 0.4, "steps": 30, **options})


def test_settled_skeletons_are_not_cut_again_in_silence() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    train(model, iessp.StripeLoss(model, budget=0.5, steps=4), 4)
    with pytest.raises(
        ValueError, match=r"settled by an earlier schedule: iessp\.detach\(model\) merges them"
    ):
        iessp.StripeLoss(model, budget=0.3, steps=4)(torch.tensor(1.0))
    again = iessp.attach(iessp.detach(model), example_input=torch.zeros(1, 2, 8, 8))
    train(again, iessp.StripeLoss(again, budget=0.3, steps=4), 4)
    assert iessp.macs_kept(network_of(again), iessp.skeletons(again)) == pytest.approx(0.3, abs=0.01)


def test_a_budget_of_time_is_not_for_loops_of_ones_own() -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"share as the budget, got '2.5 ms': .* attach\(..., prices="):
        iessp.StripeLoss(model, budget="2.5 ms", steps=10)  # type: ignore[arg-type]


def test_calls_beyond_the_last_step_are_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.5, steps=4)
    train(model, loss, 3)
    resumed = iessp.StripeLoss(model, budget=0.5, steps=4)
    resumed.load_state_dict(loss.state_dict())
    train(model, resumed, 1)
    resumed.eval()(torch.tensor(1.0))
    assert not [w for w in recwarn if "was to be called" in str(w.message)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # the default would show one of a line
        train(model, resumed.train(), 3)
    (surplus,) = [w for w in seen if "was to be called 4 times" in str(w.message)]
    assert surplus.filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {"warmup": 0.6, "meet": 0.5},
        {"budget": 0.0},
        {"budget": 1.5},
        {"steps": 0},
        {"steps": 2.5},
        {"settle": 0.3},
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, float]) -> None:
    model = iessp.attach(toy(), example_input=torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="need"):
        iessp.StripeLoss(model, **{"budget": 0.3, "steps": 10, **options})


def test_live_stripes_are_counted_where_the_method_has_a_penalty_of_its_own() -> None:
    torch.manual_seed(0)
    model = iessp.attach(toy(), method="filter-skeleton", alpha=0.1, example_input=torch.zeros(1, 2, 8, 8))
    loss = iessp.StripeLoss(model, budget=0.5, steps=100)
    train(model, loss, 40)
    with torch.no_grad():
        for gate in iessp.gates(model).values():
            for entries in gate.parameters():
                entries[::2] = 0.0
    live = torch.cat([gate.live().flatten() for gate in iessp.gates(model).values()])
    assert not live.all()
    x, y = patterns(32, torch.Generator().manual_seed(1))
    share = iessp.macs_kept(network_of(model), iessp.skeletons(model))
    loss(F.cross_entropy(model(x), y))
    assert float(loss.density) == pytest.approx(float(live.float().mean()))
    assert float(loss.share_hard) == pytest.approx(share)


def test_a_run_of_before_density_was_counted_goes_on() -> None:
    loss = iessp.StripeLoss(iessp.attach(toy()), budget=0.5, steps=100)
    older = {**loss.state_dict(), "step": torch.tensor(7)}
    del older["density"]
    loss.load_state_dict(older)
    assert int(loss.step) == 7
    with pytest.raises(RuntimeError, match="pressure"):
        loss.load_state_dict({name: value for name, value in older.items() if name != "pressure"})
