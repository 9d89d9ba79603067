"""freeze takes what other pruning tools leave: masks, skeletons, zeros, thinner layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import iessp
from stripe_kernels import StripeConv2d, freeze, plain_state


class Net(nn.Module):
    """Two 3x3 convolutions, the second strided; a grouped one; a linear layer."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.a = conv(3, 8, 3, 1, 1, bias=False)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, 3, 2, 1, bias=False))
        self.c = nn.Conv2d(12, 12, 3, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.body(self.a(x))).mean((2, 3)))


def mask(weight: Tensor, density: float = 0.4) -> Tensor:
    k, _, r, s = weight.shape
    return (torch.rand(k, 1, r, s) < density).expand_as(weight)


def skeletons(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.skeleton for name, m in model.named_modules() if isinstance(m, StripeConv2d)}


def assert_same(model: nn.Module, frozen: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(frozen.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def zeroed(model: nn.Module) -> dict[str, Tensor]:
    """Zeros in every convolution; what lives, by name."""
    live = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            chosen = mask(module.weight)
            module.weight.data *= chosen
            live[name] = chosen[:, 0]
    return live


def test_a_checkpoint_of_torch_prune() -> None:
    model = Net()
    live = {}
    for name in ("a", "body.2"):
        conv = model.get_submodule(name)
        chosen = mask(conv.weight)
        prune.custom_from_mask(conv, "weight", chosen)
        live[name] = chosen[:, 0]
    prune.l1_unstructured(model.head, "weight", 0.5)
    plain = Net()
    plain.load_state_dict(plain_state(model.state_dict()))
    assert_same(model, freeze(plain))
    assert_same(model, freeze(model))
    for frozen in (freeze(plain), freeze(model)):
        found = skeletons(frozen)
        assert found.keys() == live.keys()
        assert all(torch.equal(found[name], live[name]) for name in live)


class FilterStripe(nn.Conv2d):
    """A convolution as Pruning Filter in Filter has it: its mask I is a parameter, and it can be broken up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.FilterSkeleton = nn.Parameter(torch.ones(self.out_channels, *self.kernel_size))
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.broken:
            return F.conv2d(x, self.weight * self.FilterSkeleton[:, None], None, self.stride, self.padding)
        k, r, s = self.FilterSkeleton.shape
        maps = F.conv2d(x, self.weight)
        out = x.new_zeros(x.shape[0], k, *x.shape[2:])
        first = 0
        for i in range(r):
            for j in range(s):
                live = self.FilterSkeleton[:, i, j]
                part = maps[:, first : first + int(live.sum())]
                moved = F.pad(part, (s // 2, s // 2, r // 2, r // 2))[
                    :, :, i : i + x.shape[2], j : j + x.shape[3]
                ]
                out[:, live] += moved
                first += int(live.sum())
        return out[:, :, :: self.stride[0], :: self.stride[1]]

    def break_up(self) -> None:
        """1x1 convolution of the live stripes, tap by tap."""
        live = self.FilterSkeleton.data != 0
        whole = (self.weight * self.FilterSkeleton[:, None]).permute(2, 3, 0, 1)
        self.weight = nn.Parameter(whole[live.permute(1, 2, 0)][:, :, None, None])
        self.FilterSkeleton = nn.Parameter(live, requires_grad=False)
        self.broken = True


@pytest.mark.parametrize("broken", [False, True])
def test_pruning_filter_in_filter(broken: bool) -> None:
    """Its repository is no package: this has the form of its state_dict, and its forward written anew."""
    model = Net(FilterStripe)
    live = {}
    for name in ("a", "body.2"):
        conv = model.get_submodule(name)
        values = torch.randn(conv.FilterSkeleton.shape)
        conv.FilterSkeleton.data = torch.where(values.abs() > 0.8, values, 0)
        live[name] = conv.FilterSkeleton.data != 0
        if broken:
            conv.break_up()
    plain = Net()
    plain.load_state_dict(plain_state(model.state_dict()))
    for frozen in (freeze(plain), freeze(model)):
        assert_same(model, frozen)
        found = skeletons(frozen)
        assert found.keys() == live.keys()
        assert all(torch.equal(found[name], live[name]) for name in live)


def test_a_threshold_ends_the_training_of_filter_skeletons() -> None:
    state = {
        "weight": torch.ones(2, 3, 1, 2),
        "FilterSkeleton": torch.tensor([[[0.3, -0.04]], [[0.05, -2.0]]]),
    }
    weight = plain_state(state, threshold=0.05)["weight"]
    assert torch.equal(weight[:, 0, 0], torch.tensor([[0.3, 0.0], [0.0, -2.0]]))


def test_a_layer_that_only_looks_like_one_of_theirs_is_left_alone() -> None:
    class Doubled(FilterStripe):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Net(Doubled)
    model.a.FilterSkeleton.data[:, 0] = 0
    frozen = freeze(model)
    assert type(frozen.a) is Doubled
    assert_same(model, frozen)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_plain_zeros_and_their_checkpoints(prefix: str) -> None:
    """What SparseML wrote, and NNCF writes once stripped: ordinary weights, many of them zero."""
    model = Net()
    live = zeroed(model)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    plain = Net()
    plain.load_state_dict(plain_state(state))
    frozen = freeze(plain)
    assert all(torch.equal(s, live[name]) for name, s in skeletons(frozen).items())
    assert skeletons(frozen).keys() == live.keys()
    assert_same(model, frozen)


def test_gates_of_ours() -> None:
    """Settled, they are a weight; learning, what they keep is not in their state."""
    model = iessp.attach(Net())
    with pytest.raises(ValueError, match=r"parametrizations.weight.0 is a gate that still learns"):
        plain_state(model.state_dict())
    iessp.settle(model, 0.5)
    plain = Net()
    plain.load_state_dict(
        plain_state({f"module.{name}": value for name, value in model.state_dict().items()})
    )
    masked = iessp.detach(copy.deepcopy(model)).state_dict()
    assert all(torch.equal(value, masked[name]) for name, value in plain.state_dict().items())
    alone = iessp.attach(nn.Sequential(nn.Conv2d(2, 3, 3)))
    iessp.settle(alone, 0.5)
    assert plain_state(alone[0].state_dict()).keys() == {"weight", "bias"}
    nn.utils.parametrize.register_parametrization(alone[0], "weight", nn.PReLU())
    with pytest.raises(ValueError, match=r"weight\.1\.weight belongs to a parametrization beside the gate"):
        plain_state(alone.state_dict())
    prefix = "a.parametrizations.weight."
    foreign = {f"{prefix}original": torch.ones(2), f"{prefix}0._extra_state": torch.ones(2)}
    assert plain_state(foreign).keys() == foreign.keys()


def test_masks_that_do_not_fit_are_refused() -> None:
    weight, wrong = torch.ones(4, 2, 3, 3), torch.ones(4, 3, 2)
    with pytest.raises(ValueError, match=r"a.weight_mask is \[4, 3, 2\] but its weight is \[4, 2, 3, 3\]"):
        plain_state({"a.weight_orig": weight, "a.weight_mask": wrong})
    with pytest.raises(ValueError, match=r"\[4, 2, 3, 3\], not \[K, C, R, S\] = \[4, C, 3, 2\]"):
        plain_state({"a.weight": weight, "a.FilterSkeleton": wrong})
    with pytest.raises(ValueError, match=r"belongs to a.weight, which"):
        plain_state({"a.FilterSkeleton": wrong})


def test_torch_pruning() -> None:
    """It makes layers thinner, which freeze leaves as they are; stripes can go on top."""
    tp = pytest.importorskip("torch_pruning")
    model, x = Net(), torch.randn(1, 3, 9, 7)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.head])
    pruner.step()
    assert model.a.out_channels == 4
    assert not skeletons(freeze(model))
    live = zeroed(model)
    assert skeletons(freeze(model)).keys() == live.keys()
    assert_same(model, freeze(model))


def test_nncf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNCF_CI", "1")  # no telemetry
    nncf = pytest.importorskip("nncf")
    model = Net()
    for name in ("a", "body.2"):  # whole stripes below every other weight, so that NNCF finds them
        weight = model.get_submodule(name).weight
        weight.data *= torch.where(mask(weight), 1.0, 1e-6)
    masked = nncf.prune(
        copy.deepcopy(model), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=0.5,
        examples_inputs=torch.randn(1, 3, 9, 7),
    )  # fmt: skip
    plain = Net()
    plain.load_state_dict(plain_state(masked.state_dict()))
    frozen = freeze(plain)
    assert {"a", "body.2"} <= skeletons(frozen).keys()
    assert_same(masked, frozen)
    assert_same(masked, freeze(masked))  # its hooks stay, so it computes the same, without stripes
