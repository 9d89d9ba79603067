"""A training step's short way (front.py): taken by steps like those before, and by no others; either way gradients are
those of the long one."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from stripe_kernels import StripeConv2d, backends, functional, ops
from stripe_kernels.testing import live_stripes
from tests.listeners import CONTEXTS, OTHER_CALLS, Sub, at_once, autocast

_cpu = pytest.importorskip("stripe_kernels._cpu")
if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("this torch has no C interface to its tensors", allow_module_level=True)
GENERIC = _cpu.isas()[-1]
Gradients = tuple[Tensor, ...]


def make(kernel: str = f"cpu_pixels_{GENERIC}", **settings: Any) -> StripeConv2d:
    settings = {"padding": 1, "groups": 2, **settings}
    layer = StripeConv2d(6, 8, 3, **settings, skeleton=live_stripes("random", (8, 3, 3), 0.4, 1))
    layer.kernel = kernel
    return layer


def gradients(layer: StripeConv2d, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    """y, and the gradients that are wanted of x and of the parameters."""
    given = x.detach().requires_grad_(x.requires_grad)
    y = (layer if call is None else call)(given)
    wanted = [t for t in (given, *layer.parameters()) if t.requires_grad]
    return y, *torch.autograd.grad((y * factors(y)).sum(), wanted)


def factors(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def the_long_way(layer: StripeConv2d, x: Tensor) -> Gradients:
    return gradients(layer, x, lambda given: functional.convolve(layer._op, given, layer.weight, layer.bias))


def oracle(layer: StripeConv2d) -> tuple[StripeConv2d, Callable[[Tensor], Tensor]]:
    """The layer in float64, and its call by torch."""
    wide = copy.deepcopy(layer).double()
    return wide, lambda x: F.conv2d(x, wide.dense_weight(), wide.bias, padding=1, groups=2)


def in_float64(layer: StripeConv2d, x: Tensor) -> Gradients:
    wide, call = oracle(layer)
    return gradients(wide, x.double(), call)


def close(found: Gradients, expected: Gradients) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e.double(), rtol=1e-5, atol=1e-5)


@contextmanager
def long_ways(forward: int, backward: int) -> Iterator[None]:
    with (
        mock.patch.object(functional, "convolve", wraps=functional.convolve) as there,
        mock.patch.object(ops, "_fprop_gradients", wraps=ops._fprop_gradients) as back,
    ):
        yield
    assert (there.call_count, back.call_count) == (forward, backward)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 7, 5, requires_grad=True)


@pytest.fixture
def layer(x: Tensor) -> StripeConv2d:
    return settled(make(), x)


def settled(layer: StripeConv2d, x: Tensor) -> StripeConv2d:
    with long_ways(2, 3):  # the lists of the backward pass are those of a front
        for _ in range(3):
            gradients(layer, x)
    return layer


KERNELS = (
    f"pixels_{GENERIC}",
    f"gather_{GENERIC}",
    f"batch_{GENERIC}",
    f"filters_{GENERIC}",
    f"taps_{GENERIC}",
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kernel", [*KERNELS, *(f"pixels_{isa}" for isa in _cpu.isas() if not _cpu.bf16_channels(isa))]
)
def test_from_the_fourth_step_on(kernel: str, bias: bool, x: Tensor) -> None:
    layer = settled(make(f"cpu_{kernel}", bias=bias), x)
    expected = the_long_way(layer, x), in_float64(layer, x)
    with long_ways(0, 0):
        found = gradients(layer, x)
    assert all(torch.equal(f, e) for f, e in zip(found, expected[0], strict=True))
    close(found, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, x: Tensor) -> None:
    layer, x = (
        make(bias=False).to(dtype),
        x.detach().to(dtype, memory_format=torch.channels_last).requires_grad_(),
    )
    settled(layer, x)
    expected = the_long_way(layer, x)
    with long_ways(0, 0):
        found = gradients(layer, x)
    assert all(torch.equal(f, e) and f.dtype == dtype for f, e in zip(found, expected, strict=True))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", ["dense", "reference"])
def test_kernels_outside_lists_have_none(kernel: str, x: Tensor) -> None:
    layer = make(kernel)
    with long_ways(4, 4):
        for _ in range(4):
            close(gradients(layer, x), in_float64(layer, x))


WANTED = {
    "not of x": (False, True, True),
    "not of the bias": (True, True, False),
    "of the weight": (False, True, False),
}


@pytest.mark.parametrize("wanted", WANTED)
def test_some_gradients(wanted: str, layer: StripeConv2d, x: Tensor) -> None:
    of_x, layer.weight.requires_grad, layer.bias.requires_grad = WANTED[wanted]  # type: ignore[union-attr]
    x = x.detach().requires_grad_(of_x)
    with long_ways(0, 0 if of_x else 1):
        gradients(layer, x)
        close(gradients(layer, x), in_float64(layer, x))


def test_a_weight_that_is_frozen_is_packed_once(layer: StripeConv2d, x: Tensor) -> None:
    layer.weight.requires_grad = False
    gradients(layer, x)
    with mock.patch.object(_cpu.Fprop, "pack_weight", side_effect=AssertionError):
        close(gradients(layer, x), in_float64(layer, x))


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


WITHOUT: dict[str, Callable[[StripeConv2d], object]] = {
    "weight computed": lambda n: parametrize.register_parametrization(n, "weight", Twice()),
    "bias computed": lambda n: parametrize.register_parametrization(n, "bias", Twice()),
    "weight frozen": lambda n: n.weight.requires_grad_(False),
    "kernel": lambda n: setattr(n, "kernel", "dense"),
    "bias of another type": lambda n: n.to(torch.bfloat16),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_none_is_made_in_vain(what: str, x: Tensor) -> None:
    layer = make()
    WITHOUT[what](layer)
    x = x.detach().to(layer.weight.dtype).requires_grad_()
    with mock.patch.object(backends, "guard", side_effect=AssertionError), long_ways(5, 5):
        for _ in range(5):
            gradients(layer, x)


def test_gradients_in_turns(layer: StripeConv2d, x: Tensor) -> None:
    """dy of several layouts, and of x's gradient wanted or not."""
    for _ in range(3):
        for given in (x, x.detach()):
            sums = torch.autograd.grad(layer(given).sum(), layer.weight)
            ones = torch.autograd.grad(layer(given), layer.weight, torch.ones(2, 8, 7, 5))
            turned = torch.ones(2, 8, 7, 5).to(memory_format=torch.channels_last)
            last = torch.autograd.grad(layer(given), layer.weight, turned)
            close((*sums, *last), (*ones, *ones))
            close(gradients(layer, given), in_float64(layer, given))


