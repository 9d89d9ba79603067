"""The training loop: resumable at any step with the same bits, whatever stopped it."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import iessp
from iessp import checkpoint
from iessp.data import load
from iessp.data.images import Images, Splits
from iessp.progress import tensorboard_writer, train_with_bar
from iessp.recipe import Recipe
from iessp.runs import results
from iessp.train import Interrupted, Trainer, assemble, count_errors, learning_rate

TINY = Recipe(name="tiny", model="resnet20", width=0.25, epochs=4, batch=16, budget=0.4, crop=1, gate_lr=0.2)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return few_digits()


def few_digits() -> Splits:
    """96 digits at 16x16, 4 + 1 batches' worth."""
    whole = load("digits")

    def few(images: Images, n: int) -> Images:
        return Images(images.x[:n, :, ::2, ::2].contiguous(), images.y[:n])

    return Splits(
        "digits", few(whole.train, 96), few(whole.held_out, 16), few(whole.test, 16), whole.classes,
        whole.mean, whole.std, whole.flip,
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_at(trainer: Trainer, step: int) -> None:
    if step < trainer.steps:
        with pytest.raises(Interrupted, match=f"stopped at step {step} of {trainer.steps}"):
            trainer.run(stop=lambda: trainer.step >= step)


@pytest.mark.parametrize(("method", "packed"), [("iem", True), ("magnitude", False)])
def test_resumed_anywhere_gives_the_same_bits(
    splits: Splits, tmp_path: Path, method: str, packed: bool
) -> None:
    recipe = TINY.but(method=method, packed=packed)
    whole = Trainer(recipe, splits, tmp_path / "whole")
    whole.run()
    assert whole.phase == ("packed" if packed else "settled")
    for step in (1, 5, 13, 18, 22):  # warm, learn, learn, just settled, packed
        stop_at(Trainer(recipe, splits, tmp_path / "parts"), step)
    resumed = Trainer(recipe, splits, tmp_path / "parts")
    assert resumed.step == 22
    resumed.run()
    assert equal(weights(resumed.model), weights(whole.model))
    assert (tmp_path / "parts/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()
    assert whole.shares()[0] == pytest.approx(0.4, abs=0.002)


def test_log_has_every_step_and_phase(splits: Splits, tmp_path: Path) -> None:
    trainer = Trainer(TINY, splits, tmp_path)
    trainer.run()
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, trainer.steps + 1))
    assert list(dict.fromkeys(row["phase"] for row in rows)) == ["warm", "learn", "packed"]
    live = torch.cat([skeleton.flatten() for skeleton in trainer.skeletons.values()])
    assert float(rows[0]["density"]) == 1
    assert float(rows[-1]["density"]) == pytest.approx(float(live.float().mean()), rel=1e-4)
    assert len({row["density"] for row in rows if row["phase"] == "learn"}) > 3, "it falls with the target"
    assert len(checkpoint.saved(tmp_path / "checkpoints")) <= checkpoint.KEPT
    assert trainer.equality["error"] <= trainer.equality["allowed"]


def test_tensorboard_has_every_step_once(splits: Splits, tmp_path: Path) -> None:
    """What a killed run logged beyond its last checkpoint is hidden when it goes on."""
    stop_at(Trainer(TINY, splits, tmp_path), 5)
    lost = Trainer(TINY, splits, tmp_path)
    with tensorboard_writer(tmp_path / "tensorboard", lost.step) as write:
        for _ in range(3):
            write(lost.train_step())  # and killed
    train_with_bar(Trainer(TINY, splits, tmp_path), "resumed", tensorboard=True)
    logged = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[5:]
    for name in ("task_loss", "pressure", "share_soft", "share_hard", "density"):
        scalars = logged.Scalars(name)
        assert [s.step for s in scalars] == list(range(6, 25))
        assert [s.value for s in scalars] == pytest.approx([float(row[name]) for row in rows], rel=1e-5)


