"""Whole networks in batch lanes agree with the network they were made from, node by node or whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels.compile.optimize import compact
from stripe_kernels.compile.resident import Untranslatable, resident


def prune(model: nn.Module, density: float) -> nn.Module:
    """Random stripes dead, norms with a life of their own."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            live = torch.rand(m.out_channels, 1, *m.kernel_size, generator=generator) < density
            m.weight.data *= live
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.weight.data, 0.5, 1.5),
                (m.bias.data, -0.5, 0.5),
                (m.running_mean, -0.3, 0.3),
            ):
                t.uniform_(low, high, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


class Zoo(nn.Module):
    """Every kind of node lanes take: strides, pools, residuals, concatenation, groups, activations, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.down = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.short = nn.Conv2d(12, 20, 1, stride=2, bias=False)
        self.grouped = nn.Conv2d(20, 12, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(20, 7, (1, 5), padding=(0, 2))
        self.act, self.act6 = nn.SiLU(), nn.ReLU6()
        self.pool, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, 1)
        self.last = nn.Conv2d(19, 10, 3, dilation=2, padding=2)
        self.flat = nn.Linear(10 * 5 * 5, 6)
        self.mean = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.act(self.down(x) + self.short(x))
        x = torch.cat([F.hardswish(self.grouped(x)), self.act6(self.wide(x))], 1)
        x = self.average(self.pool(x))
        x = self.last(x)
        return self.flat(torch.flatten(x, 1)) + self.mean(x.mean((2, 3)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 16, 37])
@pytest.mark.parametrize(("density", "vectors"), [(1.0, 1), (0.24, 1), (0.24, 2)])
def test_agrees_with_float64(threads: int, batch: int, density: float, vectors: int) -> None:
    torch.manual_seed(0)
    model = prune(Zoo(), density)
    x = torch.randn(batch, 3, 15, 13)
    body = compact(copy.deepcopy(model), (x,)).body
    with torch.inference_mode():
        program = resident(body, (x,), threads, vectors)
        expected = copy.deepcopy(model).double()(x.double())
        torch_error = (model(x).double() - expected).abs().max().item()
        budget = 2 * torch_error + 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        y = program(x)
        assert y.shape == expected.shape
        assert (y.double() - expected).abs().max().item() <= budget
        assert torch.equal(program(x.to(memory_format=torch.channels_last)), y)
        assert torch.equal(program(x[:1].contiguous()), y[:1]), "an image does not depend on its neighbours"


@pytest.mark.parametrize("size", [7, 32, 56])
def test_the_mean_of_a_large_map_keeps_to_the_budget(size: int) -> None:
    x = torch.randn(16, 5, size, size) + 1
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(size)):
        model = nn.Sequential(nn.Conv2d(5, 5, 1, bias=False), pool).eval()
        y = resident(compact(model, (x,)).body, (x,), 1)(x)
        exact = copy.deepcopy(model).double()(x.double())
        theirs = (model(x).double() - exact).abs().max()
        assert (y.double() - exact).abs().max() <= 2 * theirs + 2 * torch.finfo(
            x.dtype
        ).eps * exact.abs().max()


def test_threads_do_not_change_bits() -> None:
    torch.manual_seed(0)
    model = prune(Zoo(), 0.3)
    x = torch.randn(40, 3, 15, 13)
    body = compact(model, (x,)).body
    with torch.inference_mode():
        one, two, wide = (resident(body, (x,), *how)(x) for how in ((1,), (2,), (2, 2)))
    assert torch.equal(one, two)
    assert torch.equal(one, wide)


def test_says_what_it_cannot_take() -> None:
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, 1)

    x = torch.randn(16, 3, 4, 4)
    with pytest.raises(Untranslatable, match="softmax"):
        resident(compact(Softmax(), (x,)).body, (x,), 1)
    body = compact(prune(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5), (x,)).body
    with pytest.raises(Untranslatable, match="float32"):
        resident(body, (x.double(),), 1)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 6.0), nn.SiLU(), nn.Hardswish()], ids=str
)
def test_what_an_epilogue_takes_lanes_take_alone(activation: nn.Module) -> None:
    model, x = nn.Sequential(nn.MaxPool2d(2), activation), 5 * torch.randn(16, 3, 4, 6)
    torch.testing.assert_close(resident(compact(model, (x,)).body, (x,), 1)(x), model(x))


@pytest.mark.parametrize("images", [2, 16])
def test_hooks_are_called_at_every_batch_size(images: int) -> None:
    x, seen = torch.randn(images, 3, 6, 5), []
    network = compact(prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), 0.5), (x,))
    network(x)
    handles = [
        network.body.get_submodule("0").register_forward_hook(lambda *_: seen.append("after")),
        network.body.get_submodule("1").register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    network.forget()
    network(x)
    seen.clear()
    network(x)
    assert seen == ["after", "before"]
    for handle in handles:
        handle.remove()
    network.forget()
    resident(network.body, (x,), 1)


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.conv(x)).mean(dim=(2, 3)).mean()


def test_what_lanes_cannot_take_runs_layer_by_layer() -> None:
    model, x = Scalars().eval(), torch.randn(16, 3, 6, 5)
    network = compact(model, (x,))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model(x))
    assert any("layer by layer" in line for line in network.report)
