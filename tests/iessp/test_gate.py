"""Gates on real layers: values, gradients, statistics, and how they come off."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import iessp
import stripe_kernels
from iessp.attach import METHODS
from iessp.gate import StripeGate
from iessp.iem import IEMGate, straight_through


def small(groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, (2, 3), groups=groups),
        nn.ReLU(),
        nn.Conv2d(12, 5, 3),
    )


def attached(method: str = "iem", **options: object) -> nn.Sequential:
    return iessp.attach(small(), method, example_input=torch.zeros(1, 3, 9, 8), **options)


def learn(model: nn.Module) -> None:
    for gate in iessp.gates(model).values():
        gate.phase = "learn"


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_gate_changes_nothing_and_detaches_without_trace(method: str) -> None:
    x, plain = torch.randn(2, 3, 9, 8), small()
    model = attached(method)
    assert isinstance(model[0], nn.Conv2d)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    iessp.detach(model, merge=False)
    assert type(model[3]) is nn.Conv2d
    before, after = plain.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model[3]._forward_pre_hooks


@pytest.mark.parametrize("method", METHODS)
def test_settled_gates_mask_and_merge(method: str) -> None:
    x, model = torch.randn(2, 3, 9, 8), attached(method)
    learn(model)
    skeletons = iessp.settle(model, 0.4)
    masked = model.eval()(x)
    merged = iessp.detach(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), masked, rtol=0, atol=0)
    for name, skeleton in skeletons.items():
        weight = merged.get_submodule(name).weight
        assert torch.equal((weight != 0).any(1), skeleton), "dead stripes are exactly zero"
    assert iessp.skeletons(model).keys() == {"0", "3", "5"}


def test_straight_through_has_the_soft_gradient() -> None:
    soft = torch.tensor([0.2, 0.49, 0.51, 0.9], requires_grad=True)
    graded = straight_through(soft, soft > 0.5, hard=False)
    assert graded.tolist() == pytest.approx([0, 0, 0.51, 0.9])
    hard = straight_through(soft, soft > 0.5, hard=True)
    assert hard.tolist() == pytest.approx([0, 0, 1, 1])
    hard.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert soft.grad.tolist() == [1, 2, 3, 4]


def test_gradient_of_the_gate_is_the_task_gradient_along_the_stripe() -> None:
    """dL/db = sum_c W dL/dW' * M'(z) / tau, for live and for dead stripes alike."""
    model = attached(module=False)
    learn(model)
    conv, gate = model[5], iessp.gates(model)["5"]
    with torch.no_grad():
        gate.bias.copy_(torch.randn_like(gate.bias))
    gate.tau.fill_(0.7)
    weight = conv.weight.detach().requires_grad_(True)
    x = torch.randn(2, 12, 6, 5)
    F.conv2d(x, weight, conv.bias).square().sum().backward()
    conv(x).square().sum().backward()
    soft = torch.sigmoid(gate.bias / 0.7)
    expected = (StripeGate.original(conv) * weight.grad).sum(1) * soft * (1 - soft) / 0.7
    assert (gate.bias < 0).any()
    torch.testing.assert_close(gate.bias.grad, expected.detach())


def test_module_gradients_match_finite_differences() -> None:
    model = attached().double()
    learn(model)
    gate = iessp.gates(model)["3"]
    model.train()(torch.randn(4, 3, 9, 8, dtype=torch.float64))
    parameters = dict(gate.named_parameters())

    def soft(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Soft(gate), {f"gate.{n}": v for n, v in zip(parameters, values, strict=True)}, ()
        )

    assert torch.autograd.gradcheck(
        soft, tuple(p.detach().clone().requires_grad_(True) for p in parameters.values())
    )


class _Soft(nn.Module):
    def __init__(self, gate: IEMGate):
        super().__init__()
        self.gate = gate

    def forward(self) -> Tensor:
        return self.gate.soft()


@pytest.mark.parametrize("groups", [1, 4])
def test_information_is_weight_times_standard_deviation(groups: int) -> None:
    model = iessp.attach(small(groups), example_input=torch.zeros(1, 3, 9, 8), momentum=1.0)
    conv, gate = model[3], iessp.gates(model)["3"]
    seen: list[Tensor] = []
    conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()(torch.randn(6, 3, 9, 8))
    q = seen[0].double().var((0, 2, 3), correction=0)
    weight = StripeGate.original(conv).detach().double()
    per_group = q.view(groups, -1).repeat_interleave(len(weight) // groups, 0)  # [K, C/g]
    e = torch.sqrt((weight.square() * per_group[:, :, None, None]).sum(1)).flatten(1)
    e = e / e.square().mean().sqrt()
    torch.testing.assert_close(gate.features[:, :6].double(), e, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate.features[:, 6:], torch.ones(12, 6))


def test_pruning_upstream_lowers_what_reads_it() -> None:
    model = attached(momentum=1.0)
    learn(model)
    first, second = iessp.gates(model)["0"], iessp.gates(model)["3"]
    with torch.no_grad():
        model[1].bias.add_(1.0)  # a dead channel still says relu(beta) = 1, a constant
        first.bias[:4] = -10.0
    model.train()(torch.randn(6, 3, 9, 8))
    assert first.live().flatten(1).any(1).tolist() == [False] * 4 + [True] * 4
    assert second.variance()[:4].max() < 1e-8 < second.variance()[4:].min()
    weight = StripeGate.original(model[3]).detach().square().flatten(2)
    torch.testing.assert_close(second.features[:, 6:], weight[:, 4:].sum(1) / weight.sum(1))


def test_messages_arrive_from_the_layer_before() -> None:
    model = attached()
    learn(model)
    x = torch.randn(4, 3, 9, 8)
    model.train()(x)
    found = iessp.gates(model)
    assert torch.equal(found["5"].inbox, found["3"].outbox)
    assert found["3"].outbox.abs().sum() > 0
    before = found["5"].logits()
    found["5"].inbox.add_(1.0)
    assert not torch.equal(before, found["5"].logits())


def test_a_dead_stripe_returns_when_the_task_wants_it() -> None:
    torch.manual_seed(1)
    model = iessp.attach(nn.Sequential(nn.Conv2d(2, 3, 3)), example_input=torch.zeros(1, 2, 6, 6))
    learn(model)
    gate = iessp.gates(model)["0"]
    x = torch.randn(16, 2, 6, 6)
    with torch.no_grad():
        wanted = F.conv2d(x, StripeGate.original(model[0]), model[0].bias)
        gate.bias.fill_(-0.5)
        gate.gain.zero_()
    assert gate.live().sum() == 1, "the best one stays"
    optimiser = torch.optim.Adam(gate.parameters(), 0.05)
    for _ in range(60):
        optimiser.zero_grad()
        F.mse_loss(model(x), wanted).backward()
        optimiser.step()
    assert gate.live().float().mean() > 0.5


def test_through_information_is_a_switch() -> None:
    """The gate's gradient reaches W: with it, W's gradient has a second part beside g * dL/dW'."""
    x, gradients = torch.randn(2, 3, 9, 8), []
    for through in (False, True):
        model = attached(through_information=through)
        learn(model)
        torch.manual_seed(3)
        model.train()(x).square().sum().backward()
        gradients.append(StripeGate.original(model[5]).grad)
    assert not torch.allclose(*gradients)


