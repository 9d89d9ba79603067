"""The rewriting passes: the same function, inside the error budget, in fewer channels and calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stripe_kernels import StripeConv2d, freeze, load, save
from stripe_kernels.compile.layers import FusedConv2d
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact, in_channels_last
from tests.compile.zoo import NETS, learned, lively, masked


def assert_same(model: nn.Module, network: nn.Module, inputs: list[Tensor]) -> None:
    """Largest and root mean square error at most twice torch's own, plus two ulp of the largest output."""
    exact_model = copy.deepcopy(model).double()
    errors: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for x in inputs:
            exact, theirs, ours = (
                tree_leaves(f) for f in (exact_model(x.double()), model(x.clone()), network(x))
            )
            assert [t.shape for t in ours] == [t.shape for t in theirs]
            errors += [(o - e, t - e, e) for o, t, e in zip(ours, theirs, exact, strict=True)]
    ours_all, theirs_all, exact_all = (torch.cat([e[i].flatten() for e in errors]) for i in range(3))
    ulp = torch.finfo(torch.float32).eps
    assert ours_all.abs().max() <= 2 * theirs_all.abs().max() + 2 * ulp * exact_all.abs().max()
    rms = [t.square().mean().sqrt() for t in (ours_all, theirs_all, exact_all)]
    assert rms[0] <= 2 * rms[1] + 2 * ulp * rms[2]


@pytest.mark.parametrize("density", [0.5, 0.24, 0.1])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_masked_network(name: str, density: float) -> None:
    model, frozen, x = masked(name, density)
    network = compact(frozen, (x,))
    assert_same(model, network, [x, torch.randn(16, *x.shape[1:]), x[:1]])
    count = [sum(p.numel() for p in m.parameters()) for m in (frozen, network)]
    assert count[1] < count[0] or name == "in_place"  # whose channels are all tied by the addition


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "densenet", "squeeze_excite"])
def test_equals_the_network_with_learned_masks(name: str) -> None:
    model, frozen, x = learned(name)
    pruned = [m for m in frozen.modules() if isinstance(m, StripeConv2d)]
    assert len({m.density for m in pruned}) > 1
    assert any(m.filter_skeleton.dead_filters.size for m in pruned) or name != "vgg16"
    network = compact(frozen, (x,))
    assert_same(model, network, [x, torch.randn(16, *x.shape[1:])])
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in model.parameters())


def test_an_empty_batch() -> None:
    model, frozen, x = masked("resnet20", 0.24)
    with torch.inference_mode():
        assert compact(frozen, (x,))(x[:0]).shape == model(x[:0]).shape


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "unet", "densenet"])
def test_an_unpruned_network_is_only_fused(name: str) -> None:
    torch.manual_seed(0)
    make, size = NETS[name]
    model, x = lively(make()), torch.randn(2, 3, *size)
    network = compact(model, (x,))
    assert not any("channels kept" in line for line in network.report)
    assert_same(model, network, [x, torch.randn(16, 3, *size)])


