"""A layer's short way (front.py): taken by calls like those before, and by no others; either way the result is that of
the long one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stripe_kernels import StripeConv2d, functional
from stripe_kernels.testing import live_stripes
from tests.listeners import CONTEXTS, OTHER_CALLS, at_once

_cpu = pytest.importorskip("stripe_kernels._cpu")
if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("this torch has no C interface to its tensors", allow_module_level=True)
KERNELS = (f"cpu_pixels_{_cpu.isas()[-1]}", "dense", "reference")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 7, 5)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layer(kernel: str, x: Tensor) -> StripeConv2d:
    layer = StripeConv2d(6, 8, 3, padding=1, skeleton=live_stripes("random", (8, 3, 3), 0.4, 1)).eval()
    layer.kernel = kernel
    return settled(layer, x)


def settled(layer: StripeConv2d, x: Tensor) -> StripeConv2d:
    with torch.no_grad():
        layer(x), layer(x)
    assert layer._short[False].front is not None
    return layer


@contextmanager
def long_ways(times: int) -> Iterator[None]:
    with mock.patch.object(functional, "convolve", wraps=functional.convolve) as asked:
        yield
    assert asked.call_count == times


def close(y: Tensor, layer: StripeConv2d, x: Tensor, **tolerance: float) -> None:
    with torch.no_grad():
        expected = layer.to_conv2d()(x)
    torch.testing.assert_close(y, expected, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_third_call_is_short(mode: Any, layer: StripeConv2d, x: Tensor) -> None:
    with mode():
        with long_ways(1):
            expected = functional.convolve(layer._op, x, layer.weight, layer.bias)
        with long_ways(0):
            y, other = layer(x), layer(2 * x)
    assert torch.equal(y, expected)
    assert y.is_inference() == expected.is_inference()
    assert not y.requires_grad
    close(other, layer, 2 * x)


def test_without_a_bias(kernel: str, x: Tensor) -> None:
    layer = StripeConv2d(6, 8, 3, bias=False, skeleton=live_stripes("random", (8, 3, 3), 0.4, 1)).eval()
    layer.kernel = kernel
    with long_ways(2):
        settled(layer, x)
    with torch.no_grad(), long_ways(0):
        y = layer(x)
    close(y, layer, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, layer: StripeConv2d, x: Tensor) -> None:
    layer.to(dtype)
    assert layer._short[False].front is None
    x = x.to(dtype).to(memory_format=torch.channels_last)
    settled(layer, x)
    with torch.no_grad(), long_ways(0):
        y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, layer, x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("context", [torch.enable_grad, *CONTEXTS])
def test_it_steps_aside_while_somebody_listens(context: Any, layer: StripeConv2d, x: Tensor) -> None:
    with (
        torch.no_grad(),
        context(),
        mock.patch.object(functional, "convolve", wraps=functional.convolve) as asked,
    ):
        y = layer(x)
    assert asked.called
    assert y.requires_grad == (context is torch.enable_grad)
    close(y.detach().float(), layer, x, rtol=3e-2, atol=3e-2)  # autocast's are bfloat16


SOMETHING_ELSE = {
    **OTHER_CALLS,
    "other parameters": lambda n, x: (
        torch.func.functional_call(n, {"weight": 2 * n.weight, "bias": 2 * n.bias}, (x,)) / 2
    ),
}


@pytest.mark.parametrize("how", SOMETHING_ELSE)
def test_it_takes_only_what_it_was_made_for(how: str, layer: StripeConv2d, x: Tensor) -> None:
    with mock.patch.object(functional, "convolve", wraps=functional.convolve) as asked, torch.no_grad():
        y = SOMETHING_ELSE[how](layer, x)
    assert asked.called
    close(y, layer, x)


def bias_in_place(layer: StripeConv2d, x: Tensor) -> None:
    assert layer.bias is not None
    layer.bias.data.add_(1)


def bias_elsewhere(layer: StripeConv2d, x: Tensor) -> None:
    assert layer.bias is not None
    layer.bias.data = layer.bias.data + 1


def weight_in_place(layer: StripeConv2d, x: Tensor) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def weight_elsewhere(layer: StripeConv2d, x: Tensor) -> None:
    layer.weight.data = 2 * layer.weight.data


def weight_replaced(layer: StripeConv2d, x: Tensor) -> None:
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def weight_parametrized(layer: StripeConv2d, x: Tensor) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(layer, "weight", Twice())


def repacked(layer: StripeConv2d, x: Tensor) -> None:
    layer.weight.data.mul_(2)
    layer.repack()


def trained_without_a_mark(layer: StripeConv2d, x: Tensor) -> None:
    layer(x).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), 0.1, fused=True).step()


def another_kernel(layer: StripeConv2d, x: Tensor) -> None:
    layer.kernel = "auto"


CHANGES = [
    bias_in_place,
    bias_elsewhere,
    weight_in_place,
    weight_elsewhere,
    weight_replaced,
    weight_parametrized,
]
CHANGES += [repacked, trained_without_a_mark, another_kernel]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_seen(
    change: Callable[[StripeConv2d, Tensor], None], layer: StripeConv2d, x: Tensor
) -> None:
    change(layer, x)
    with torch.no_grad():
        found = [layer(x) for _ in range(4)]
    for y in found:
        close(y, layer, x)


def test_tuning_is_heard(layer: StripeConv2d, x: Tensor) -> None:
    layer._op.forget()
    with torch.no_grad(), long_ways(2):
        assert all(y.shape[1] == 8 for y in (layer(x), layer(x), layer(x)))


def test_sizes_in_turns_make_none(layer: StripeConv2d, x: Tensor) -> None:
    with torch.no_grad():
        for _ in range(2):
            close(layer(x[:1]), layer, x[:1])
            assert layer._short[False].front is None
            close(layer(x), layer, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_make_their_own(copied: Any, layer: StripeConv2d, x: Tensor) -> None:
    other = copied(layer)
    assert other._short[False].front is None
    weight_in_place(other, x)
    with torch.no_grad():
        close(other(x), other, x)
        close(layer(x), layer, x)


@pytest.mark.parametrize("kernel", KERNELS[:2])  # the reference packs nothing: its form is the weight
def test_it_goes_with_its_layer(layer: StripeConv2d) -> None:
    alive = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    layer.repack()
    gc.collect()
    assert alive() is None


def test_many_threads(layer: StripeConv2d, x: Tensor) -> None:
    inputs = [torch.randn_like(x) for _ in range(6)]
    with torch.no_grad():
        expected = [layer(v) for v in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(layer(inputs[i]), expected[i]):
                    wrong.append(i)

    at_once(work, 6)
    assert not wrong


def test_compiled_it_is_one_graph(layer: StripeConv2d, x: Tensor) -> None:
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        close(compiled(x), layer, x)


@pytest.mark.parametrize("wrong", [1, None, "x"])
def test_what_is_no_tensor_is_named(wrong: Any, layer: StripeConv2d) -> None:
    with torch.no_grad(), pytest.raises(TypeError, match=type(wrong).__name__):
        layer(wrong)
