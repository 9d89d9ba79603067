"""Network's native front: taken where the kernels are all that a call needs, and nowhere else; either way the result is
that of `forward`."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from stripe_kernels import freeze, tune
from stripe_kernels.compile import network as _network
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact
from tests.listeners import CONTEXTS, Counting, Sub, at_once

_cpu = pytest.importorskip("stripe_kernels._cpu")
if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("this torch has no C interface to its tensors", allow_module_level=True)


class Parts(nn.Module):
    """Convolutions whose network is one native list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def network_of(model: nn.Module, *inputs: Tensor) -> Network:
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data[::2, :, 0] = 0
    network = compact(freeze(model.eval()), inputs)
    for layer in network.modules():
        if hasattr(layer, "_op"):
            layer.kernel = f"cpu_pixels_{_cpu.isas()[0]}"
    return network


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 7)


@pytest.fixture
def network(x: Tensor) -> Network:
    network = network_of(Parts(), x)
    network(x)
    assert network._bound.front is not None
    return network


@contextmanager
def forward_runs(times: int) -> Iterator[None]:
    with mock.patch.object(_network, "_runs_itself", wraps=_network._runs_itself) as asked:
        yield
    assert asked.call_count == times


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_second_call_goes_straight_to_the_kernels(mode: Any, network: Network, x: Tensor) -> None:
    with mode():
        expected = network.forward(x)
        with forward_runs(0):
            y = network(x)
            again = network(nn.Parameter(x, requires_grad=False))
    assert torch.equal(y, expected)
    assert torch.equal(again, expected)
    assert y.data_ptr() != again.data_ptr()
    assert y.is_inference() == expected.is_inference()
    assert not y.requires_grad


SOMETHING_ELSE: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "other sizes": lambda n, x: n(x.repeat(2, 1, 1, 1))[:2],
    "other strides": lambda n, x: n(x.mT.contiguous().mT),
    "negated": lambda n, x: n(torch._neg_view(-x)),
    "subclass": lambda n, x: n(x.as_subclass(Sub)),
    "gradients": lambda n, x: n(x.clone().requires_grad_()),
    "vmap": lambda n, x: torch.vmap(lambda one: n(one[None])[0])(x),
    "jit.trace": lambda n, x: torch.jit.trace(n, x, check_trace=False)(x),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_it_steps_aside_while_somebody_listens(context: Any, network: Network, x: Tensor) -> None:
    expected = network(x)
    with forward_runs(1), context() as listener:
        y = network(x)
    if isinstance(listener, Counting):
        assert listener.calls
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)  # autocast's are bfloat16


@pytest.mark.parametrize("how", SOMETHING_ELSE)
def test_it_takes_only_what_it_was_made_for(how: str, network: Network, x: Tensor) -> None:
    expected = network(x)
    with mock.patch.object(_network, "_runs_itself", wraps=_network._runs_itself) as asked:
        y = SOMETHING_ELSE[how](network, x)
    assert asked.called
    torch.testing.assert_close(y.as_subclass(Tensor).detach(), expected, rtol=1e-5, atol=1e-6)
    if how == "gradients":
        y.sum().backward()
        assert y.requires_grad


