"""`iessp reproduce`: trials of several runs, chosen from by their mean, killed anywhere and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from iessp import reproduce
from iessp.recipe import Recipe, read
from tests.iessp.test_train import TINY, few_digits

METHODS = ["dense", "random"]
RECIPE = TINY.but(
    trials={method: [{"lr": 0.05}, {"lr": 0.2}] for method in METHODS}, trial_epochs=1, trial_seeds=2
)

KILLED = """
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.iessp import test_reproduce as t
import iessp.train
t.torch.set_num_threads(1)  # no thread pool: a fork has none of its parent's threads
iessp.train.SAVE_SECONDS = 0.0
splits, chance = t.few_digits(), random.Random(0)
for kill in range(11):
    heard, said = os.pipe()
    child = os.fork()
    if not child:
        t.reproduce.train_with_bar = lambda trainer, title: trainer.run(lambda step: os.write(said, b"."))
        t.table(splits, Path({folder!r}))
        os._exit(0)
    os.close(said)
    if kill < 10:
        for _ in range(chance.randint(2, 12)):
            os.read(heard, 1)
        os.kill(child, signal.SIGKILL)
    else:
        while os.read(heard, 1):
            pass
    os.close(heard)
    # At once: the next child would say again what is not yet written.
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def table(splits: Any, out: Path) -> dict[str, Any]:
    reproduce.busy = lambda: "no figures here"  # type: ignore[assignment]
    return json.loads(reproduce.run(RECIPE, splits, out, METHODS, 1, "cpu").read_text())


def test_killed_at_ten_moments_the_table_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reproduce, "busy", None)  # and back, after table has put another there
    torch.set_num_threads(1)
    whole = table(few_digits(), tmp_path / "whole")
    folder = tmp_path / "killed"
    code = KILLED.format(root=str(Path(__file__).parents[2]), folder=str(folder))
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ends = [int(line.split()[1]) for line in said.stdout.splitlines() if line.startswith("ended ")]
    assert ends == [-signal.SIGKILL] * 10 + [0]
    killed = json.loads((folder / "table.json").read_text())
    assert killed == whole
    runs = [(run["method"], run["changes"]["lr"], run["trial_seed"]) for run in killed["trials"]]
    assert runs == [(m, lr, seed) for m in METHODS for lr in (0.05, 0.2) for seed in (1000, 1001)]
    for row in killed["rows"]:
        results = json.loads((folder / row["method"] / "0/results.json").read_text())
        assert results["recipe"]["lr"] == killed["chosen"][row["method"]]["lr"]


def test_trials_have_seeds_of_their_own_and_the_starts_of_cells() -> None:
    recipe = read("resnet20-few-cifar10")
    assert recipe.trial_seeds == 3
    runs = [reproduce.trial_of(recipe, "iem", {"lr": 0.2}, draw) for draw in range(3)]
    assert [(run.seed, run.lr, run.epochs) for run in runs] == [(1000 + d, 0.2, 40) for d in range(3)]
    for draw, run in enumerate(runs):
        assert run.before() == reproduce.cell_of(recipe, "iem", {}, draw).before()
    one_start = read("vgg10-small-cifar10")
    before = [reproduce.trial_of(one_start, "iem", {}, draw).before() for draw in range(2)]
    assert before[0] == before[1] == reproduce.cell_of(one_start, "iem", {}, 5).before()
    assert not reproduce.trial_of(RECIPE, "dense", {}, 0).pretrain


def test_a_run_is_the_same_whatever_was_tried_before_it() -> None:
    """So that folders and checkpoints of before trials had several seeds go on."""
    recipe = read("vgg10-few-cifar10")
    before = reproduce.cell_of(recipe, "iem", {"lr": 0.2}, 1).as_dict()
    del before["trial_seeds"]
    others = recipe.but(trial_seeds=7, trials={}, trial_epochs=3)
    assert reproduce.cell_of(others, "iem", {"lr": 0.2}, 1) == Recipe.from_dict(before)


def test_a_lucky_run_does_not_choose() -> None:
    found = (("a", 0.50), ("a", 0.40), ("b", 0.46), ("b", 0.46), ("c", 0.41), ("c", 0.45))
    tried = [{"changes": {"model": name}, "held_out_accuracy": accuracy} for name, accuracy in found]
    assert reproduce.chosen(tried) == {"model": "b"}
    assert reproduce.chosen([]) == {}