def test_the_target_holds_on_to_stripes_the_gate_would_drop() -> None:
    model = attached(module=False, exact=False)
    learn(model)
    gate = iessp.gates(model)["5"]
    with torch.no_grad():
        gate.bias.copy_(torch.linspace(-4, -1, gate.bias.numel()).view_as(gate.bias))
    assert gate.wanted().sum() == gate.live().sum() == 1
    gate.keep_above(-2.0)
    assert gate.wanted().sum() == 1
    assert torch.equal(gate.live(), gate.bias > -2.0)
    gate.keep_above(1.0)
    assert gate.theta == 0, "it never drops a stripe that the gate would keep"


def test_exact_gates_are_cut_where_the_budget_says() -> None:
    model = attached(module=False, exact=True)
    learn(model)
    gate = iessp.gates(model)["5"]
    with torch.no_grad():
        gate.bias.copy_(torch.linspace(1, 4, gate.bias.numel()).view_as(gate.bias))
    gate.keep_above(2.5)
    assert torch.equal(gate.live(), gate.bias >= 2.5)
    assert torch.equal(gate.live(), gate.wanted())
    assert torch.equal(gate.live(), gate.soft() >= 0.5)


@pytest.mark.parametrize("switch", ["module", "message", "aliveness", "statistic", "centre", "hard", "exact"])
def test_every_part_is_a_switch(switch: str) -> None:
    model = attached(**{switch: not IEMGate.options[switch]})
    learn(model)
    model.train()(torch.randn(2, 3, 9, 8)).sum().backward()
    for gate in iessp.gates(model).values():
        assert gate.bias.grad is not None
        assert torch.isfinite(gate.soft()).all()
    if switch == "module":
        assert len(list(iessp.gate_parameters(model))) == 3, "free gates alone"


def test_state_dict_and_deepcopy_carry_phase_and_statistics() -> None:
    model = attached()
    learn(model)
    x = torch.randn(4, 3, 9, 8)
    model.train()(x)
    other = attached()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))
    twin = copy.deepcopy(model)
    assert iessp.gates(twin)["3"].upstream[0] is iessp.gates(twin)["0"], "a copy listens to its own layers"
    twin.train()(x + 1)
    assert not torch.equal(iessp.gates(twin)["0"].moments, iessp.gates(model)["0"].moments)


