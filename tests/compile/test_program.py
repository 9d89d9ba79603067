"""Programs: native lists of calls give the bits that call after call gives, and memory is what it is said to be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from stripe_kernels import StripeConv2d, backends, freeze
from stripe_kernels.backends.dense import DenseFprop
from stripe_kernels.compile import program
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact, in_channels_last
from tests.compile.zoo import NETS, masked


@contextmanager
def call_after_call() -> Iterator[None]:
    """Programs written inside call every layer from Python, as where the extension is missing."""
    with mock.patch.object(backends, "call_list", side_effect=ImportError):
        yield


def layer_by_layer(network: Network) -> Network:
    """A network of the same layers that never uses lanes."""
    other = Network(network.body)
    other.resident_from = None
    return other


def native(network: Network) -> Network:
    """The network with native kernels in all its layers, whatever the planner takes for faster on this machine."""
    _cpu = pytest.importorskip("stripe_kernels._cpu")
    for layer in network.modules():
        if hasattr(layer, "_op"):
            layer.kernel = f"cpu_pixels_{_cpu.isas()[0]}"
    return network


@contextmanager
def no_heads() -> Iterator[None]:
    """Averages and linear layers stay torch's, whose bits are others than a list's."""
    with mock.patch("stripe_kernels.compile.program._Writer._head", return_value=None):
        yield


@contextmanager
def no_kept_arenas() -> Iterator[None]:
    """Programs written inside ask torch for their arena at every call."""
    with mock.patch("stripe_kernels.backends.cpu_calls._ARENA_KEPT", -1):
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, as bytes too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with no_kept_arenas():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def lines_of(network: Network, *inputs: Tensor) -> list[str]:
    """A network's program."""
    from stripe_kernels.compile.program import _Writer

    writer = _Writer(network.body)
    with torch.inference_mode():
        writer.write(inputs)
    return writer.lines


def lists_of(network: Network, *inputs: Tensor) -> list[str]:
    """The lines of a network's program that are native lists."""
    return [line for line in lines_of(network, *inputs) if ", = k" in line]


@pytest.mark.parametrize("name", NETS)
def test_lists_give_the_bits_of_single_calls(name: str) -> None:
    _, frozen, x = masked(name, 0.24)
    for network in (compact(frozen, (x,)), in_channels_last(compact(frozen, (x,)))):
        with_lists, without = layer_by_layer(network), layer_by_layer(network)
        for images in (x, x[:0]):
            with torch.inference_mode(), no_heads():
                with poisoned_memory():
                    y = tree_leaves(with_lists(images))
                with call_after_call():
                    expected = tree_leaves(without(images))
            assert [t.stride() for t in y] == [t.stride() for t in expected]
            assert all(map(torch.equal, y, expected))


@pytest.mark.parametrize("kernel", ["pixels", "filters", "taps"])
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_bits_of_a_list_depend_on_neither_run_nor_threads(name: str, kernel: str) -> None:
    """Heads included; with one thread, maps in planes are written by one block after the other where they lie."""
    _cpu = pytest.importorskip("stripe_kernels._cpu")
    _, frozen, x = masked(name, 0.24)
    network = layer_by_layer(compact(frozen, (x,)))
    for layer in network.modules():
        if hasattr(layer, "_op"):  # by name: "auto" may take another kernel for another number of threads
            layer.kernel = f"cpu_{kernel}_{_cpu.isas()[0]}"
    x = torch.randn(2, *x.shape[1:])
    with torch.inference_mode(), poisoned_memory():
        first = network(x)
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            assert lists_of(network, x)
            assert all(torch.equal(network(x), first) for _ in range(3)), threads


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT,
        lambda x: x[..., ::2],
        lambda x: x[..., :1].expand(-1, -1, -1, 8),
        lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(2, -1, -1, -1),
        lambda x: x[:0].contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "sliced", "expanded columns", "expanded images", "no images"],
)
def test_a_pool_takes_what_torch_takes(view: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval()
    model[1].weight.data[::2, :, 0] = 0
    frozen = freeze(model)
    x = view(torch.randn(2, 3, 8, 16))
    with torch.inference_mode():
        y, expected = layer_by_layer(compact(frozen, (torch.randn(1, 3, 8, 8),)))(x), model(x)
    torch.testing.assert_close(y, expected)


def test_a_frozen_norm_of_buffers_folds() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, t in (("weight", torch.rand(4)), ("bias", torch.rand(4)), ("mean", torch.rand(4))):
                self.register_buffer(name, t)
            self.register_buffer("var", torch.rand(4) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(compact(model, (x,))(x), model(x))


class Mean(nn.Module):
    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, 3), **self.settings)


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "average": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(37, 5)],
    "mean": lambda: [Mean(), nn.Linear(37, 19, bias=False)],
    "mean, kept": lambda: [Mean(keepdim=True)],
    "flattened": lambda: [nn.Flatten(), nn.Linear(37 * 5 * 17, 3)],
    "only flattened": lambda: [nn.Flatten()],
}


