"""Two processes: the same masks, statistics and lambda, and those of one process on the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import iessp
from iessp import checkpoint

STEPS, BATCH = 24, 16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def train(rank: int, ranks: int) -> dict[str, Tensor]:
    """A run on this rank's share of each batch; its state with the controller's."""
    model: nn.Module = iessp.attach(network(), example_input=torch.zeros(1, 2, 8, 8))
    if ranks > 1:
        model = DistributedDataParallel(model)
    loss = iessp.StripeLoss(model, budget=0.5, steps=STEPS, weight_decay=1e-3)
    # SGD: Adam would turn a difference in the last bit of a tiny gradient into a whole step.
    optimiser = torch.optim.SGD(iessp.param_groups(model, 0.05, gate_lr=5.0), momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = (
            torch.randn(BATCH, 2, 8, 8, generator=generator),
            torch.randint(4, (BATCH,), generator=generator),
        )
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        optimiser.zero_grad()
        loss(F.cross_entropy(model(x[mine]), y[mine])).backward()
        optimiser.step()
    inner = model.module if ranks > 1 else model
    state = {k: v for k, v in inner.state_dict().items() if isinstance(v, Tensor)}
    state |= {f"loss.{k}": v for k, v in loss.state_dict().items()}
    assert {m.phase for m in iessp.gates(model).values()} == {"settled"}
    if rank == 0:
        assert iessp.freeze(model) is not None, "through the wrapper"
    return state


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(train(rank, 2), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_torchrun_trains_a_recipe(tmp_path: Path) -> None:
    """The command line under torchrun: two ranks, one log, one checkpoint, the skeletons of rank 0."""
    arguments = (
        "train digits --set model=resnet20 --set width=0.25 --set epochs=1 --set batch=256 --set budget=0.5"
    )
    arguments += " --set gate_lr=0.5 --threads 1 --out run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(Path(iessp.__file__).parents[1]), *sys.path])
    ended = subprocess.run(
        [*torchrun, "-m", "iessp", *arguments.split(), "--set", "sizes=[[0.0, 8]]"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("test images right") == 1
    last = checkpoint.saved(tmp_path / "run/checkpoints")[-1]  # a slow machine saves on the way too
    assert last.name == "step-00000005.pt"
    rows = [(tmp_path / f"run/{log}").read_text().splitlines() for log in ("log.csv", "log1.csv")]
    columns = rows[0][0].split(",")
    shared = [
        columns.index(c)
        for c in ("step", "phase", "pressure", "share_soft", "share_hard", "target", "density")
    ]
    for first, second in zip(*rows, strict=True):
        assert [first.split(",")[i] for i in shared] == [second.split(",")[i] for i in shared]


LOST = """
import os, sys
import iessp.train, iessp.cli
from iessp.train import Trainer

iessp.train.SAVE_SECONDS = 0.0
step = Trainer.train_step
def die(self):
    if self.step == 3 and os.environ["RANK"] == "1":
        os._exit(9)
    return step(self)
Trainer.train_step = die
sys.argv = ["iessp", *sys.argv[1:]]
iessp.cli.main()
"""


def test_a_lost_rank_ends_with_a_clear_error_and_a_usable_checkpoint(tmp_path: Path) -> None:
    arguments = ["train", "digits", "--threads", "1", "--out", "run"]
    for change in (
        "model=resnet20",
        "width=0.25",
        "epochs=1",
        "batch=256",
        "gate_lr=0.5",
        "sizes=[[0.0, 8]]",
    ):
        arguments += ["--set", change]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(iessp.__file__).parents[1]), *sys.path])
    shared = {"PYTHONPATH": paths, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOST, *arguments],
            cwd=tmp_path, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 9], said[0][-2000:]
    assert "rank 0 of 2 lost another one" in " ".join(said[0].split())
    assert "Traceback" not in said[0]
    assert [path.stem for path in checkpoint.saved(tmp_path / "run/checkpoints")][-1] == "step-00000003"
    alone = subprocess.run(
        [sys.executable, "-m", "iessp", *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-2000:]
    steps = [line.split(",")[0] for line in (tmp_path / "run/log.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3", "4", "5"], "it went on where the two had stopped"


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_ranks_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between the ranks"
    alone = train(0, 1)
    for name, value in alone.items():
        torch.testing.assert_close(
            first[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not all(v.all() for n, v in alone.items() if n.endswith("0.value")), "something was pruned"
