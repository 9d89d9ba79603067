"""Dense at its best: what speed-ups are quoted over computes what the network does, and what cannot compete says so."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from iessp import dense, runs
from iessp.timing import Timing
from stripe_kernels import freeze


class Net(nn.Module):
    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)
        )
        self.body[1].running_mean.uniform_(-1, 1)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if not self.branch or x.sum() > 0 else self.body(-x)


def test_norms_are_folded() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    folded = dense.folded(model)
    assert folded is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert dense.folded(nn.Conv2d(3, 3, 1)) is None


def test_what_cannot_be_followed_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="dense, folded is left out: symbolically traced"):
        assert dense.folded(Net(branch=True).eval()) is None
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_runtime_that_is_installed_competes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in dense._NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.setattr(dense, "_NEEDS", {name: dense._NEEDS[name]})
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    (call,) = dense.runtimes(model, x).values()
    with torch.inference_mode():
        torch.testing.assert_close(torch.as_tensor(call()), model(x), rtol=1e-3, atol=1e-4)
    right = getattr(dense, f"{name}_call")
    monkeypatch.setattr(dense, f"{name}_call", lambda *given: lambda: right(*given)() * 1.01)
    with pytest.warns(UserWarning, match=f"dense, {name} is left out: it is off by"):
        assert dense.runtimes(model, x) == {}


def test_speed_ups_are_over_the_fastest_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: eager, folded, optimized or another runtime."""
    frozen = freeze(Net().eval(), {"body.3": torch.rand(6, 3, 3) < 0.5})
    times = {"dense": 8.0, "frozen": 3.0, "dense, folded": 6.0, "dense, openvino": 4.0}

    def clock(networks: dict[str, nn.Module], x: Tensor, seconds: float, others: dict[str, object]) -> object:
        assert {*networks, *others} >= times.keys()
        return {name: (Timing(ms, ms, ms, 5), "contiguous") for name, ms in times.items()}

    monkeypatch.setattr(runs, "time_networks", clock)
    monkeypatch.setattr(dense, "runtimes", lambda model, x: {"dense, openvino": lambda: None})
    found = runs.contest(frozen, 1, torch.zeros(1, 3, 8, 8), 0.0, runtimes=True)
    assert list(found) == ["dense", "dense, folded", "dense, openvino", "frozen"]
    speed = {row["network"]: row["speed_up"] for row in runs.contest_records(found, 1)}
    assert speed == {"dense": 0.5, "dense, folded": 4 / 6, "dense, openvino": 1.0, "frozen": 4 / 3}
    assert [row[-1] for row in runs.contest_rows(found, 1)] == ["0.50x", "0.67x", "1.00x", "1.33x"]