def test_two_seeds_differ_and_one_repeats(splits: Splits, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer(TINY.but(seed=seed, epochs=1), splits, tmp_path / name)
        trainer.run()
        found.append(weights(trainer.model))
    assert equal(found[0], found[1])
    assert not torch.equal(found[0]["classifier.weight"], found[2]["classifier.weight"])


def test_a_folder_of_another_recipe_is_refused(splits: Splits, tmp_path: Path) -> None:
    stop_at(Trainer(TINY, splits, tmp_path), 2)
    with pytest.raises(ValueError, match=r"budget: 0\.4 there, 0\.3 asked for"):
        Trainer(TINY.but(budget=0.3), splits, tmp_path)


def test_a_damaged_checkpoint_is_passed_over(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        stop_at(Trainer(TINY, splits, tmp_path), step)
    newest = checkpoint.saved(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-200])
    assert Trainer(TINY, splits, tmp_path).step == 2
    assert f"{newest} cannot be read" in capsys.readouterr().out


def test_what_a_kill_left_half_written_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    half = tmp_path / ".step-00000007.pt.4711.tmp"
    half.write_bytes(b"half")
    path = checkpoint.save(tmp_path, 8, {"step": 8})
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_checkpoints_do_not_outlive_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have higher numbers until the run has caught up."""
    for step in (40, 50):
        (tmp_path / f"step-{step:08}.pt").write_bytes(b"damaged")
    assert checkpoint.load(tmp_path) is None
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" cannot")[2] for line in said] == [
        " be read (it is damaged); going back to the one before it"
    ] * 2
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"step": step})
    assert checkpoint.load(tmp_path) == {"step": 30}
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-00000020.pt", "step-00000030.pt"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        checkpoint.write_atomically(path, full)


def test_results_are_those_of_the_recipe(splits: Splits, tmp_path: Path) -> None:
    """Checkpoints taken away, another recipe in the same folder: the old figures are not the new run's."""
    for budget in (0.5, 0.3, 0.3):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        trainer = Trainer(TINY.but(epochs=1, budget=budget), splits, tmp_path)
        trainer.run()
        found = results(trainer)
        assert found["macs_kept"] == pytest.approx(budget, abs=0.01)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**found, "test_errors": 99}))
    assert results(trainer)["test_errors"] == 99, "the test set is read once"


def test_slim_says_how_thin_it_can_be(splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"budget 1e-05 is out of reach for slim: its thinnest network has 0\.\d{4}"
    ):
        Trainer(TINY.but(method="slim", budget=1e-5), splits, tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def broken(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, broken)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


LONGER = TINY.but(epochs=7)  # 42 steps: a child is killed in its third at the latest, but for a late signal

KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import test_train as t
t.torch.set_num_threads(1)  # no thread pool: a fork has none of its parent's threads
import iessp.train
iessp.train.SAVE_SECONDS = 0.0  # a checkpoint after every step, so that many kills fall into one
splits, folder, chance = t.few_digits(), t.Path({folder!r}), random.Random(0)
for kill in range(11):
    heard, said = os.pipe()
    child = os.fork()
    if not child:
        trainer = t.Trainer(t.LONGER, splits, folder)
        trainer.run(report=lambda step: os.write(said, b"."))
        os._exit(0)
    os.close(said)
    if kill < 10:
        os.read(heard, 1)  # its first step is done
        began = time.monotonic()
        os.read(heard, 1)
        time.sleep(chance.random() * (time.monotonic() - began))
        os.kill(child, signal.SIGKILL)
    os.close(heard)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_at_ten_random_moments_and_resume(splits: Splits, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = Trainer(LONGER, splits, tmp_path / "whole")
    whole.run()
    folder = tmp_path / "killed"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ends = [int(word) for word in said.stdout.split()]
    assert ends == [-signal.SIGKILL] * 10 + [0]
    resumed = Trainer(LONGER, splits, folder)
    assert resumed.step == resumed.steps
    assert equal(weights(resumed.model), weights(whole.model))
    for path in checkpoint.saved(folder / "checkpoints"):
        torch.load(path, weights_only=True)
    left = [p.name for p in (folder / "checkpoints").iterdir()]
    assert all(name.startswith("step-") or name.endswith(".tmp") for name in left)


@pytest.mark.parametrize(
    "changes",
    [
        {"bfloat16": True},
        {"channels_last": True},
        {"options": {"module": False}},
        {"model": "mobilenetv2", "pointwise": True},
    ],
)
def test_the_loop_takes_every_setting(splits: Splits, tmp_path: Path, changes: dict[str, object]) -> None:
    trainer = Trainer(TINY.but(**changes), splits, tmp_path)
    trainer.run()
    assert trainer.phase == "packed"
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.shares()[0] == pytest.approx(0.4, abs=0.002)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "nn.Conv2d(1, 10, 3)",
            "net.py:make does not take images of digits, which are 3x8x8: Given groups=1",
        ),
        (
            "nn.Conv2d(3, 10, 3)",
            r"net.py:make gives \[1, 10, 6, 6\] for one image of digits: expected \[1, 10\]",
        ),
        (
            "nn.Sequential(nn.Conv2d(3, 7, 8), nn.Flatten())",
            r"gives \[1, 7\] .* expected \[1, 10\], a score a class",
        ),
    ],
)
def test_a_model_of_ones_own_that_does_not_fit_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(f"from torch import nn\n\ndef make():\n    return {factory}\n")
    with pytest.raises(ValueError, match=message):
        assemble(TINY.but(model="net.py:make", width=1.0), 10, torch.zeros(1, 3, 8, 8))


