"""freeze: which convolutions change, that outputs do not, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from stripe_kernels import StripeConv2d, freeze, save
from stripe_kernels.compile import to_dense


class Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask[:, None]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 6, (3, 2), stride=(2, 1), bias=False)),
        nn.Conv2d(6, 4, 1),
    ).eval()


def skeleton(conv: nn.Conv2d, density: float = 0.4) -> Tensor:
    return torch.rand(conv.out_channels, *conv.kernel_size) < density


def masked(model: nn.Module, skeletons: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, live in skeletons.items():
        model.get_submodule(name).weight.data.mul_(live[:, None])
    return model


def same(model: nn.Module, frozen: nn.Module, size: tuple[int, ...] = (2, 3, 9, 7)) -> None:
    x = torch.randn(size)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(frozen(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_named_skeletons_change_only_the_convolutions_named() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    chosen = {"0": skeleton(model[0]), "2.1": skeleton(model[2][1])}
    frozen = freeze(model, chosen)
    assert [type(m).__name__ for m in (frozen[0], frozen[2][1], frozen[3])] == [
        "StripeConv2d",
        "StripeConv2d",
        "Conv2d",
    ]
    assert torch.equal(frozen[0].skeleton, chosen["0"])
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in frozen.parameters()}
    same(masked(model, chosen), frozen)


def test_zeros_decide_without_skeletons() -> None:
    model = net()
    live = skeleton(model[0])
    live[2] = False
    frozen = freeze(masked(model, {"0": live}))
    assert torch.equal(frozen[0].skeleton, live)
    assert type(frozen[3]) is nn.Conv2d
    same(masked(model, {"0": live}), frozen)


def test_a_network_without_dead_stripes_is_told_so() -> None:
    model = net()
    with pytest.warns(UserWarning, match="stays dense. Prune stripes first") as told:
        frozen = freeze(model)
    assert told[0].filename == __file__
    same(model, frozen)
    live = torch.ones(8, 3, 3, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(model, {"0": live})  # dense on purpose
        live[2] = False
        freeze(freeze(model, {"0": live}))


def test_prune_hooks_and_parametrizations_are_baked() -> None:
    model = net()
    live = skeleton(model[0])
    prune.custom_from_mask(model[0], "weight", live[:, None].expand_as(model[0].weight))
    other = skeleton(model[2][1])
    parametrize.register_parametrization(model[2][1], "weight", Mask(other))
    model(torch.randn(1, 3, 8, 8))  # the pruned weight now has a history
    frozen = freeze(model)
    assert torch.equal(frozen[0].skeleton, live)
    assert torch.equal(frozen[2][1].skeleton, other)
    assert prune.is_pruned(model)
    assert not prune.is_pruned(frozen)
    assert not any(parametrize.is_parametrized(m) for m in frozen.modules())
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))


def test_a_skeleton_for_a_parametrized_convolution() -> None:
    model = net()
    parametrize.register_parametrization(model[0], "weight", Mask(torch.ones(8, 3, 3) * 2))
    live = skeleton(model[0])
    frozen = freeze(model, {"0": live})
    torch.testing.assert_close(frozen[0].dense_weight(), model[0].weight * live[:, None])


def test_weight_norm_is_baked() -> None:
    model = net()
    model[3] = nn.utils.parametrizations.weight_norm(model[3])
    same(model, freeze(model, {"0": torch.ones(8, 3, 3) > 0}))


def test_shared_modules_stay_shared() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.ReLU(), conv)})
    live = skeleton(conv)
    frozen = freeze(model, {"b.2": live})
    assert isinstance(frozen["a"], StripeConv2d)
    assert frozen["a"] is frozen["b"][0] is frozen["b"][2]
    with pytest.raises(ValueError, match="shared"):
        freeze(model, {"a": live, "b.0": ~live})


def test_shared_weights_stay_shared() -> None:
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.weight = a.weight
    live = skeleton(a)
    frozen = freeze(nn.Sequential(a, b), {"0": live, "1": live})
    assert frozen[0].weight is frozen[1].weight


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_is_that_of_evaluation(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The model may be in training mode, where a look at the weight changes it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 6, 7)
    model(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    frozen = freeze(model, {"0": torch.ones(8, 3, 3, dtype=torch.bool)})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(frozen.eval()(x), model.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.Sequential(torch.compile(m))])
def test_wrappers_come_off(wrap: object) -> None:
    model = net()
    live = skeleton(model[0])
    wrapped = wrap(model)  # type: ignore[operator]
    name = next(n for n, m in wrapped.named_modules() if m is model[0])
    frozen = freeze(wrapped, {name: live})
    assert not any(type(m).__name__ in ("DataParallel", "OptimizedModule") for m in frozen.modules())
    assert sum(isinstance(m, StripeConv2d) for m in frozen.modules()) == 1
    same(masked(model, {"0": live}), frozen)


class Inner(nn.Module):
    """A submodule by the name that wrappers give to theirs, beside one of the same name outside."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.conv = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)}), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.module["conv"](x))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, AveragedModel, torch.compile])