class Attending(nn.Module):
    """Pixels of a map [N, C, H, W] that attend to each other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            y, _ = self.layer(y, y, y, need_weights=False)
            return self.head(y)
        return self.head(self.layer(y))


@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.InstanceNorm1d(30),
    ],
)
def test_torchs_own_modules_stay_whole(layer: nn.Module) -> None:
    """torch.fx cannot follow what they do, and need not: the convolution before them is pruned all the same."""
    torch.manual_seed(0)
    model = Attending(layer).eval()
    model.first.weight.data[:4] = 0
    x = torch.randn(2, 3, 7, 8)
    network = compact(freeze(model), (x,))
    assert isinstance(network.body.first, FusedConv2d)
    assert_same(model, network, [x, torch.randn(16, *x.shape[1:])])


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (nn.PReLU(8), 4),
        (nn.PReLU(), 4),
        (nn.ZeroPad2d(1), 5),  # a dead filter that gives 0 is gone, one that gives something else meets zeros
        (nn.ConstantPad2d(1, 0.5), 5),
        (nn.ReflectionPad2d((1, 0, 2, 0)), 4),
    ],
)
def test_what_dead_filters_pass_on_their_way(between: nn.Module, kept: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 5, 3)).eval()
    model[0].weight.data[2:6] = 0
    model[0].bias.data[2:6] = torch.tensor([0.0, 0.0, 0.0, 0.25])
    if isinstance(between, nn.ConstantPad2d) and between.value == 0.5:
        model[0].bias.data[2:6] = torch.tensor([0.5, 0.5, 0.5, 0.0])
    x = torch.randn(2, 3, 9, 8)
    network = compact(freeze(model), (x,))
    assert network.body.get_submodule("0").out_channels == kept
    assert_same(model, network, [x, torch.randn(3, 3, 12, 9)])


class MakesAsItGoes(nn.Module):
    """Calls modules that it makes in forward."""

    def __init__(self, last: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.softmax, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), 1.0, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(nn.ReLU()(nn.AvgPool2d(2)(self.first(x))))
        return self.last()(nn.Softmax(dim=1)(nn.Softmax(dim=2)(x)))


def test_modules_made_in_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MakesAsItGoes(nn.Tanh).eval(), torch.randn(2, 3, 9, 8)
    model.first.weight.data[:4] = 0
    network = compact(freeze(model), (x,))
    assert network.body.first.out_channels == 4
    assert_same(model, network, [x])
    save(network, tmp_path / "net")
    assert_same(model, load(tmp_path / "net"), [x])
    for last in (nn.Dropout, lambda: nn.Conv2d(4, 1, 1)):  # in training mode, with weights of the hour
        with pytest.raises(ValueError, match="module is not installed as a submodule"):
            compact(MakesAsItGoes(last).eval(), (x,))


class Overwritten(nn.Module):
    """What dropout gives in evaluation mode is what it was given, which is written to."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.first, self.dropout = nn.Conv2d(3, 4, 3), dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.dropout(x).add_(1)
        return x * 2


@pytest.mark.parametrize("dropout", [nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()])
def test_dropout_is_its_input(dropout: nn.Module) -> None:
    model, x = Overwritten(dropout).eval(), torch.randn(2, 3, 7, 8)
    assert_same(model, compact(model, (x,)), [x, x[:1]])


@pytest.mark.parametrize("name", ["unet", "resnet20", "yolo_neck"])
def test_other_image_sizes(name: str) -> None:
    """Constants meet borders elsewhere in a larger image."""
    model, frozen, x = masked(name, 0.24)
    assert_same(model, compact(frozen, (x,)), [torch.randn(3, 3, 2 * x.shape[2], 4 * x.shape[3])])


@pytest.mark.parametrize("images", [1, 16])  # call by call, and in lanes
def test_an_input_that_does_not_fit_is_told_in_one_line(images: int) -> None:
    _, frozen, x = masked("vgg16", 0.24)
    network = compact(frozen, (x,))
    for wrong, said in ((x[:1, :2], "x has 2 channels"), (x[:1].double(), "x is torch.float64")):
        with pytest.raises(RuntimeError, match=said) as caught:
            network(wrong.expand(images, *wrong.shape[1:]))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_follow_the_input(memory_format: torch.memory_format) -> None:
    model, frozen, x = masked("unet", 0.24)
    x = x.contiguous(memory_format=memory_format)
    network = compact(frozen, (x,))
    with torch.inference_mode():
        assert network(x).is_contiguous(memory_format=memory_format)
    assert_same(model, network, [x])


def test_vgg_shrinks_to_its_live_filters() -> None:
    """In a chain every dead filter goes, but one that carries constants where they meet a border."""
    _, frozen, x = masked("vgg16", 0.24)
    network = compact(frozen, (x,))
    layers = [m for m in network.modules() if isinstance(m, FusedConv2d)]
    pruned = [m for m in frozen.modules() if isinstance(m, StripeConv2d)]
    for before, after in zip(pruned, layers, strict=True):
        live = before.filter_skeleton.shape[0] - len(before.filter_skeleton.dead_filters)
        assert live <= after.out_channels <= live + 1
        assert after.activation == "relu"
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU)) for m in network.modules())


