"""A network too short for a team runs on one thread, whatever torch's number of them, on inputs up to a size."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stripe_kernels import explain, freeze, load, optimize, save, tune
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.optimize import compact
from stripe_kernels.compile.race import Ratio

optimizer = importlib.import_module("stripe_kernels.compile.optimize")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def frozen() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)).eval()
    skeletons = {n: torch.rand(m.out_channels, 3, 3) < 0.4 for n, m in (("0", model[0]), ("2", model[2]))}
    return freeze(model, skeletons), torch.randn(1, 16, 12, 12)


def alone() -> tuple[Network, Tensor]:
    model, x = frozen()
    network = compact(model, (x,))
    network.alone_up_to = {2: x.numel()}
    return network, x


def threads_planned(network: Network) -> set[int]:
    """Of the runners that the network's layers have."""
    layers = [m for m in network.modules() if hasattr(m, "_op")]
    return {r.threads for m in layers for r in m._op._runners.values() if hasattr(r, "threads")}


def test_up_to_its_size_one_thread_runs_and_beyond_it_a_team() -> None:
    network, x = alone()
    larger = torch.randn(3, *x.shape[1:])
    for inputs, threads in ((x, 1), (larger, 2)):
        network.forget()
        with torch.inference_mode():
            y = network(inputs)
            assert network.threads((inputs,)) == threads
            torch.set_num_threads(threads)
            assert torch.equal(network(inputs), y)
        torch.set_num_threads(2)
    torch.set_num_threads(3)
    assert network.threads((x,)) == 3  # nobody measured that


def test_its_kernels_are_planned_for_one_thread() -> None:
    network, x = alone()
    with torch.inference_mode():
        network(x)
    assert 1 in threads_planned(network)


def test_the_front_sees_torchs_number_change() -> None:
    network, x = alone()
    with torch.inference_mode():
        y = network(x)
        front = network._bound.front
        if front is None:
            pytest.skip("this torch has no exchange interface")
        assert torch.equal(front(x), y)
        torch.set_num_threads(1)
        assert front(x) is NotImplemented
        assert torch.equal(network(x), y)


def test_files_keep_it(tmp_path: Path) -> None:
    network, x = alone()
    save(network, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    assert isinstance(again, Network)
    assert again.alone_up_to == network.alone_up_to
    with torch.inference_mode():
        assert torch.equal(again(x), network(x))


def test_tune_and_explain_see_the_kernels_that_run(own_tune_cache: Path) -> None:
    network, x = alone()
    plans = tune(network, x, seconds=0.01)
    assert {p.problem.threads for p in plans.values()} == {1}
    assert {row["threads"] for row in explain(network, x).rows} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_optimize_takes_one_thread_where_it_is_clearly_faster(
    ratio: float, own_tune_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(one: nn.Module, other: nn.Module, example: tuple[Tensor, ...]) -> Ratio:
        wins = ratio if isinstance(one, Network) and one.alone_up_to and isinstance(other, Network) else 0.9
        return Ratio(wins, wins, wins)

    monkeypatch.setattr(optimizer, "_race", race)
    monkeypatch.setattr(optimizer, "_SHORT", float("inf"))
    model, x = frozen()
    fast = optimize(model, x)
    assert isinstance(fast, Network)
    assert fast.alone_up_to == ({2: x.numel()} if ratio < 1 else {})
    assert ("on one thread: a team of 2 was not faster" in fast.report) == (ratio < 1)
    assert torch.get_num_threads() == 2
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))


def test_a_long_call_keeps_its_team(own_tune_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_SHORT", 0.0)
    model, x = frozen()
    called = []
    monkeypatch.setattr(optimizer, "_choose_threads", lambda network, *_: called.append(1) or network)
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(0.9, 0.9, 0.9))
    optimize(model, x)
    assert not called
