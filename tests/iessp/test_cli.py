"""The command line: it explains itself, what a user can put right ends with one line and status 2, and --json
leaves stdout to the machine."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from torch.nn.utils import prune

import iessp
import stripe_kernels
from iessp import cli, cli_work, demo, dense, latency, reproduce
from iessp.latency import Latency
from iessp.models import MODELS
from iessp.recipe import Recipe, bundled, parse_changes, read
from iessp.report_page import accuracy_points


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["iessp", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def words(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.out + captured.err)
    return " ".join(plain.split())


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


ROOT = Path(__file__).parents[2]
VERBS = ("demo", "train", "prune", "freeze", "optimize", "bench", "explain", "report", "reproduce", "doctor")
SMALL = ["model=resnet20", "width=0.25", "epochs=1", "batch=256", "sizes=[[0.0, 8]]", "budget=0.5"]
FACTORIES = """
import torch
from torch import nn

def make():
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def with_example():
    return make(), torch.zeros(5, 3, 20, 14)

def broken():
    raise KeyError("weights")

def number():
    return 3

def linear():
    return nn.Linear(3, 3)

def script():
    raise SystemExit(2)
"""


def factories() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(FACTORIES, namespace)
    return namespace


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that decide nothing here take the least time they can."""
    optimizer = importlib.import_module("stripe_kernels.compile.optimize")
    monkeypatch.setattr(optimizer, "_RACE_SECONDS", 0.01)
    monkeypatch.setattr(optimizer, "tune", partial(stripe_kernels.tune, seconds=0.0))
    monkeypatch.setattr(cli_work, "TUNE_SECONDS", 1e-3)
    monkeypatch.setattr(dense, "_NEEDS", {})  # exports take seconds; test_dense.py has them


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty working directory with a user's module in it, and a cache of choices of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "factories_of_a_user.py").write_text(FACTORIES)
    yield tmp_path
    sys.modules.pop("factories_of_a_user", None)