@pytest.mark.parametrize("images", [1, 3, 4])
@pytest.mark.parametrize("head", HEADS)
def test_a_classifiers_head_joins_the_list(head: str, images: int) -> None:
    """Against float64: no further than four roundings of the sum of all terms' sizes."""
    _cpu = pytest.importorskip("stripe_kernels._cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 37, 3, padding=1), nn.ReLU(), *HEADS[head]()).eval()
    model[0].weight.data[::2, :, 0] = 0
    x = torch.randn(images, 3, 5, 17)
    network = layer_by_layer(compact(freeze(model), (x,)))
    for layer in network.modules():
        if hasattr(layer, "_op"):
            layer.kernel = f"cpu_pixels_{_cpu.isas()[0]}"
    assert len(lines_of(network, x)) == len(["list", "x = None", "return"])
    with torch.inference_mode():
        expected = model.double()(x.double())
        for p in model.parameters():
            p.copy_(p.abs())
        terms = model(x.double().abs())
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with poisoned_memory():
                y = network(x)
            assert y.shape == expected.shape
            assert y.is_contiguous()
            assert bool(((y.double() - expected).abs() <= 4 * 2**-24 * terms).all())


def classifier(outputs: int) -> tuple[Network, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)
    )
    x = torch.randn(1, 3, 9, 9)
    return layer_by_layer(compact(freeze(model.eval()), (x,))), x


def test_a_list_keeps_the_memory_of_parameters_put_elsewhere() -> None:
    network, x = classifier(4)
    with torch.inference_mode():
        before = network(x)
        for p in network.parameters():
            p.data = torch.full_like(p, float("nan"))
        assert torch.equal(network(x), before)  # as documented, until forget()
        network.forget()
        assert network(x).isnan().all()


def test_a_list_follows_parameters_into_shared_memory() -> None:
    network, x = classifier(50_000)
    with torch.inference_mode():
        before = network(x)
        for p in network.parameters():
            p.share_memory_()
        assert torch.equal(network(x), before)


@pytest.mark.parametrize("odd", ["bias of one", "half", "transposed"])
def test_odd_linear_layers_stay_torchs(odd: str) -> None:
    """Behind a native list that would take an ordinary one. compact makes them ordinary: they are put in later."""
    network = native(classifier(6)[0])
    x = torch.randn(2, 3, 9, 9)
    linear = network.body.get_submodule("4")
    if odd == "half":  # torch refuses it, and so do we
        linear.half()
        with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
            network(x)
        return
    assert lines_of(network, x)[-1] == "return v1"
    if odd == "bias of one":
        linear.bias = nn.Parameter(torch.tensor([3.0]))
    if odd == "transposed":
        linear.weight = nn.Parameter(torch.randn(8, 6).T)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), network.body(x))
    assert len(lists_of(network, x)) == 1
    assert len(lines_of(network, x)) > 3


def test_the_mean_of_a_tall_map() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), Mean()).eval()
    x = torch.rand(1, 1, 20_000, 3)
    network = layer_by_layer(compact(freeze(model), (x,)))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model.double()(x.double()).float(), rtol=3e-7, atol=0)


def test_a_residual_network_is_one_list() -> None:
    _, frozen, x = masked("resnet20", 0.5)
    network = native(layer_by_layer(compact(frozen, (x,))))
    assert len(lists_of(network, x)) == 1


SIZES = [(1, 1, 5, 4), (2, 3, 7, 9), (1, 5, 8, 6), (3, 1, 2, 3)]
POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    {"kernel_size": 5, "stride": 1, "padding": 2},
    {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True},
]


