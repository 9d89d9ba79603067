"""The command line explains itself; what a user can put right ends with one line and status 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

import iessp
import stripe_kernels
from iessp import cli
from iessp.models import MODELS
from tests.iessp.cli.run import call, factories, words

VERBS = ("demo", "train", "prune", "freeze", "optimize", "bench", "explain", "report", "reproduce", "doctor")


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
        (("train", "digits", "--set", "epochs=0"), "epochs must be at least 1 and below inf, got 0"),
        (("train", "digits", "--set", "wdith=0.5"), 'unknown recipe field "wdith": did you mean "width"?'),
        (("train", "digits", "--set", "width=0"), "width must be positive, got 0"),
        (("train", "digits", "--set", "colour=1"), 'unknown recipe field "colour": Valid: name, model'),
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
            ("explain", "factories_of_a_user:sequental"),
            'unknown factory of factories_of_a_user "sequental": did you mean "Sequential"?',
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
            ("freeze", "factories_of_a_user:make", "--weights", "frozen.pt"),
            "frozen.pt does not fit Sequential: it is of a frozen network: stripe_kernels.save writes",
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
    live = {"0": torch.ones(12, 3, 3).triu().bool()}
    torch.save(stripe_kernels.freeze(factories()["make"](), live).state_dict(), here / "frozen.pt")
    torch.save({name: {"0.bias": torch.zeros(1)} for name in ("ema", "net")}, here / "several.pt")
    torch.save([torch.zeros(1)], here / "list.pt")
    torch.save(nn.Conv2d(1, 1, 1), here / "whole.pt")
    (here / "empty.pt").touch()
    assert call(monkeypatch, *arguments, "--json") == 1
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert message in json.loads(captured.out)["error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["explain", "nowhere", "--json"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_the_output_ends_with_one_line(arguments: list[str], buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "iessp", *arguments]
        ran = subprocess.run(
            program, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert ran.returncode == (2 if "nowhere" in arguments else 1)
    assert ran.stderr.startswith("error: ")
    assert len(ran.stderr.splitlines()) == 1


def test_a_page_that_cannot_be_written_leaves_the_one_before_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (here / "page.html").write_text("of yesterday")
    monkeypatch.setattr(os, "fsync", full)
    assert call(monkeypatch, "explain", "factories_of_a_user:make", "--html", "page.html") == 1
    assert "No space left on device: 'page.html'" in words(capsys)
    assert (here / "page.html").read_text() == "of yesterday"


def test_a_defect_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_recipe", lambda *_: {}["missing"])
    monkeypatch.setattr(sys, "argv", ["iessp", "train", "digits"])
    with pytest.raises(KeyError, match="missing"):
        cli.main()


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


def test_threads_option(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        call(monkeypatch, "freeze", "nowhere")
        assert torch.get_num_threads() == before
        call(monkeypatch, "bench", "nowhere", "--threads", "1", "--seconds", "0")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