def test_statistics_stand_still_in_evaluation() -> None:
    model = attached().eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    model(torch.randn(2, 3, 9, 8))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_wrong_use_names_the_nearest_choice() -> None:
    with pytest.raises(ValueError, match='unknown method "iam": did you mean "iem"'):
        iessp.attach(small(), "iam")
    with pytest.raises(ValueError, match='unknown option of iem "gian": did you mean "gain"'):
        iessp.attach(small(), gian=2.0)
    with pytest.raises(ValueError, match='unknown convolution "33": did you mean "3"'):
        iessp.attach(small(), exclude=["33"])
    with pytest.raises(ValueError, match="has gates already"):
        iessp.attach(attached())
    with pytest.raises(ValueError, match=r"call iessp\.attach"):
        iessp.skeletons(small())
    with pytest.raises(ValueError, match=r"no convolution to gate.*pointwise=True gates its 1 1x1 conv"):
        iessp.attach(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match=r"skeleton is torch\.bool \(8, 3, 2\), needs bool \(8, 3, 3\)"):
        iessp.gates(attached())["0"].settle(torch.ones(8, 3, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "False"}, "option module of iem takes bool, got 'False'"),
        ({"exact": 0}, "option exact of iem takes bool, got 0"),
        ({"gain": True}, "option gain of iem takes float, got True"),
        ({"method": "random", "seed": 0.5}, "option seed of random takes int, got 0.5"),
        ({"prices": {"4": 1.0}}, 'unknown convolution "4"'),
    ],
)
def test_options_have_their_types(options: dict[str, object], message: str) -> None:
    """The text "False" is true: it would train what it was to leave out."""
    with pytest.raises(ValueError, match=message):
        iessp.attach(small(), **options)
    assert not iessp.gates(iessp.attach(small(), exclude="3", gain=2)).keys() & {"3"}


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def tied(conv: nn.Conv2d) -> nn.Module:
    twin = nn.Conv2d(8, 8, 3)
    twin.weight = conv.weight
    return nn.Sequential(conv, twin)


def masked(conv: nn.Conv2d) -> nn.Module:
    return torch.nn.utils.prune.random_unstructured(conv, "weight", 0.5)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "computed from others"),
        (lambda: masked(nn.Conv2d(8, 8, 3)), "computed from others"),
        (lambda: Standardised(8, 8, 3), "Standardised computes something else than nn.Conv2d"),
        (lambda: tied(nn.Conv2d(8, 8, 3)), "another module has the same weight"),
    ],
)
def test_convolutions_that_cannot_have_a_gate_are_named_before_any_has_one(
    last: Callable[[], nn.Module], message: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), last())
    with pytest.raises(ValueError, match=f'^"1.*" cannot have a gate; exclude it, or: .*{message}'):
        iessp.attach(model)
    assert type(model[0]) is nn.Conv2d
    rest = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name != "0"]
    assert iessp.gates(iessp.attach(model, exclude=rest)).keys() == {"0"}


def test_a_model_that_the_stand_in_image_does_not_fit_asks_for_an_example() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    with pytest.raises(
        ValueError, match=r"not take the image \[1, 3, 32, 32\] that stands in for example_input: mat1"
    ):
        iessp.attach(model)
    assert iessp.gates(iessp.attach(model, example_input=(torch.zeros(1, 3, 8, 8),))).keys() == {"0"}


@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 8, 8)], ids=["no example", "example"])
def test_a_frozen_network_has_nothing_to_gate_and_says_so(example: Tensor | None) -> None:
    frozen = stripe_kernels.freeze(
        nn.Sequential(nn.Conv2d(3, 4, 3)), {"0": torch.ones(4, 3, 3).triu().bool()}
    )
    with pytest.raises(ValueError, match=r"no nn\.Conv2d: its stripes are frozen, stripe_kernels\.to_dense"):
        iessp.attach(frozen, example_input=example)
    assert iessp.gates(iessp.attach(stripe_kernels.to_dense(frozen), example_input=example))


def test_pointwise_and_excluded_convolutions() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3))

    assert iessp.gates(iessp.attach(net())).keys() == {"0", "2"}
    assert iessp.gates(iessp.attach(net(), pointwise=True, exclude=["0"])).keys() == {"1", "2"}


def test_torch_compile_sees_the_whole_gate() -> None:
    model = attached()
    learn(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 9, 8)
    expected = copy.deepcopy(model).train()(x)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert iessp.gates(compiled)["3"].bias.grad is not None


def test_gradients_accumulate_over_passes() -> None:
    """Two passes before one backward: statistics are written in between, the first pass keeps what it saw."""
    model = attached(momentum=1.0)
    learn(model)
    first, second = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    (model.train()(first).sum() + model(second).sum()).backward()
    together = [p.grad.clone() for p in iessp.gate_parameters(model) if p.grad is not None]
    model.zero_grad()
    for x in (first, second):
        model(x).sum().backward()
    apart = [p.grad for p in iessp.gate_parameters(model) if p.grad is not None]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