def test_residual_blocks_become_two_calls() -> None:
    _, frozen, x = masked("resnet20", 0.5, dead=0.0)
    nodes = [n for n in compact(frozen, (x,)).body.graph.nodes if n.op not in ("placeholder", "output")]
    assert len(nodes) == 19 + 2 + 3  # convolutions, projections; mean, flatten, linear


def one_dead(padding: int, after: nn.Module, between: nn.Module | None = None) -> nn.Sequential:
    """A dead filter whose bias goes through `between` into `after`."""
    first = nn.Conv2d(2, 3, 3, padding=1)
    first.weight.data[1] = 0
    first.bias.data[1] = 0.7
    return nn.Sequential(first, between or nn.Identity(), after).eval()


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_constant_and_the_border(padding: int, mode: str) -> None:
    """Only a border of zeros needs the channel that carries the constants; others take a bias."""
    model = one_dead(padding, nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode))
    x = torch.randn(2, 2, 6, 5)
    network = compact(model, (x,))
    first = next(m for m in network.modules() if isinstance(m, FusedConv2d))
    assert first.out_channels == (3 if mode == "zeros" and padding else 2)
    assert_same(model, network, [x, torch.randn(1, 2, 9, 4)])


@pytest.mark.parametrize(
    "between",
    [
        nn.Sigmoid(),
        nn.MaxPool2d(2, padding=1),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.GELU(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_constants_pass_through(between: nn.Module) -> None:
    model = one_dead(0, nn.Conv2d(3, 4, 3), between)
    network = compact(model, (torch.randn(2, 2, 8, 8),))
    assert next(m for m in network.modules() if isinstance(m, FusedConv2d)).out_channels == 2
    assert_same(model, network, [torch.randn(2, 2, 8, 8)])


def test_an_average_that_counts_padding_is_left_alone() -> None:
    model = one_dead(0, nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 1, padding=1))
    network = compact(model, (torch.randn(2, 2, 8, 8),))
    assert next(m for m in network.modules() if isinstance(m, FusedConv2d)).out_channels == 3
    assert_same(model, network, [torch.randn(2, 2, 8, 8)])


def test_flatten_and_linear_take_the_constants() -> None:
    model = one_dead(0, nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 6)))
    network = compact(model, (torch.randn(2, 2, 4, 5),))
    linear = next(m for m in network.modules() if isinstance(m, nn.Linear))
    assert linear.in_features == 2 * 4 * 5
    assert_same(model, network, [torch.randn(3, 2, 4, 5)])


def test_input_channels_that_nobody_reads_go() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    model[2].weight.data[:, [0, 3]] = 0
    network = compact(model, (torch.randn(1, 2, 8, 8),))
    assert next(m for m in network.modules() if isinstance(m, FusedConv2d)).out_channels == 3
    assert_same(model, network, [torch.randn(2, 2, 8, 8)])


def test_all_filters_dead() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)).eval()
    model[0].weight.data.zero_()
    assert_same(model, compact(model, (torch.randn(1, 2, 8, 8),)), [torch.randn(2, 2, 8, 8)])


class CountsChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = one_dead(0, nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.model[0](x)
        return self.model[2](y) * y.size(1) + y.shape[1]


def test_channels_that_are_counted_stay() -> None:
    model = CountsChannels().eval()
    network = compact(model, (torch.randn(1, 2, 8, 8),))
    assert next(m for m in network.modules() if isinstance(m, FusedConv2d)).out_channels == 3
    assert_same(model, network, [torch.randn(2, 2, 8, 8)])


class WritesAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = x.view(x.size(0), -1)
        x.relu_()
        return y


def test_writing_to_a_tensor_with_views_is_refused() -> None:
    with pytest.raises(ValueError, match="views"):
        compact(WritesAView(), (torch.randn(1, 2, 8, 8),))


@pytest.fixture
def network() -> tuple[nn.Module, Network, Tensor]:
    model, frozen, x = masked("resnet20", 0.24)
    return model, compact(frozen, (x,)), x


def test_several_threads_and_signatures_at_once(network: tuple[nn.Module, Network, Tensor]) -> None:
    _, net, x = network
    inputs = [torch.randn((1, 2, 17)[i % 3], *x.shape[1:]) for i in range(24)]
    with torch.inference_mode():
        expected = [net.body(x) for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return net(x)

    with ThreadPoolExecutor(6) as pool:
        for actual, wanted in zip(pool.map(call, inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        again = list(pool.map(call, inputs))
    assert all(torch.equal(a, b) for a, b in zip(again, map(call, inputs), strict=True))


def test_torch_sees_the_operators_where_it_must(network: tuple[nn.Module, Network, Tensor]) -> None:
    model, net, x = network
    exported = torch.export.export(net, (x,))
    assert any("fprop" in str(n.target) for n in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), model(x))
    gradient = torch.autograd.grad(net(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(model(x).sum(), x)[0])


def test_copies_pickles_dtypes_and_new_weights(network: tuple[nn.Module, Network, Tensor]) -> None:
    import pickle

    _, net, x = network
    with torch.inference_mode():
        y = net(x)
        assert torch.equal(copy.deepcopy(net)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
        torch.testing.assert_close(copy.deepcopy(net).double()(x.double()).float(), y)
        other = copy.deepcopy(net)
        state = net.state_dict()
        other.load_state_dict({k: v * 2 if k == "body.classifier.bias" else v for k, v in state.items()})
        torch.testing.assert_close(
            other(x) - y, state["body.classifier.bias"].expand_as(y), atol=1e-5, rtol=1e-5
        )
    assert not any(p.requires_grad for p in net.parameters())
    with pytest.raises(RuntimeError, match="train the model"):
        net.train()


@pytest.mark.parametrize("name", ["yolo_neck", "squeeze_excite", "lopsided"])
def test_channels_last_inside_contiguous_outside(name: str) -> None:
    model, frozen, x = masked(name, 0.24)
    network = in_channels_last(compact(frozen, (x,)))
    with torch.inference_mode():
        assert all(y.is_contiguous() for y in tree_leaves(network(x)))
    assert_same(model, network, [x, torch.randn(5, *x.shape[1:])])


class Maps(NamedTuple):
    large: Tensor
    small: Tensor


def test_maps_in_a_class_of_the_models_go_out_contiguous() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Maps:
            return Maps(self.conv(x), small=self.conv(x).relu())

    x = torch.randn(2, 3, 7, 6)
    y = in_channels_last(compact(Named().eval(), (x,)))(x)
    assert isinstance(y, Maps)
    assert y.large.is_contiguous()
    assert y.small.is_contiguous()


def test_autocast_and_named_inputs(network: tuple[nn.Module, Network, Tensor]) -> None:
    model, net, x = network
    with torch.inference_mode():
        # By name torch computes the head, in another order.
        torch.testing.assert_close(net(x=x), net(x), rtol=0, atol=4e-7 * net(x).abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == model(x).dtype == torch.bfloat16


def test_what_is_optimized_already_stays(network: tuple[nn.Module, Network, Tensor]) -> None:
    model, net, x = network
    assert_same(model, compact(net, (x,)), [x, torch.randn(5, *x.shape[1:])])
    before = nn.Sequential(model, nn.Softmax(1)).eval()
    assert_same(before, compact(nn.Sequential(net, nn.Softmax(1)), (x,)), [x, torch.randn(5, *x.shape[1:])])


class WithOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, positive: bool = True, gain: float = 2
    ) -> Tensor:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return gain * (x.relu() if positive else x)


def test_inputs_that_are_left_out_keep_their_defaults(tmp_path: Path) -> None:
    model, x, mask = WithOptions().eval(), torch.randn(2, 3, 9, 9), torch.rand(1, 8, 1, 1)
    frozen = freeze(model, {"conv": torch.rand(8, 3, 3) < 0.5})
    network = compact(frozen, (x,))
    torch.testing.assert_close(network(x), frozen(x))
    with pytest.raises(TypeError):
        network(x, mask)
    torch.testing.assert_close(compact(frozen, (x, mask))(x, mask), frozen(x, mask))
    save(frozen, tmp_path / "f")
    torch.testing.assert_close(load(tmp_path / "f")(x, gain=3), frozen(x, gain=3))