def test_forward_mode_is_refused_not_dropped(network: Network, x: Tensor) -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        network(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("wrong", [(), (1,), ("two", "many"), (None,)])
def test_wrong_inputs_say_what_they_said(wrong: tuple[Any, ...], network: Network) -> None:
    with pytest.raises((TypeError, RuntimeError, ValueError)) as expected:
        network.forward(*wrong)
    with pytest.raises(type(expected.value)) as said:
        network(*wrong)
    assert str(said.value) == str(expected.value)


def test_hooks_see_every_call(network: Network, x: Tensor) -> None:
    seen: list[str] = []
    hooks = [
        network.register_forward_hook(lambda *_: seen.append("after")),
        network.register_forward_pre_hook(lambda *_: seen.append("before")),
        torch.nn.modules.module.register_module_forward_hook(
            lambda m, *_: seen.append("any") if m is network else None
        ),
    ]
    network(x)
    assert seen == ["before", "any", "after"]
    for hook in hooks:
        hook.remove()
    with forward_runs(0):
        network(x)


def test_a_name_for_the_input(network: Network, x: Tensor) -> None:
    assert torch.equal(network(x=x), network(x))


def test_compiled_in_place(network: Network, x: Tensor) -> None:
    expected = network(x)
    network.compile(fullgraph=True, backend="aot_eager")
    network._bound.front = mock.Mock(side_effect=AssertionError)
    torch.testing.assert_close(network(x), expected)


def test_one_graph_after_a_direct_call(network: Network, x: Tensor) -> None:
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    inside = torch.compile(nn.Sequential(network, nn.ReLU()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(x), network(x).relu())
    exported = torch.export.export(network, (x,))
    torch.testing.assert_close(exported.module()(x), network(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_make_their_own(copied: Callable[[Network], Network], network: Network, x: Tensor) -> None:
    other = copied(network)
    assert other._bound.front is None
    expected = network(x)
    assert torch.equal(other(x), expected)
    for p in other.parameters():
        p.data.zero_()
    other.forget()
    assert other._bound.front is None
    assert not other(x).any()
    assert torch.equal(network(x), expected)


def test_it_goes_with_its_network(x: Tensor) -> None:
    network = network_of(Parts(), x)
    # A cycle, which only the collector ends.
    hook = network.register_forward_hook(lambda m, *_, itself=network: itself and None)
    network(x)
    assert network._bound.front is not None
    alive = weakref.ref(network)
    del network, hook
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("outputs", ["two", "the input too", "an operation of torch's"])
def test_other_networks_have_none(outputs: str, x: Tensor) -> None:
    class Other(Parts):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"two": (y, y), "the input too": (y, x)}.get(outputs) or y.sin()

    network = network_of(Other(), x)
    first = network(x)
    assert network._bound.front is None
    torch.testing.assert_close(network(x), first)


def test_inputs_in_another_order(x: Tensor) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(y) + self.b(x)

    network = network_of(Crossed(), x, x)
    z = torch.randn_like(x)
    expected = network.forward(x, z)
    assert torch.equal(network(x, z), expected)
    assert torch.equal(network(x, z), expected)


def test_many_threads_have_an_arena_each(network: Network, x: Tensor) -> None:
    inputs = [torch.randn_like(x) for _ in range(8)]
    expected = [network.forward(v) for v in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(network(inputs[i]), expected[i]):
                wrong.append(i)

    at_once(work, 8)
    assert not wrong


def test_forgetting_while_others_call(network: Network, x: Tensor) -> None:
    """What a call binds for the network of before forget() is not kept, and known sizes need not wait for new ones."""
    planning, planned, results = threading.Event(), threading.Event(), []

    def slow(*arguments: Any) -> Any:
        planning.set()
        assert planned.wait(30)
        return write_program(*arguments)

    write_program = _network.write_program
    with mock.patch.object(_network, "write_program", slow):
        thread = threading.Thread(target=lambda: results.append(network(x[:1])))
        thread.start()
        assert planning.wait(30)
        expected = network(x)
        network(x)
        network.forget()
        planned.set()
        thread.join()
    assert network._bound.front is None
    assert not network._bound.programs
    torch.testing.assert_close(results[0], expected[:1])


def test_tuning_replaces_what_was_bound(network: Network, x: Tensor, own_tune_cache: Path) -> None:
    tune(network, x, seconds=0.01)
    assert network._bound.front is None
    network(x)
    assert network.memory(x)["activations"] > 0


def test_another_forward_is_called(network: Network, x: Tensor) -> None:
    expected = 2 * network(x)

    class Twice(Network):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            return 2 * super().forward(*inputs, **named)

    other = Twice(network.body)
    assert all(torch.equal(other(x), expected) for _ in range(3))
    with mock.patch.object(Network, "forward", return_value="patched"):
        assert network(x) == "patched"
    network.forward = lambda x: Network.forward(network, x) * 2  # type: ignore[method-assign]
    assert all(torch.equal(network(x), expected) for _ in range(3))


def test_a_tracer_that_patches_modules_sees_the_call(network: Network, x: Tensor) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("constant", x)

        def forward(self, z: Tensor) -> Tensor:
            return z + self.network(self.constant)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Network)

    assert [n.op for n in Tracer().trace(Parent()).nodes if n.op == "call_module"] == ["call_module"]


@pytest.mark.parametrize("exchange", ["native", "python"])
def test_lists_inside_programs_check_their_inputs(
    exchange: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exchange == "python":
        monkeypatch.setattr("stripe_kernels.backends.cpu_calls._EXCHANGE", None)
    network = network_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3)), x)
    turned: list[str] = []
    sigmoid = next(m for m in network.body.modules() if isinstance(m, nn.Sigmoid))
    sigmoid.register_forward_hook(lambda m, inputs, y: y.mT.contiguous().mT if turned else None)
    first = network(x)
    assert network._bound.front is None
    assert torch.equal(network(x), first)
    turned.append("now")
    with pytest.raises(ValueError, match="laid out other than"):
        network(x)


@pytest.mark.parametrize("exchange", ["native", "python"])
def test_kept_arenas_change_no_bit(
    exchange: str, network: Network, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = network(x)
    if exchange == "python":
        monkeypatch.setattr("stripe_kernels.backends.cpu_calls._EXCHANGE", None)
    monkeypatch.setattr("stripe_kernels.backends.cpu_calls._ARENA_KEPT", -1)
    network.forget()
    assert all(torch.equal(network(x), expected) for _ in range(3))
    assert (network._bound.front is None) == (exchange == "python")


@pytest.mark.parametrize("capsule", [None, 17, "a capsule", "another version", "no view"])
def test_other_interfaces_are_not_used(capsule: Any) -> None:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = (ctypes.c_uint64 * 8)()
    table[0] = (2 if capsule == "another version" else 1) | 3 << 32
    table[5] = 0 if capsule == "no view" else 1  # behind the version, a pointer and three functions
    if isinstance(capsule, str):
        name = b"something" if capsule == "a capsule" else b"dlpack_exchange_api"
        capsule = new(ctypes.addressof(table), name, None)
    assert not _cpu.usable_exchange(capsule)
    assert _cpu.usable_exchange(Tensor.__dlpack_c_exchange_api__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("odd", [lambda x: torch._efficientzerotensor(x.shape), torch._to_functional_tensor])
def test_tensors_without_memory_of_their_own(
    odd: Callable[[Tensor], Tensor], network: Network, x: Tensor
) -> None:
    """They are of type Tensor and on the CPU, and their address is null."""
    with torch.no_grad():
        y, expected = (
            network(odd(x)),
            network(x if odd is torch._to_functional_tensor else torch.zeros_like(x)),
        )
        y = torch._from_functional_tensor(y) if torch._is_functional_tensor(y) else y
        torch.testing.assert_close(y, expected)


def test_what_has_no_memory_is_named_as_before(network: Network, x: Tensor) -> None:
    for odd in (
        x.to("meta"),
        x.to_sparse(),
        x.to_mkldnn(),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
            network.forward(odd)
        with pytest.raises(type(expected.value)) as said:
            network(odd)
        assert str(said.value) == str(expected.value)


def allocated(network: Network, x: Tensor) -> int:
    """Bytes that a call asks torch's allocator for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = network(x)
    changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    del y
    return sum(change for change in changes if change > 0)


def test_small_arenas_are_kept(network: Network, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    y = network(x)
    assert allocated(network, x) == y.nbytes
    monkeypatch.setattr("stripe_kernels.backends.cpu_calls._ARENA_KEPT", -1)
    network.forget()
    network(x)
    assert allocated(network, x) == network.memory(x)["activations"] > y.nbytes


def test_a_list_function_refuses_what_is_no_tensor() -> None:
    exchange = Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    x = torch.randn(1, 4, 4, 4)

    def make(*inputs: Tensor, exchange: Any = exchange) -> Any:
        calls = _cpu.CallList()
        calls.add_slot(0, (64, 16, 4, 1), 0)
        calls.add_slot(0, (64, 16, 4, 1), 1)
        calls.add_max_pool((1, 1, 1, 1, 0, 0), (1, 4, 4, 4), (1, 4, 4, 4), 0, 1)
        outputs, arena = (lambda: torch.empty_like(x),), lambda: torch.empty(0)
        return _cpu.list_function(calls, (), Tensor, exchange, 1, inputs, outputs, (), arena, True)

    function = make(x)
    (y,) = function(x)
    assert torch.equal(y, x)
    for wrong in (x[:, :3], x.double(), x.mT, x[0]):
        with pytest.raises(ValueError, match="laid out other than"):
            function(wrong)
    for no_tensor in (1, None, x.numpy()):
        with pytest.raises(TypeError, match=type(no_tensor).__name__):
            function(no_tensor)
    with pytest.raises(TypeError, match="number of inputs"):
        function()
    with pytest.raises(RuntimeError, match="slots"):  # fewer pointers than the list reads
        make()()
    with pytest.raises(ValueError, match="exchange"):
        make(x, exchange=None)
