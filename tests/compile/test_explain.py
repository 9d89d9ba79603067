"""explain: what runs, why, and what it takes."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn

import stripe_kernels
from stripe_kernels import StripeConv2d, explain, freeze, tune
from tests.compile.zoo import masked, small

# The package's attribute is the function.
optimizer = importlib.import_module("stripe_kernels.compile.optimize")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = small()
    untuned = explain(model, x)
    printed = capsys.readouterr().out
    assert "density" in printed
    assert "total" in printed
    assert [r["layer"] for r in untuned.rows] == ["0", "2"]
    row = untuned.rows[0]
    assert row["density"] == model[0].density
    assert row["macs"] == 2 * 9 * 8 * model[0].weight.shape[0] * 4
    assert row["dense_macs"] == 2 * 9 * 8 * 8 * 9 * 4
    assert row["measured_ms"] is None
    assert {c["kernel"] for c in row["candidates"]} <= set(stripe_kernels.list_kernels())
    tune(model, x, seconds=0.01)
    tuned = explain(model, x)
    assert all(r["measured_ms"] and r["dense_ms"] for r in tuned.rows)
    assert "fastest of" in tuned.rows[0]["reason"]
    assert json.loads(json.dumps(tuned.as_dict())) == tuned.as_dict()


def test_totals_are_the_networks(capsys: pytest.CaptureFixture[str]) -> None:
    """Every convolution and linear layer counts; what is not striped has lines of its own, and times when asked."""
    twice = nn.Conv2d(4, 4, 1)
    layers = [nn.Conv2d(3, 4, 3), twice, twice, nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 2, 2, 2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * 12 * 10, 5))
    frozen = freeze(model, {"3": torch.rand(6, 3, 3) < 0.5})
    x = torch.randn(2, 3, 10, 9)
    found = explain(frozen, x)
    assert found.ordinary[0]["macs"] == 2 * 8 * 7 * 4 * 27
    convolutions = 2 * (8 * 7 * (4 * 27 + 2 * 16) + 6 * 5 * 6 * 2 * 4)
    dense, live = (2 * 6 * 5 * stripes * 2 for stripes in (54, found.rows[0]["live"]))
    linear = 2 * 240 * 5
    assert [(part["layer"], part["macs"], part["dense_macs"]) for part in found.parts] == [
        ("1 stripe layer", live, dense),
        ("4 ordinary convolutions", convolutions, convolutions),
        ("1 linear layer", linear, linear),
    ]
    assert found.total["dense_macs"] == dense + convolutions + linear
    assert found.macs_kept == (live + convolutions) / (dense + convolutions)
    assert found.total["measured_ms"] is None
    assert found.total["predicted_ms"] is None  # a transposed convolution has no prediction
    without = explain(nn.Sequential(*frozen[:4], nn.Flatten(), nn.Linear(6 * 6 * 5, 5)), x)
    times = [row["predicted_ms"] for row in [*without.rows, *without.ordinary]]
    assert len(times) == 5
    assert without.total["predicted_ms"] == pytest.approx(sum(times))
    assert "4 ordinary convolutions" in capsys.readouterr().out
    same = explain(StripeConv2d.from_conv2d(layers[0]), x)
    assert found.ordinary[0]["predicted_ms"] == pytest.approx(
        next(c["predicted_ms"] for c in same.rows[0]["candidates"] if c["kernel"] == "dense")
    )
    tune(frozen, x, seconds=0.01)
    timed = explain(frozen, x, seconds=0.01)
    assert timed.total["measured_ms"] == pytest.approx(
        timed.rows[0]["measured_ms"] + sum(row["measured_ms"] for row in timed.ordinary)
    )
    nothing = explain(model, x)
    assert nothing.total["dense_macs"] == found.total["dense_macs"]
    assert capsys.readouterr().out.splitlines()[-5].startswith("no stripe layer")


def test_explain_an_optimized_network() -> None:
    _, frozen, x = masked("resnet20", 0.24)
    network = optimizer.compact(frozen, (x,))
    found = explain(network, x)
    rows = found.rows
    assert len(rows) == 21
    assert {row["kind"] for row in found.ordinary} == {"linear layer"}
    assert not any(row["layer"].startswith("body.") for row in [*rows, *found.ordinary])
    assert any("residual" in r["epilogue"] and "relu" in r["epilogue"] for r in rows)
