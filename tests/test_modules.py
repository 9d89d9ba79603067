"""StripeConv2d is nn.Conv2d with fewer stripes: its whole signature, its state, its manners."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stripe_kernels import FilterSkeleton, StripeConv2d, stripe_conv2d
from stripe_kernels.testing import CASES, live_stripes

C, K = 6, 8


def pruned(conv: nn.Conv2d, density: float = 0.5, seed: int = 0) -> nn.Conv2d:
    """The same layer with some stripes zero."""
    k, _, r, s = conv.weight.shape
    live = torch.from_numpy(live_stripes("random", (k, r, s), density, seed).live.copy())
    with torch.no_grad():
        conv.weight.mul_(live[:, None])
    return conv


SIGNATURES = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (2, 5), "padding": "same", "dilation": (3, 2)},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 1, "stride": 3, "bias": False},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "replicate", "stride": 2},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "dilation": 2},
    {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 0, "padding_mode": "circular"},
    {"kernel_size": [3, 3], "stride": [1, 2], "padding": [1, 1], "dilation": [1, 1]},
]
signatures = pytest.mark.parametrize(
    "signature", SIGNATURES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items())
)


@signatures
def test_it_computes_what_conv2d_computes(signature) -> None:
    conv = pruned(nn.Conv2d(C, K, **signature))
    layer = StripeConv2d.from_conv2d(conv)
    for x in (torch.randn(3, C, 11, 9), torch.randn(C, 11, 9), torch.randn(0, C, 11, 9)):
        x.requires_grad_()
        actual, expected = layer(x), conv(x)
        torch.testing.assert_close(actual, expected)
        dy = torch.randn_like(expected)
        dx, *_ = torch.autograd.grad(actual, (x, *layer.parameters()), dy)
        torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0])


@signatures
def test_it_is_built_by_conv2ds_signature_and_shows_it(signature) -> None:
    conv = nn.Conv2d(C, K, **signature)
    size = conv.weight.shape
    layer = StripeConv2d(C, K, **signature, skeleton=torch.ones(size[0], *size[2:], dtype=torch.bool))
    assert layer.weight.shape == (size[0] * size[2] * size[3], size[1])
    with torch.no_grad():
        layer.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(0, 2))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
    x = torch.randn(2, C, 11, 9)
    torch.testing.assert_close(layer(x), conv(x))
    for part in repr(conv)[len("Conv2d(") : -1].split(", "):
        if part.startswith(("bias", "groups", "padding_mode")):
            assert part in repr(layer)


@signatures
def test_to_conv2d_and_back_is_lossless(signature) -> None:
    conv = pruned(nn.Conv2d(C, K, **signature)).eval()
    layer = StripeConv2d.from_conv2d(conv)
    back = layer.to_conv2d()
    assert torch.equal(back.weight, conv.weight)
    assert (conv.bias is None and back.bias is None) or torch.equal(back.bias, conv.bias)
    assert repr(back) == repr(conv)
    assert not back.training
    again = StripeConv2d.from_conv2d(back)
    assert torch.equal(again.weight, layer.weight)
    assert again.filter_skeleton == layer.filter_skeleton


def test_the_weight_gradient_is_conv2ds_at_the_live_stripes() -> None:
    conv = pruned(nn.Conv2d(C, K, 3, padding=1))
    layer = StripeConv2d.from_conv2d(conv)
    x = torch.randn(2, C, 7, 5)
    dy = torch.randn_like(conv(x))
    (ours,), (theirs,) = (torch.autograd.grad(m(x), [m.weight], dy) for m in (layer, conv))
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1)[layer.skeleton])


def test_stripes_that_are_entirely_zero_are_dead() -> None:
    conv = pruned(nn.Conv2d(C, K, 3))
    layer = StripeConv2d.from_conv2d(conv)
    assert torch.equal(layer.skeleton, (conv.weight != 0).any(1))
    assert layer.density == layer.skeleton.double().mean().item()
    assert layer.weight.shape == (layer.skeleton.sum(), C)


def test_a_given_skeleton_decides_whatever_the_values() -> None:
    conv = nn.Conv2d(C, K, 3)
    live = torch.rand(K, 3, 3) < 0.4
    with torch.no_grad():
        conv.weight[0] = 0
        conv.weight.permute(0, 2, 3, 1)[~live] = torch.nan
    layer = StripeConv2d.from_conv2d(conv, live)
    assert torch.equal(layer.skeleton, live)
    assert layer(torch.randn(1, C, 5, 5)).isfinite().all()
    assert torch.equal(StripeConv2d.from_conv2d(conv, FilterSkeleton(live.numpy())).weight, layer.weight)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_stays_frozen_both_ways(frozen: str) -> None:
    conv = nn.Conv2d(C, K, 3)
    conv.get_parameter(frozen).requires_grad_(False)
    layer = StripeConv2d.from_conv2d(conv)
    for twin in (layer, layer.to_conv2d()):
        assert [n for n, p in twin.named_parameters() if not p.requires_grad] == [frozen]


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
def test_the_kernel_may_be_assigned(kernel: str) -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3)))
    x = torch.randn(1, C, 6, 6)
    expected = layer(x)
    layer.kernel = kernel
    assert layer.kernel == kernel
    torch.testing.assert_close(layer(x), expected)


ASSIGNED = {
    "stride": {"stride": 2},
    "padding": {"padding": (0, 1)},
    "same padding": {"padding": "same"},
    "dilation": {"dilation": (2, 1)},
    "groups": {"groups": 2},
    "padding mode": {"padding_mode": "reflect"},
}


@pytest.mark.parametrize("what", ASSIGNED)
@pytest.mark.parametrize("way", ["called", "compiled"])
def test_a_setting_may_be_assigned(what: str, way: str) -> None:
    """As nn.Conv2d's, which are read at each call."""
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, C, 3, padding=1)))
    call, x = layer, torch.randn(2, C, 7, 7)
    if way == "compiled":
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):  # the third is short
            call(x)
        for name, value in ASSIGNED[what].items():
            setattr(layer, name, value)
        if what == "groups":
            layer.weight = nn.Parameter(layer.weight[:, :3].clone())
        expected = StripeConv2d.from_conv2d(layer.to_conv2d())
        assert repr(expected) == repr(layer)
        for _ in range(3):
            torch.testing.assert_close(call(x), expected(x))
        torch.testing.assert_close(call(x), layer.to_conv2d()(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e5m2])