def test_calls_without_gradients_in_between(layer: StripeConv2d, x: Tensor) -> None:
    with torch.no_grad():
        y = [layer(x) for _ in range(3)]
    with long_ways(0, 0):
        found = gradients(layer, x)
    with torch.inference_mode():
        y.append(layer(x))
    assert all(not one.requires_grad for one in y)
    close((*y, *found), (*[found[0]] * 4, *in_float64(layer, x)))


@pytest.mark.parametrize("context", CONTEXTS)
def test_it_steps_aside_while_somebody_listens(context: Any, layer: StripeConv2d, x: Tensor) -> None:
    expected = in_float64(layer, x)
    with mock.patch.object(functional, "convolve", wraps=functional.convolve) as asked, context():
        y = layer(x)
    assert asked.called
    tolerance = 3e-2 if context is autocast else 1e-5
    torch.testing.assert_close(y.double(), expected[0], rtol=tolerance, atol=tolerance)
    y = layer(x)
    with mock.patch.object(ops, "_fprop_gradients", wraps=ops._fprop_gradients) as asked, context():
        found = torch.autograd.grad((y * factors(y)).sum(), (x, *layer.parameters()))
    assert asked.called
    close((y, *found), expected)


@pytest.mark.parametrize("how", OTHER_CALLS)
def test_it_takes_only_what_it_was_made_for(how: str, layer: StripeConv2d, x: Tensor) -> None:
    expected = in_float64(layer, x)
    with mock.patch.object(functional, "convolve", wraps=functional.convolve) as asked:
        found = gradients(layer, x, lambda given: OTHER_CALLS[how](layer, given))
    assert asked.called
    close(found, expected)


@pytest.mark.parametrize("how", ["negated", "subclass", "other strides"])
def test_so_do_its_gradients(how: str, layer: StripeConv2d, x: Tensor) -> None:
    dy: Tensor = {
        "negated": lambda t: torch._neg_view(-t),
        "subclass": lambda t: t.as_subclass(Sub),
        "other strides": lambda t: t.mT.contiguous().mT,
    }[how](factors(layer(x)))
    with mock.patch.object(ops, "_fprop_gradients", wraps=ops._fprop_gradients) as asked:
        y = layer(x)
        found = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    assert asked.called
    close((y, *[t.as_subclass(Tensor) for t in found]), in_float64(layer, x))


