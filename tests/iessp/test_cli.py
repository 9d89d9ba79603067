"""The command line: it explains itself, and what a user can put right ends with one line and status 2."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from iessp import cli, demo, reproduce
from iessp.recipe import Recipe, bundled, parse_changes, read


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["iessp", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def words(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.out + captured.err)
    return " ".join(plain.split())


@pytest.mark.parametrize("command", [(), ("train",), ("freeze",), ("bench",), ("demo",)])
def test_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert call(monkeypatch, *command, "--help") == 0
    assert "Usage:" in words(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "digit"), 'unknown recipe "digit": did you mean "digits"?'),
        (("train", "digits", "--set", "modle=vgg16"), 'unknown recipe field "modle": did you mean "model"?'),
        (("train", "digits", "--set", "method=magnitud"), 'did you mean "magnitude"?'),
        (("train", "digits", "--set", "epochs"), '"epochs" is not KEY=VALUE'),
        (("train", "digits", "--set", "epochs=0"), "epochs and batch must be at least 1, got 0 and 64"),
        (("train", "nowhere.toml"), "recipe file nowhere.toml does not exist"),
        (("freeze", "no/such/run"), "no/such/run holds no run: expected no/such/run/checkpoints/step-*.pt"),
        (("trian", "digits"), "No such command 'trian'. Did you mean 'train'?"),
    ],
)
def test_mistakes_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert message in words(capsys).replace("│ ", "")


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
    assert call(monkeypatch, "bench", str(run), "--batch", "2", "--seconds", "0.1") == 0
    assert "speed-up" in words(capsys)
    assert (
        call(monkeypatch, "bench", str(run / "frozen.safetensors"), "--batch", "1", "--seconds", "0.1") == 0
    )


def test_bundled_recipes_are_valid() -> None:
    assert {"digits", "vgg16-cifar10", "resnet56-cifar10"} <= set(bundled())
    for name in bundled():
        recipe = read(name)
        assert recipe.name == name
        assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_changes_are_values_as_in_toml() -> None:
    changes = parse_changes(["epochs=3", "lr=1e-2", "model=resnet20", "sizes=[[0.0, 16]]", "packed=false"])
    assert changes == {"epochs": 3, "lr": 0.01, "model": "resnet20", "sizes": [[0.0, 16]], "packed": False}
    assert read("digits").but(**changes).size(0.5) == 16


def test_threads_option(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        call(monkeypatch, "freeze", "nowhere")
        assert torch.get_num_threads() == before
        call(monkeypatch, "bench", "nowhere", "--threads", "1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_reproduce_makes_a_table_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(reproduce, "LATENCY_SECONDS", 0.05)
    small = ["model=resnet20", "width=0.25", "epochs=1", "batch=256", "sizes=[[0.0, 8]]", "budget=0.5"]
    changes = [part for change in small for part in ("--set", change)]
    methods = ["--method", "slim", "--method", "iem(message=false)"]
    for attempt in range(2):
        out = str(tmp_path)
        assert call(monkeypatch, "reproduce", "digits", "--out", out, "--seeds", "1", *methods, *changes) == 0
        assert ("steps done before" in words(capsys)) == bool(attempt)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [("slim", 0), ("iem(message=false)", 0)]
    assert all(0.3 < row["macs_kept"] <= 0.5 for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "iem_message=false/skeletons.png").stat().st_size > 1000


def test_methods_with_parts_taken_away() -> None:
    recipe = reproduce.with_method(read("digits"), "iem(message=false, gain=2.0)")
    assert (recipe.method, recipe.options) == ("iem", {"message": False, "gain": 2.0})
    with pytest.raises(ValueError, match=r'"iem\[" is not METHOD'):
        reproduce.with_method(recipe, "iem[")


def test_demo_compares_and_draws_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "SECONDS", 0.05)
    monkeypatch.setattr(demo, "BATCHES", (2,))
    small = ["model=resnet20", "width=0.25", "epochs=1", "batch=256", "sizes=[[0.0, 8]]", "budget=0.5"]
    changes = [part for change in small for part in ("--set", change)]
    for attempt in range(2):
        assert call(monkeypatch, "demo", "--out", str(tmp_path), *changes) == 0
        said = words(capsys)
        assert ("steps done before" in said) == bool(attempt)
        assert all(
            w in said
            for w in ("test errors", "convolution MACs", "ms, batch 2, optimized", "inside the error budget")
        )
    for picture in ("skeletons.png", "time-against-macs.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    assert (tmp_path / "frozen.safetensors").stat().st_size < (tmp_path / "dense.safetensors").stat().st_size