def test_a_dtype_that_no_kernel_takes_is_refused_at_once(dtype: torch.dtype) -> None:
    taken = r"torch.float32, torch.float64, torch.bfloat16, torch.float16, got "
    with pytest.raises(TypeError, match=f"dtype must be one of {taken}{dtype}"):
        StripeConv2d(C, K, 3, skeleton=torch.ones(K, 3, 3, dtype=torch.bool), dtype=dtype)


def test_a_setting_that_is_refused_changes_nothing() -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3, padding="same")))
    x, before = torch.randn(1, C, 6, 6), repr(layer)
    expected = layer(x)
    wrong = {"stride": 2, "padding": -1, "dilation": 0, "groups": 5, "padding_mode": "mirror"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name if name != "stride" else "strided"):
            setattr(layer, name, value)
    assert repr(layer) == before
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("mode", ["contiguous", "channels_last"])
def test_the_output_follows_the_inputs_memory_format(mode: str) -> None:
    memory_format = torch.channels_last if mode == "channels_last" else torch.contiguous_format
    conv = pruned(nn.Conv2d(C, K, 3, padding=1))
    layer = StripeConv2d.from_conv2d(conv)
    x = torch.randn(2, C, 7, 5).contiguous(memory_format=memory_format)
    assert layer(x).stride() == conv(x).stride()
    layer = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    conv = pruned(nn.Conv2d(C, K, 3, dtype=dtype))
    layer = StripeConv2d.from_conv2d(conv)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    x = torch.randn(1, C, 6, 6).to(dtype)
    tolerance = 1e-5 if dtype.itemsize > 2 else 2e-2
    torch.testing.assert_close(layer(x), conv(x), atol=tolerance, rtol=tolerance)
    moved = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3))).to(dtype)
    assert moved(x).dtype == dtype
    assert moved.skeleton.dtype == torch.bool


def copies(layer: StripeConv2d) -> dict[str, StripeConv2d]:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
    }


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(way: str) -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3, padding="same", padding_mode="reflect")))
    layer.kernel = "reference"
    x = torch.randn(1, C, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        twin = copies(layer)[way]
        assert twin.kernel == "reference"
        assert torch.equal(twin(x), expected)
        twin.weight.zero_()
        twin.bias.zero_()
        assert twin(x).count_nonzero() == 0
        assert torch.equal(layer(x), expected)


def test_a_layer_pickled_when_kernel_was_a_property() -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3)))
    layer.kernel = "reference"
    state = layer.__getstate__()
    state["_kernel"] = state.pop("kernel")
    old = StripeConv2d.__new__(StripeConv2d)
    old.__setstate__(state)
    assert old.kernel == "reference"
    assert "_kernel" not in vars(old)
    x = torch.randn(1, C, 6, 6)
    assert torch.equal(old(x), layer(x))