def test_other_parameters(layer: StripeConv2d, x: Tensor) -> None:
    """A front is not of its layer's parameters."""
    other = make()
    with long_ways(0, 0):
        found = gradients(
            other, x, lambda given: torch.func.functional_call(layer, dict(other.named_parameters()), given)
        )
    close(found, in_float64(other, x))


def test_functional_gradients_between_steps(layer: StripeConv2d, x: Tensor) -> None:
    x, dense = x.detach(), layer.to_conv2d()
    for _ in range(5):
        layer(x.clone().requires_grad_()).sum().backward()  # the short way
        actual = torch.func.grad(lambda x: layer(x).square().sum())(x)
        torch.testing.assert_close(actual, torch.func.grad(lambda x: dense(x).square().sum())(x))


def test_gradients_of_gradients(layer: StripeConv2d, x: Tensor) -> None:
    def twice(layer: StripeConv2d, x: Tensor, call: Callable[[Tensor], Tensor]) -> Gradients:
        inputs = (x, layer.weight)
        y = call(x)
        first = torch.autograd.grad((y * factors(y)).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    wide, call = oracle(layer)
    expected = twice(wide, x.detach().double().requires_grad_(), call)
    with long_ways(0, 1):
        close([t / 100 for t in twice(layer, x, layer)], [t / 100 for t in expected])  # of some hundred


def test_backward_twice_and_hooks(layer: StripeConv2d, x: Tensor) -> None:
    expected = in_float64(layer, x)
    hook = layer.weight.register_hook(lambda g: 2 * g)
    with long_ways(0, 0):
        y = layer(x)
        loss = (y * factors(y)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    hook.remove()
    assert layer.bias is not None
    close((x.grad, layer.weight.grad, layer.bias.grad), (2 * expected[1], 4 * expected[2], 2 * expected[3]))


def test_what_was_saved_may_have_been_elsewhere(layer: StripeConv2d, x: Tensor) -> None:
    expected = in_float64(layer, x)
    with long_ways(0, 0), save_on_cpu():
        close(gradients(layer, x), expected)
    close(gradients(layer, x, lambda given: checkpoint(layer, given, use_reentrant=False)), expected)
    (checkpoint(layer, x, use_reentrant=True) * factors(expected[0])).sum().backward()
    assert layer.bias is not None
    close((x.grad, layer.weight.grad, layer.bias.grad), expected[1:])


def test_a_weight_written_before_backward_is_an_error(layer: StripeConv2d, x: Tensor) -> None:
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("write", ["fused", "data", "replaced"])
def test_weights_change(write: str, layer: StripeConv2d, x: Tensor) -> None:
    """torch's fused optimizers leave no mark, and neither does what goes through .data."""
    fused = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
    for _ in range(3):
        with long_ways(0, 0):
            _, _, layer.weight.grad, layer.bias.grad = gradients(layer, x)  # type: ignore[union-attr]
        if write == "fused":
            fused.step()
        elif write == "data":
            layer.weight.data.mul_(-1.5)
        else:
            layer.weight = nn.Parameter(layer.weight.detach() + 1)
        with long_ways(0, 0):
            found = gradients(layer, x)
        close(found, in_float64(layer, x))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), found[0])


def test_tuning_is_heard(layer: StripeConv2d, x: Tensor) -> None:
    layer._op.forget()
    with long_ways(2, 3):
        for _ in range(4):
            close(gradients(layer, x), in_float64(layer, x))


@pytest.mark.parametrize("how", ["train", "copy", "dtype and back"])
def test_a_layer_begins_anew(how: str, layer: StripeConv2d, x: Tensor) -> None:
    layer = (
        copy.deepcopy(layer) if how == "copy" else layer.train() if how == "train" else layer.double().float()
    )
    assert layer._short[True].front is None
    settled(layer, x)


def test_it_goes_with_its_layer(x: Tensor) -> None:
    layer = settled(make(), x)
    alive = [weakref.ref(p) for p in (layer, *layer.parameters())]
    y = layer(x)
    del layer
    gc.collect()
    assert alive[0]() is None
    y.sum().backward()
    del y
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_many_threads(layer: StripeConv2d, x: Tensor) -> None:
    inputs = [torch.randn_like(x, requires_grad=True) for _ in range(6)]
    expected = [gradients(layer, v) for v in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            found = gradients(layer, inputs[i])
            if not all(torch.equal(f, e) for f, e in zip(found, expected[i], strict=True)):
                wrong.append(i)

    at_once(work, 6)
    assert not wrong


def test_compiled_it_is_one_graph(layer: StripeConv2d, x: Tensor) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(gradients(layer, x, compiled), in_float64(layer, x))