@pytest.mark.parametrize("name", ["module.conv", "conv"])
def test_a_submodule_called_module_is_no_wrapper(wrap: object, name: str) -> None:
    model = Inner()
    wrapped = wrap(model)  # type: ignore[operator]
    live = skeleton(model.get_submodule(name))  # type: ignore[arg-type]
    prefix = next(iter(wrapped.named_parameters()))[0].removesuffix("module.conv.weight")
    frozen = freeze(wrapped, {prefix + name: live})
    assert [n for n, m in frozen.named_modules() if isinstance(m, StripeConv2d)] == [name]
    same(masked(model, {name: live}), frozen)


def test_distributed_data_parallel_comes_off(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        frozen = freeze(nn.parallel.DistributedDataParallel(model), {"module.0": skeleton(model[0])})
    finally:
        dist.destroy_process_group()
    assert isinstance(frozen, nn.Sequential)
    assert isinstance(frozen[0], StripeConv2d)


def test_a_network_built_with_numpys_integers(tmp_path: Path) -> None:
    two = np.int64(2)
    settings = {"stride": two, "padding": (two, two), "dilation": two, "groups": two}
    model = nn.Sequential(nn.Conv2d(np.int64(4), np.int32(6), (np.int64(3), two), **settings))
    live = skeleton(model[0])
    frozen = freeze(model, {"0": live})
    same(masked(model, {"0": live}), frozen, (2, 4, 9, 7))
    save(frozen, tmp_path / "net")


def test_refusals_name_the_reason() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"no module '0\.1'.*2\.1"):
        freeze(model, {"0.1": skeleton(model[0])})
    with pytest.raises(TypeError, match="BatchNorm2d"):
        freeze(model, {"1": skeleton(model[0])})
    with pytest.raises(ValueError, match=r"\[8, 2, 3\].*\[8, 3, 3\]"):
        freeze(model, {"0": torch.ones(8, 2, 3, dtype=torch.bool)})
    with pytest.raises(TypeError, match="bool"):
        freeze(model, {"0": torch.ones(8, 3, 3)})
    with pytest.raises(TypeError, match="TorchScript"):
        freeze(torch.jit.trace(model, torch.randn(1, 3, 8, 8)))
    with pytest.raises(ValueError, match="lazy"):
        freeze(nn.Sequential(nn.LazyConv2d(4, 3)))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        freeze("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must map names .* got list"):
        freeze(model, [skeleton(model[0])])  # type: ignore[arg-type]


def test_a_frozen_model_trains_even_when_frozen_in_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
        live = skeleton(model[0])
        frozen = freeze(model, {"0": live})
        y = frozen(torch.ones(1, 3, 8, 8))
    assert y.is_inference()
    frozen(torch.ones(1, 3, 8, 8)).sum().backward()
    assert frozen[0].weight.grad is not None


def test_hooks_of_the_caller_go_on_observing() -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda m, args, y: seen.append(type(m)))
    frozen = freeze(model, {"0": skeleton(model[0])})
    frozen(torch.randn(1, 3, 8, 8))
    assert seen == [StripeConv2d]


def test_to_dense_gives_back_plain_torch() -> None:
    model = net()
    chosen = {"0": skeleton(model[0]), "2.1": skeleton(model[2][1])}
    back = to_dense(freeze(model, chosen))
    expected = masked(model, chosen).state_dict()
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(v, expected[k]) for k, v in back.state_dict().items())


def test_freezing_again_takes_more_stripes_away() -> None:
    model = net()
    live = skeleton(model[0], 0.7)
    fewer = live & skeleton(model[0], 0.5)
    once = freeze(model, {"0": live})
    again = freeze(once, {"0": fewer})
    assert torch.equal(again[0].skeleton, fewer)
    assert torch.equal(again[0].dense_weight(), masked(model, {"0": fewer})[0].weight)


def test_convolutions_of_other_dtypes_stay() -> None:
    model = nn.Sequential(*(pruned_conv(dtype) for dtype in (torch.complex64, torch.float32)))
    kinds = [type(layer) for layer in freeze(model)]
    assert kinds == [nn.Conv2d, StripeConv2d]


def pruned_conv(dtype: torch.dtype) -> nn.Conv2d:
    conv = nn.Conv2d(2, 3, 3, dtype=dtype)
    with torch.no_grad():
        conv.weight[:, :, 0] = 0
    return conv