def test_the_input_has_the_name_that_conv2d_gives_it() -> None:
    conv = pruned(nn.Conv2d(C, K, 3))
    x = torch.randn(1, C, 6, 6)
    torch.testing.assert_close(StripeConv2d.from_conv2d(conv)(input=x), conv(input=x))


def test_a_kernel_that_is_not_there_is_refused_when_it_is_named() -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3)))
    layer.kernel = "reference"
    with pytest.raises(ValueError, match="no kernel 'refrence'; did you mean reference"):
        layer.kernel = "refrence"
    assert layer.kernel == "reference"


def test_state_dict_both_ways() -> None:
    first, second = (StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3), seed=s)) for s in (1, 2))
    assert list(first.state_dict()) == ["weight", "bias", "skeleton"]
    x = torch.randn(1, C, 6, 6)
    expected = first(x)
    assert second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), expected)
    assert torch.equal(second.skeleton, first.skeleton)
    assert second.density == first.density
    strict = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3), seed=1))
    strict.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(strict(x), expected)


OPTIMIZERS = {
    "fused Adam": partial(torch.optim.Adam, fused=True, amsgrad=True),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "fused Adagrad": partial(torch.optim.Adagrad, fused=True),
    "Adam": torch.optim.Adam,
    "Adam, one by one": partial(torch.optim.Adam, foreach=False),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_begin_anew_with_another_skeleton(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Moments of stripes that are gone have the wrong size, which fused optimizers do not look at."""
    layer, other = (StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3), d)) for d in (0.2, 0.8))
    optimizer, x = make(layer.parameters()), torch.randn(1, C, 6, 6)
    for state in (layer.state_dict(), other.state_dict()):
        layer.load_state_dict(state)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    kept = [v for v in optimizer.state[layer.weight].values() if isinstance(v, Tensor) and v.dim()]
    assert kept
    assert all(v.shape == layer.weight.shape for v in kept)
    assert 0 < (layer.weight - other.weight).abs().max() < 1
    torch.testing.assert_close(layer(x), layer.to_conv2d()(x))


def test_inference_tensors_take_another_skeleton() -> None:
    layer, other = (StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3), d)) for d in (0.2, 0.8))
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        copied.load_state_dict(other.state_dict())
        assert torch.equal(copied.weight, other.weight)


def test_a_default_device_does_not_reach_a_layer_that_is_made() -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3)))
    with torch.device("meta"):
        layer.double()
    assert torch.equal(layer.skeleton, torch.from_numpy(layer.filter_skeleton.live.copy()))


@pytest.mark.parametrize("trains", [True, False])
def test_a_state_with_another_skeleton_keeps_the_parameter(trains: bool) -> None:
    """An optimizer made before goes on with it, whatever graphs of the old one are alive."""
    layer, other = (StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3), d)) for d in (0.3, 0.7))
    layer.weight.requires_grad_(trains)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    weight, x = layer.weight, torch.randn(1, C, 6, 6)
    old = layer(x)
    old.sum().backward()
    layer.load_state_dict(other.state_dict())
    assert layer.weight is weight
    assert torch.equal(weight, other.weight)
    assert weight.requires_grad == trains
    assert weight.grad is None
    layer(x).sum().backward()
    other(x).sum().backward()
    optimizer.step()
    step = -0.1 * other.weight.grad if trains else 0
    torch.testing.assert_close(weight, other.weight + step)
    torch.testing.assert_close(layer(x), layer.to_conv2d()(x))


def test_layers_that_share_a_weight_load_another_skeleton() -> None:
    first, other = (StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, C, 3, padding=1), d)) for d in (0.3, 0.7))
    second = copy.deepcopy(first)
    second.weight = first.weight
    pair, state = nn.Sequential(first, second), nn.Sequential(other, other).state_dict()
    pair.load_state_dict(state)
    x = torch.randn(1, C, 6, 6)
    assert first.weight is second.weight
    assert torch.equal(pair(x), other(other(x)))


def test_a_state_that_does_not_fit_is_refused_with_its_sizes() -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3)))
    before = copy.deepcopy(layer.state_dict())
    fits = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3), 0.7)).state_dict()
    states = [fits | {"weight": fits["weight"][1:]}, {n: t for n, t in fits.items() if n != "weight"}]
    for other in (nn.Conv2d(C, K, (2, 3)), nn.Conv2d(C, K + 1, 3), nn.Conv2d(C + 1, K, 3)):
        states.append(StripeConv2d.from_conv2d(other).state_dict())
    states.append(nn.Conv2d(C, K, 3).state_dict())  # with values in dead stripes
    for state in states:
        with pytest.raises(RuntimeError, match=r"size mismatch|\[|has values in"):
            layer.load_state_dict(state)
        assert torch.equal(layer.skeleton, before["skeleton"])
        assert torch.equal(layer.weight, before["weight"])
    with pytest.raises(RuntimeError, match="skeleton"):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})


def test_a_layer_made_without_memory_knows_its_skeleton() -> None:
    live, x = live_stripes("random", (K, 3, 3), 0.4, 0), torch.randn(1, C, 6, 6)
    empty = StripeConv2d(C, K, 3, skeleton=live, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    skipped = nn.utils.skip_init(StripeConv2d, C, K, 3, skeleton=live)
    dense = StripeConv2d(C, K, 3, skeleton=live).to_conv2d()
    loaded = StripeConv2d(C, K, 3, skeleton=live, device="meta")
    loaded.load_state_dict(dense.state_dict(), assign=True)
    for layer in (empty, skipped, loaded):
        assert torch.equal(layer.skeleton, torch.from_numpy(live.live.copy()))
    torch.testing.assert_close(loaded(x), dense(x))
    torch.testing.assert_close(empty(x), empty.to_conv2d()(x))


def test_a_skeleton_without_values_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"skeleton \[4, 3, 3\] is on meta"):
        StripeConv2d(C, 4, 3, skeleton=torch.ones(4, 3, 3, dtype=torch.bool))


def test_torchscripts_compiler_is_refused_with_the_ways_there_are() -> None:
    layer = nn.Sequential(StripeConv2d(C, K, 3, skeleton=live_stripes("random", (K, 3, 3), 0.4, 0)))
    with pytest.raises(TypeError, match=r"torch\.export .*to_dense"):
        torch.jit.script(layer)


def test_data_parallel_training_takes_the_same_steps() -> None:
    """Two replicas with averaged gradients, as DDP has them, against one layer with the whole batch."""
    conv = pruned(nn.Conv2d(C, K, 3))
    whole, *parts = (StripeConv2d.from_conv2d(conv) for _ in range(3))
    x = torch.randn(4, C, 6, 6)
    whole(x).square().mean().backward()
    for part, half in zip(parts, x.chunk(2), strict=True):
        part(half).square().mean().backward()
    mean = (parts[0].weight.grad + parts[1].weight.grad) / 2
    torch.testing.assert_close(mean, whole.weight.grad)


def test_it_learns() -> None:
    conv = pruned(nn.Conv2d(C, K, 3))
    layer, x = StripeConv2d.from_conv2d(conv), torch.randn(4, C, 6, 6)
    target = pruned(nn.Conv2d(C, K, 3))(x).detach()
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_reset_parameters_takes_the_live_fan_in() -> None:
    layer = StripeConv2d(64, 32, 3, skeleton=live_stripes("random", (32, 3, 3), 0.25, 0))
    bound = (64 * layer.weight.shape[0] / 32) ** -0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > 0.95 * bound


def test_hooks_and_parametrizations() -> None:
    layer = StripeConv2d.from_conv2d(pruned(nn.Conv2d(C, K, 3)))
    x = torch.randn(1, C, 6, 6)
    twice = layer(x) * 2
    handle = layer.register_forward_hook(lambda module, inputs, output: output * 2)
    torch.testing.assert_close(layer(x), twice)
    handle.remove()

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    with torch.no_grad():
        layer.bias.zero_()
        expected = layer(x) * 2
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_the_functional_form_is_the_module(case) -> None:
    s, operands = case.shape, case.operands()
    if s.padding[:2] != s.padding[2:]:
        pytest.skip("the public form has this padding only as 'same'")
    skeleton = torch.from_numpy(case.skeleton.live.copy())
    arguments = s.stride, s.padding[:2], s.dilation, s.groups
    layer = StripeConv2d(s.C, s.K, (s.R, s.S), *arguments, skeleton=skeleton)
    with torch.no_grad():
        layer.weight.copy_(operands.weight)
        layer.bias.copy_(operands.bias)
        expected = layer(operands.x)
        for form in (skeleton, case.skeleton):
            actual = stripe_conv2d(operands.x, operands.weight, form, operands.bias, *arguments)
            assert torch.equal(actual, expected)