def test_a_model_that_images_are_too_small_for() -> None:
    with pytest.raises(ValueError, match="vgg16 does not take images of digits, which are 3x8x8: "):
        assemble(TINY.but(model="vgg16"), 10, torch.zeros(1, 3, 8, 8))


def test_dense_and_slim_train_without_gates(splits: Splits, tmp_path: Path) -> None:
    dense = Trainer(TINY.but(method="dense", width=1.0, epochs=1), splits, tmp_path / "dense")
    slim = Trainer(TINY.but(method="slim", width=1.0, epochs=1), splits, tmp_path / "slim")
    for trainer in (dense, slim):
        trainer.run()
    assert dense.shares() == (1.0, 1.0)
    assert 0.3 < slim.shares()[0] <= 0.4


def test_training_learns_the_digits(tmp_path: Path) -> None:
    splits = load("digits")
    recipe = Recipe(name="r", model="resnet20", width=0.5, epochs=3, batch=32, lr=0.1, sizes=((0.0, 8),))
    parts = (splits.train, splits.held_out, splits.test)
    quarter = [Images(part.x[:, :, ::4, ::4].contiguous(), part.y) for part in parts]
    small = Splits("digits", *quarter, splits.classes, splits.mean, splits.std, splits.flip)
    trainer = Trainer(recipe.but(packed=False), small, tmp_path)
    trainer.run()
    assert count_errors(trainer.model, small.held_out, small) < 0.5 * len(small.held_out)
    json.dumps(trainer.recipe.as_dict())


def test_learning_rate_is_a_triangle() -> None:
    recipe = TINY.but(lr=0.2, rise=0.25)
    assert [round(learning_rate(recipe, d), 3) for d in (0, 0.125, 0.25, 0.625, 1)] == [0, 0.1, 0.2, 0.1, 0]


def test_a_run_starts_from_the_weights_of_the_run_before_it(splits: Splits, tmp_path: Path) -> None:
    recipe = TINY.but(pretrain={"epochs": 2, "lr": 0.1}, gate_lr=0.1, options={"bias": 1.0}, images=64)
    before = recipe.before()
    assert before is not None
    assert before == recipe.but(method="magnitude", options={}, lr=0.2).before(), "one for all methods"
    assert before == recipe.but(budget="2 ms").before(), "and for all budgets"
    slim = recipe.but(method="slim", options={}).before()
    assert slim is not None
    assert (slim.method, slim.budget) == ("slim", recipe.budget)
    with pytest.raises(ValueError, match="starts from a pretrained network"):
        Trainer(recipe, splits, tmp_path / "run", start=tmp_path / "first")
    first = Trainer(before, splits, tmp_path / "first")
    assert (first.steps, len(first.splits.train)) == (8, 65)
    first.run()
    run = Trainer(recipe, splits, tmp_path / "run", start=tmp_path / "first")
    iessp.detach(run.model, merge=False)
    assert equal(weights(run.model), weights(first.model))
    run = Trainer(recipe, splits, tmp_path / "run", start=tmp_path / "first")
    stop_at(run, 3)
    resumed = Trainer(recipe, splits, tmp_path / "run", start=tmp_path / "first")
    assert resumed.step == 3
    with pytest.raises(ValueError, match="starts from a pretrained network"):
        Trainer(recipe.but(seed=1), splits, tmp_path / "other", start=tmp_path / "first")