def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What --json prints; text for people must be on stderr, or reading it fails."""
    assert call(monkeypatch, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_every_verb_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 0
    said = words(capsys)
    assert all(f"│ {verb} " in said for verb in VERBS)
    assert {command.callback.__name__ for command in cli.app.registered_commands if command.callback} == set(
        VERBS
    )


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert words(capsys) == f"iessp, stripe_kernels {stripe_kernels.__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_suffices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Usage, an example that the parser takes, --json; every option has a word of help."""
    assert call(monkeypatch, verb, "--help") == 0
    said = words(capsys)
    assert f"Usage: iessp {verb}" in said
    assert "--json" in said
    assert "<bool>" not in said  # a flag takes no value
    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    if any(parameter.name == "model" for parameter in command.params):
        assert all(name in said for name in MODELS)
    assert all(parameter.help for parameter in command.params)
    example = re.sub(r"\x1b\[[0-9;]*m|\[/?(bold)?\]", "", command.epilog).removeprefix("Example: ")
    assert example.split()[:2] == ["iessp", verb]
    command.make_context(verb, shlex.split(example)[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "digit"), 'unknown recipe "digit": did you mean "digits"?'),
        (("train", "digits", "--set", "modle=vgg16"), 'unknown recipe field "modle": did you mean "model"?'),
        (("train", "digits", "--set", "method=magnitud"), 'did you mean "magnitude"?'),
        (("train", "digits", "--set", "epochs"), '"epochs" is not KEY=VALUE'),
        (("train", "digits", "--set", "epochs=0"), "epochs and batch must be at least 1, got 0 and 64"),
        (("train", "nowhere.toml"), "recipe file nowhere.toml does not exist"),
        (("freeze", "no/such/run"), "no/such/run does not exist"),
        (("freeze", "."), ". holds no run: expected checkpoints/step-*.pt"),
        (("train", "digits", "--device", "gpu"), 'unknown device "gpu": did you mean "cpu"?'),
        (("train", "digits", "--device", "cuda:64"), 'no "cuda:64": see iessp doctor'),
        (("doctor", "--threads", "100000"), "'--threads': Input should be less than or equal to"),
        (("trian", "digits"), "No such command 'trian'. Did you mean 'train'?"),
        (("train", "digits", "--epochs", "3"), "No such option: --epochs"),
        (("prune",), "Missing argument 'MODEL'. (iessp prune --help)"),
        (("prune", "vgg61"), 'unknown model "vgg61": did you mean "vgg16"?'),
        (("prune", "resnet20", "--method", "magnitud"), 'did you mean "magnitude"?'),
        (
            ("prune", "resnet20", "--method", "iem"),
            "iem learns while it trains: iessp train RECIPE --set method=iem",
        ),
        (("prune", "resnet20", "--budget", "2"), "budget is a share of MACs in (0, 1], got 2.0"),
        (
            ("prune", "resnet20", "--budget", "100%"),
            "a budget of 100% needs nothing cut of 40.8 M multiply-adds",
        ),
        (
            ("prune", "mobilenetv2", "--input", "3x32x32", "--budget", "0.1"),
            "which attach(..., pointwise=True), iessp prune --pointwise and iessp train --set pointwise=true gate too",
        ),
        (("prune", "resnet20", "--budget", "fast"), "or a time such as \"2.5 ms\", got 'fast'"),
        (("prune", "resnet20", "--input", "3x20"), '--input "3x20" is not CxHxW, as in 3x32x32'),
        (
            ("optimize", "factories_of_a_user:make", "--input", "1x32x32"),
            "factories_of_a_user:make does not take images 1x32x32 (--input): Given groups=1",
        ),
        (
            ("prune", "resnet20", "--exclude", "stem.1"),
            'unknown convolution "stem.1": did you mean "stem.0"?',
        ),
        (("explain", "no_such_module:make"), 'no module "no_such_module"'),
        (
            ("explain", "factories_of_a_user:mkae"),
            'unknown factory of factories_of_a_user "mkae": did you mean "make"?',
        ),
        (
            ("explain", "factories_of_a_user.py:number"),
            "returned int 3: expected nn.Module, or (nn.Module, Tensor)",
        ),
        (("explain", "factories_of_a_usr.py:make"), "did you mean factories_of_a_user.py?"),
        (
            ("explain", "factories_of_a_user.py"),
            "needs the name of a factory: factories_of_a_user.py:make, factories_of_a_user.py:with_example",
        ),
        (("explain", "factories_of_a_user:linear"), "factories_of_a_user:linear has no nn.Conv2d"),
        (("train", "digits", "--set", "model=factories_of_a_user.py"), "needs the name of a factory: "),
        (("bench", "resnet20", "--weights", "gone.pt"), "gone.pt does not exist"),
        (("bench", "resnet20", "--weights", "."), ". is a folder: a file is needed"),
        (("bench", "resnet20", "--threads"), "'--threads' requires an argument. (iessp bench --help)"),
        (("train", "digits", "--out", "notes.toml"), '"notes.toml" is a file: a folder is needed'),
        (("train", "notes.toml"), "notes.toml is not TOML: "),
        (("freeze", "notes.pt"), "notes.pt cannot be read: it is no file of torch.save"),
        (
            ("explain", "notes.toml"),
            "notes.toml is none of what MODEL can be: a file that stripe_kernels.save wrote, ",
        ),
        (("prune", "resnet20", "-o", "pruned.onnx"), '"pruned.onnx" does not end in .safetensors'),
        (("optimize", "resnet20", "-o", "."), '"." is a folder'),
        (("report", "resnet20", "-o", "page.pdf"), '"page.pdf" does not end in .html'),
        (
            ("optimize", "resnet20", "-o", "notes.toml/a.safetensors"),
            'notes.toml" is no folder to write into',
        ),
        (("report", "resnet20", "--no-measure", "--runs", "."), "has no records: expected table.json"),
    ],
)
def test_mistakes_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    here: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    for name in ("notes.toml", "notes.pt"):
        (here / name).write_text("to do = nothing\n")
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "torn.safetensors"), "torn.safetensors is not a whole safetensors file"),
        (("explain", "factories_of_a_user:broken"), "factories_of_a_user:broken raised KeyError: 'weights'"),
        (
            ("explain", "factories_of_a_user:script"),
            'script ended the program: what a script does belongs below if __name__ == "__main__"',
        ),
        (("freeze", "factories_of_a_user:make"), "nothing to freeze: iessp prune makes some"),
        (
            ("bench", "factories_of_a_user:make", "--weights", "other.pt"),
            "other.pt does not fit Sequential: Missing key",
        ),
        (
            ("freeze", "factories_of_a_user:make", "--weights", "gated.pt"),
            "gated.pt does not fit Sequential: its model had gates or other parametrizations",
        ),
        (
            ("bench", "factories_of_a_user:make", "--weights", "several.pt"),
            "several.pt holds several state_dicts: ema, net; save the one to take",
        ),
        (("bench", "resnet20", "--weights", "empty.pt"), "empty.pt cannot be read: "),
        (("bench", "resnet20", "--weights", "list.pt"), "list.pt holds a list, not a state_dict"),
        (("bench", "resnet20", "--weights", "torn.safetensors"), "torn.safetensors cannot be read: "),
        (
            ("bench", "resnet20", "--weights", "whole.pt"),
            "whole.pt cannot be read: it holds more than tensors",
        ),
    ],
)
def test_failures_end_with_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    here: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (here / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save({"3.bias": torch.zeros(16)}, here / "other.pt")
    torch.save(iessp.attach(factories()["make"]()).state_dict(), here / "gated.pt")
    torch.save({name: {"0.bias": torch.zeros(1)} for name in ("ema", "net")}, here / "several.pt")
    torch.save([torch.zeros(1)], here / "list.pt")
    torch.save(nn.Conv2d(1, 1, 1), here / "whole.pt")
    (here / "empty.pt").touch()
    assert call(monkeypatch, *arguments, "--json") == 1
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert message in json.loads(captured.out)["error"]


def test_a_defect_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_recipe", lambda *_: {}["missing"])
    monkeypatch.setattr(sys, "argv", ["iessp", "train", "digits"])
    with pytest.raises(KeyError, match="missing"):
        cli.main()


def test_prune_optimize_explain_bench_report_of_a_users_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    """The way from a factory and its trained weights to one page, every step by the command line."""
    spec = "factories_of_a_user:with_example"
    torch.manual_seed(3)
    trained = factories()["make"]()
    weights = {f"module.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "net": weights}, "trained.pt")

    pruned = answer(
        monkeypatch,
        capsys,
        "prune",
        spec,
        "--weights",
        "trained.pt",
        "--budget",
        "30%",
        "-o",
        "p.safetensors",
    )
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


def test_completion() -> None:
    """As bash asks for it: the verbs, a verb's models."""

    def complete(line: str) -> list[str]:
        asked = {
            "_IESSP_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        program = [sys.executable, "-m", "iessp"]
        ran = subprocess.run(program, env=os.environ | asked, capture_output=True, text=True, check=True)
        return ran.stdout.split()

    assert complete("iessp ex") == ["explain"]
    assert complete("iessp bench resnet5") == ["resnet56", "resnet50"]


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


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [("epochs", "abc", "int"), ("epochs", 1.5, "int"), ("lr", "fast", "float"), ("sizes", 3, "tuple"),
     ("budget", [], "float or str"), ("adaptive", 1, "bool"), ("seed", True, "int")],
)  # fmt: skip
def test_a_recipe_says_what_a_field_takes(field: str, value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{field} takes {kind}, got "):
        read("digits").but(**{field: value})


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
        call(monkeypatch, "bench", "nowhere", "--threads", "1", "--seconds", "0")
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


def test_another_method_begins_without_options() -> None:
    recipe = read("digits")
    assert recipe.options == {"exact": False}
    assert recipe.but(epochs=1).options == recipe.options
    assert recipe.but(method="magnitude").options == {}
    assert recipe.but(method="magnitude", options={"seed": 1}).options == {"seed": 1}


def test_methods_with_parts_taken_away() -> None:
    recipe = reproduce.with_method(read("digits"), "iem(message=false, gain=2.0)")
    assert (recipe.method, recipe.options) == ("iem", {"message": False, "gain": 2.0})
    fixed = reproduce.with_method(recipe, "iem(adaptive=false, kappa=0, message=false)")
    assert (fixed.adaptive, fixed.kappa, fixed.options) == (False, 0, {"message": False})
    assert all(reproduce.with_method(recipe, method).method == "iem" for method in reproduce.ABLATION)
    with pytest.raises(ValueError, match=r'"iem\[" is not METHOD'):
        reproduce.with_method(recipe, "iem[")


def test_options_that_a_method_was_written_with_outlast_its_trials() -> None:
    chosen = {"lr": 0.3, "options": {"alpha": 0.01}}
    cell = reproduce.cell_of(read("digits"), "filter-skeleton(decay=0)", chosen, 7)
    assert (cell.seed, cell.lr, cell.options) == (7, 0.3, {"decay": 0, "alpha": 0.01})
    cell = reproduce.cell_of(read("digits"), "filter-skeleton(alpha=0.003, decay=0)", chosen, 7)
    assert (cell.lr, cell.options) == (0.3, {"decay": 0, "alpha": 0.003})


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
    following = re.findall(r"iessp (?:report|optimize) \S+", said)
    assert following == [f"iessp report {tmp_path}/pruned", f"iessp optimize {tmp_path}/frozen.safetensors"]
    assert call(monkeypatch, *following[0].split()[1:], "--no-measure", "-o", str(tmp_path / "r.html")) == 0
    assert call(monkeypatch, "explain", str(tmp_path)) == 2
    assert f"its runs are {tmp_path}/pruned, {tmp_path}/dense" in words(capsys)
    for picture in ("skeletons.png", "time-against-macs.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    assert (tmp_path / "frozen.safetensors").stat().st_size < (tmp_path / "dense.safetensors").stat().st_size
