"""Verbs that read a network: optimize, bench, explain, report; and doctor."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import stripe_kernels
from iessp.report_page import accuracy_points
from stripe_kernels.compile.race import Ratio
from tests.iessp.cli.run import answer, call, factories, words

ROOT = Path(__file__).parents[3]


def numbers(found: Any) -> set[str]:
    """Keys of numbers, however deep."""
    if isinstance(found, list):
        return set().union(*map(numbers, found))
    if not isinstance(found, dict):
        return set()
    own = {
        key for key, value in found.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return own.union(*map(numbers, found.values()))


def test_prune_optimize_explain_bench_report_of_a_users_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    """The way from a factory and its trained weights to one page, every step by the command line."""
    spec = "factories_of_a_user:with_example"
    torch.manual_seed(3)
    trained = factories()["make"]()
    weights = {f"module.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "net": weights}, "trained.pt")

    given = (spec, "--weights", "trained.pt", "--budget", "30%")
    pruned = answer(monkeypatch, capsys, "prune", *given, "-o", "p.safetensors")
    assert 0.2 < pruned["macs_kept"] <= 0.3
    assert pruned["dense_macs"] == 20 * 14 * 12 * 27 + 9 * 6 * 16 * 12 * 9
    assert pruned["macs"] == round(pruned["macs_kept"] * pruned["dense_macs"])
    assert pruned["bytes"] == Path("p.safetensors").stat().st_size
    loaded = stripe_kernels.load("p.safetensors")
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, stripe_kernels.StripeConv2d)}
    assert {row["layer"]: row["live"] for row in pruned["layers"]} == {
        n: m.weight.shape[0] for n, m in layers.items()
    }
    kept = layers["3"].dense_weight()
    assert torch.equal(kept, torch.where(kept != 0, trained[3].weight, 0))

    optimized = answer(monkeypatch, capsys, "optimize", "p.safetensors", "-o", "o.safetensors")
    assert isinstance(stripe_kernels.load("o.safetensors"), stripe_kernels.Network) == optimized["rewritten"]
    explained = answer(
        monkeypatch, capsys, "explain", "p.safetensors", "--html", "deep/e.html", "--batch", "2"
    )
    assert [row["layer"] for row in explained["layers"]] == ["0", "3"]
    assert explained["layers"][0]["input"] == [2, 3, 20, 14]  # of the factory's example, kept by the files
    resized = answer(monkeypatch, capsys, "explain", "o.safetensors", "--input", "3x9x8")
    assert resized["layers"][0]["input"] == [1, 3, 9, 8]
    assert "<svg" in Path("deep/e.html").read_text()
    timed = answer(monkeypatch, capsys, "bench", "p.safetensors", "--batch", "1", "--seconds", "0")
    assert [row["network"] for row in timed["networks"]][:2] == ["dense", "dense, folded"]
    assert {row["network"] for row in timed["networks"]} >= {"dense, optimized", "frozen"}
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in timed["networks"])
    best = min(row["ms"] for row in timed["networks"] if row["network"].startswith("dense"))
    assert all(row["speed_up"] == pytest.approx(best / row["ms"]) for row in timed["networks"])
    told = answer(monkeypatch, capsys, "report", "p.safetensors", "--seconds", "0")
    assert all(row["measured_ms"] and row["share_of_peak"] for row in told["layers"])
    assert told["total"]["measured_ms"] == pytest.approx(sum(part["measured_ms"] for part in told["parts"]))
    for found in (explained, told):  # one network, one share; the multiply-adds are of one call
        assert found["macs_kept"] == pytest.approx(pruned["macs_kept"])
        images = found["input"][0]
        assert found["total"]["dense_macs"] == images * (pruned["dense_macs"] + 160)
        assert found["total"]["macs"] == images * (pruned["macs"] + 160)
        assert [part["layer"] for part in found["parts"]] == ["2 stripe layers", "1 linear layer"]
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/cli.md").read_text()))
    for found in (pruned, optimized, explained, timed, told):
        assert numbers(found) <= documented, "docs/cli.md lists the words of --json"
    page = Path("report.html").read_text()
    assert all(word in page for word in ("Whole network", "Roofline", "iessp train digits"))


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "versions": {"torch": "2"}, "processor": {"name": "A", "cores": 2, "isas": []}, "threads": 1, "gpus": [],
        "compilers": {"nvcc": None}, "missing": {"triton": "triton is not installed"},
        "cache": {"folder": "/c", "files": 2, "bytes": 9, "unreadable": 1, "writable": False},
        "kernels": {"dense": {"state": "automatic", "reason": None, "checks": 3, "failures": []}},
        "self_test": {"device": "cpu", "checks": 3, "failures": 0},
    }  # fmt: skip
    monkeypatch.setattr(stripe_kernels, "diagnose", lambda seconds: found)
    assert answer(monkeypatch, capsys, "doctor") == {**found, "failed": False}
    found["kernels"]["dense"]["failures"].append("fprop is off by 1")
    assert call(monkeypatch, "doctor") == 1
    said = words(capsys)
    for part in (
        "nvcc: absent",
        "1 damaged",
        "NOT WRITABLE",
        "triton is not installed",
        "off by 1",
        "1 WRONG",
    ):
        assert part in said


def test_points_of_accuracy_from_records(here: Path) -> None:
    """Runs of one method are a point with a spread; the run shown is a point of its own."""
    for folder, method, errors in (("a", "iem", 2), ("b", "iem", 4), ("c", "dense", 1)):
        results = {
            "recipe": {"method": method}, "test_errors": errors, "images": {"test": 100}, "macs_kept": 0.25,
            "latency": {"1": {"frozen": 3.0}},
        }  # fmt: skip
        (here / "runs" / folder).mkdir(parents=True)
        (here / "runs" / folder / "results.json").write_text(json.dumps(results))
    together = {p["name"]: p for p in accuracy_points([here / "runs"], None, None)}
    assert together["iem"]["accuracy"] == pytest.approx(0.97)
    assert together["iem"]["spread"] == pytest.approx(0.0141, abs=1e-4)
    assert together["dense"]["spread"] is None
    apart = {p["name"]: p for p in accuracy_points([], here / "runs" / "a", 2.5)}
    assert (apart["iem, this run"]["accuracy"], apart["iem, this run"]["ms"]) == (0.98, 2.5)
    assert [p["mine"] for p in apart.values()] == [True, False, False]


def test_what_kept_a_network_as_it_was_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    answer(monkeypatch, capsys, "prune", "factories_of_a_user:with_example", "-o", "p.safetensors")
    optimizer = importlib.import_module("stripe_kernels.compile.optimize")
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(1.0, 1.0, 1.0))
    assert call(monkeypatch, "optimize", "p.safetensors", "-o", "o.safetensors") == 0
    assert words(capsys).count("no clear gain") == 1


def test_a_network_without_zeros_is_timed_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert call(monkeypatch, "bench", "factories_of_a_user:with_example", "--seconds", "0") == 0
    assert words(capsys).count("warning: freeze found no stripe") == 1
