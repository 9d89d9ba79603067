"""Verbs that make files: demo, train, prune, freeze, reproduce; with --json stdout is the machine's."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

import stripe_kernels
from iessp import cli, demo, latency, reproduce
from iessp.latency import Latency
from tests.iessp.cli.run import answer, call, factories, words

FIELDS = ("model=resnet20", "width=0.25", "epochs=1", "batch=256", "sizes=[[0.0, 8]]", "budget=0.5")
SMALL = tuple(part for field in FIELDS for part in ("--set", field))


def test_freeze_counts_the_stripes_of_an_optimized_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    pruned = answer(monkeypatch, capsys, "prune", "factories_of_a_user:with_example", "-o", "p.safetensors")
    example = torch.zeros(1, 3, 20, 14)
    network = importlib.import_module("stripe_kernels.compile.optimize").compact(
        stripe_kernels.load("p.safetensors"), (example,)
    )
    stripe_kernels.save(network, "o.safetensors", example)
    frozen = answer(monkeypatch, capsys, "freeze", "o.safetensors", "-o", "f.safetensors")
    live = {row["layer"]: row["live"] for row in pruned["layers"]}
    assert {row["layer"]: row["live"] for row in frozen["layers"]} == live
    assert 0 < frozen["macs"] <= pruned["macs"]
    assert frozen["macs_kept"] < 0.5


def test_weights_of_a_masked_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    model = factories()["make"]()
    stripes = model[3].weight.norm(dim=1, keepdim=True)
    prune.custom_from_mask(model[3], "weight", (stripes > stripes.median()).expand_as(model[3].weight))
    torch.save(model.state_dict(), "masked.pt")
    frozen = answer(monkeypatch, capsys, "freeze", "factories_of_a_user:make", "--weights", "masked.pt")
    assert frozen["layers"] == [
        {"layer": "3", "live": int((stripes > stripes.median()).sum()), "stripes": 144, "filters": 16}
    ]


def test_train_a_users_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    changes = (
        "--set",
        "model=factories_of_a_user.py:make",
        "--set",
        "epochs=1",
        "--set",
        "sizes=[[0.0, 8]]",
        "--set",
        "budget=0.5",
    )
    found = answer(monkeypatch, capsys, "train", "digits", "--out", "run", *changes)
    assert 0.3 < found["macs_kept"] <= 0.5
    frozen = answer(monkeypatch, capsys, "freeze", "run")
    assert frozen["macs_kept"] == pytest.approx(found["macs_kept"])
    wide = ("train", "digits", "--out", "wide", *changes, "--set", "width=0.5")
    assert call(monkeypatch, *wide) == 2
    assert "has one width" in words(capsys)


def test_prune_by_milliseconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    prices = Latency(fixed=1.0, per_stripe={"0": 0.001, "3": 0.01}, batch=1, threads=1)
    monkeypatch.setattr(latency, "measure", lambda *_: prices)
    found = answer(monkeypatch, capsys, "prune", "factories_of_a_user.py:make", "--budget", "1.5 ms")
    live = {row["layer"]: row["live"] for row in found["layers"]}
    assert 1.4 < 1.0 + 0.001 * live["0"] + 0.01 * live["3"] <= 1.5
    assert call(monkeypatch, "prune", "factories_of_a_user.py:make", "--budget", "1 ms") == 2
    assert "out of reach" in words(capsys)
    assert call(monkeypatch, "prune", "factories_of_a_user.py:make", "--budget", "1e9 ms") == 2
    assert "a budget of 1e+09 ms needs nothing cut: batch 1 on 1 thread takes 1 ms without" in words(capsys)


def test_train_freeze_bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'model = "resnet20"\nwidth = 0.25\nepochs = 1\nbatch = 128\nbudget = 0.5\n'
        "sizes = [[0.0, 8]]\ngate_lr = 0.5\n"
    )
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["iessp", "train", str(recipe), "--out", str(run)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    said = words(capsys)
    assert "small: " in said
    assert "of 359 test images right" in said
    assert (run / "results.json").exists()

    assert call(monkeypatch, "freeze", str(run)) == 0
    assert "stripe_kernels.load reads it" in words(capsys)
    assert call(monkeypatch, "report", str(run), "--no-measure", "-o", str(tmp_path / "r.html")) == 0
    assert "iem, this run" in (tmp_path / "r.html").read_text()
    checkpoint = max((run / "checkpoints").glob("*.pt"))  # a slow machine saves on the way too
    assert call(monkeypatch, "bench", str(checkpoint), "--batch", "2", "--seconds", "0") == 0
    assert "speed-up" in words(capsys)


def test_reproduce_makes_a_table_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(reproduce, "LATENCY_SECONDS", 0.05)
    methods = ["--method", "slim", "--method", "iem(message=false)"]
    for attempt in range(2):
        out = str(tmp_path)
        assert call(monkeypatch, "reproduce", "digits", "--out", out, "--seeds", "1", *methods, *SMALL) == 0
        assert ("steps done before" in words(capsys)) == bool(attempt)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [("slim", 0), ("iem(message=false)", 0)]
    assert all(0.3 < row["macs_kept"] <= 0.5 for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "iem_message=false/skeletons.png").stat().st_size > 1000


def test_demo_compares_and_draws_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "SECONDS", 0.05)
    monkeypatch.setattr(demo, "BATCHES", (2,))
    for attempt in range(2):
        assert call(monkeypatch, "demo", "--out", str(tmp_path), *SMALL) == 0
        said = words(capsys)
        assert ("steps done before" in said) == bool(attempt)
        assert all(
            w in said
            for w in ("test errors", "convolution MACs", "ms, batch 2, optimized", "inside the error budget")
        )
    following = re.findall(r"iessp (?:report|optimize) \S+", said)
    assert following == [f"iessp report {tmp_path}/pruned", f"iessp optimize {tmp_path}/frozen.safetensors"]
    assert call(monkeypatch, *following[0].split()[1:], "--no-measure", "-o", str(tmp_path / "r.html")) == 0
    assert call(monkeypatch, "explain", str(tmp_path)) == 2
    assert f"its runs are {tmp_path}/pruned, {tmp_path}/dense" in words(capsys)
    for picture in ("skeletons.png", "time-against-macs.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    assert (tmp_path / "frozen.safetensors").stat().st_size < (tmp_path / "dense.safetensors").stat().st_size