@pytest.mark.parametrize(("size", "settings"), list(itertools.product(SIZES, POOLS)), ids=str)
def test_max_pools(size: tuple[int, ...], settings: dict[str, object]) -> None:
    pool = nn.MaxPool2d(**settings)  # type: ignore[arg-type]
    x = torch.randn(size)
    x.view(-1)[::7] = float("nan")
    x.view(-1)[1::5] = -float("inf")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = x.contiguous(memory_format=memory_format)
        expected = pool(images)
        network = layer_by_layer(compact(nn.Sequential(pool).eval(), (images,)))
        with torch.inference_mode():
            y = network(images)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def measured_peak(network: Network, x: Tensor) -> int:
    """Most bytes torch's allocator gave out during a call, the output still held."""
    with torch.inference_mode():
        network(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            y = network(x)
    changes = [
        (e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    del y
    return max(itertools.accumulate(change for _, change in sorted(changes)))


@pytest.mark.parametrize("name", ["resnet20", "unet", "yolo_neck", "densenet", "in_place"])
def test_memory_is_what_the_allocator_gave_out(name: str) -> None:
    torch.set_num_threads(1)  # torch's operators allocate of their own, with more threads more of them
    _, frozen, x = masked(name, 0.24)
    network = native(layer_by_layer(compact(frozen, (x,))))
    with no_kept_arenas():
        said = network.memory(x)
    given = measured_peak(network, x)
    assert said["activations"] == pytest.approx(given, rel=0.05)
    assert said["weights"] == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert said["packed"] >= sum(m.weight.numel() * 4 for m in network.modules() if hasattr(m, "_op"))
    assert network.memory(x[:1])["activations"] < said["activations"]


def test_memory_of_lanes_counts_each_threads_arena() -> None:
    _, frozen, x = masked("vgg16", 0.24)
    network, x = compact(frozen, (x,)), torch.randn(20, *x.shape[1:])
    lanes = network.memory(x)["activations"]
    assert lanes > 20 * 10 * 4
    assert lanes < layer_by_layer(network).memory(torch.randn(200, *x.shape[1:]))["activations"]


def test_memory_of_a_known_network() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 1, 1)).eval()
    x = torch.randn(2, 1, 8, 8)
    memory = compact(model, (x,)).memory(x)
    assert memory["weights"] == 4 * (4 + 4 + 4 + 1) + 4 + 1  # floats, and the skeletons' booleans
    # The convolution's map, the pooled one, around whose channels lie margins; and the output, once the pooled map is
    # all that is left.
    pooled = 32 + 2 * 4 * (16 + 32)
    assert 4 * (2 * 64 * 4 + 2 * 16 * 4) <= memory["activations"] <= 4 * (2 * 64 * 4 + pooled + 2 * 16)


def test_a_bias_is_converted_when_the_program_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA runners read float32, whatever type a layer has; no call converts."""
    seen: list[Tensor] = []
    call = DenseFprop.__call__

    def noting(runner: DenseFprop, x: Tensor, packed: Tensor, bias: Tensor, *rest: object) -> Tensor:
        seen.append(bias)
        return call(runner, x, packed, bias.to(x.dtype), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DenseFprop, "bias_dtype", torch.float32, raising=False)
    monkeypatch.setattr(DenseFprop, "__call__", noting)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().bfloat16()
    x = torch.randn(2, 3, 6, 7, dtype=torch.bfloat16)
    network = compact(model, (x,))
    layer = next(m for m in network.modules() if isinstance(m, StripeConv2d))
    layer.kernel = "dense"
    with torch.inference_mode():
        network(x)
        seen.clear()
        first, second = network(x), network(x)
    assert torch.equal(first, second)
    assert seen[0] is seen[1]
    assert seen[0].dtype == torch.float32
    with torch.no_grad():
        layer.bias += 1
    network.forget()
    network(x)
    assert torch.equal(seen[-1], layer.bias.float())
    assert not torch.equal(seen[-1], seen[0])


def test_every_call_meets_what_its_program_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the call's stream waits for the packed weights and converted biases, and the allocator is told."""
    given: list[list[Tensor]] = []
    read: list[Tensor] = []
    met: list[str] = []

    def kept_here(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
        given.append(list(tensors))
        return (SimpleNamespace(value=lambda: met.append("met")),)

    monkeypatch.setattr(program, "kept_here", kept_here)
    monkeypatch.setattr(DenseFprop, "bias_dtype", torch.float32, raising=False)
    call = DenseFprop.__call__

    def noting(runner: DenseFprop, x: Tensor, packed: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        met.append("called")
        read[:] = packed, bias
        return call(runner, x, packed, bias.to(x.dtype), *rest)

    monkeypatch.setattr(DenseFprop, "__call__", noting)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().bfloat16()
    x = torch.randn(2, 3, 6, 7, dtype=torch.bfloat16)
    network = compact(model, (x,))
    next(m for m in network.modules() if isinstance(m, StripeConv2d)).kernel = "dense"
    network.forget()
    given.clear()
    met.clear()
    network(x)
    network(x)
    assert len(given) == 1
    assert met[-4:] == ["met", "called", "met", "called"]
    assert all(any(t is one for one in given[0]) for t in read)
    assert [t.dtype for t in read] == [torch.bfloat16, torch.float32]
