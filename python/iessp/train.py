"""The training loop: one recipe, one folder, resumable at any step with the same bits.

Everything random is a function of (seed, epoch) or (seed, step), so a checkpoint is weights, optimisers and
a step number.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iessp import checkpoint, ranks
from iessp.attach import attach, freeze, gate_parameters, gates, param_groups, skeletons
from iessp.budget import compacted_macs_kept, macs_kept
from iessp.data.images import Images, Splits, augment, normalise, reduced, shuffled
from iessp.data.stream import Stream
from iessp.factory import check_fit
from iessp.latency import Latency, measure, priced
from iessp.loss import StripeLoss
from iessp.models import build
from iessp.network import probe
from iessp.recipe import Recipe
from iessp.timing import EQUALITY_IMAGES, compare

SAVE_SECONDS = 30.0


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint of its last step is in the folder."""


@dataclass(frozen=True)
class Step:
    """What a step reports: to the progress bar, the CSV file and TensorBoard."""

    step: int
    steps: int
    phase: str  # dense, warm, learn, settled (masked) or packed (stripe kernels)
    task_loss: float
    lr: float
    size: int
    pressure: float = 0.0  # lambda_t
    share_soft: float = 1.0
    share_hard: float = 1.0
    target: float = 1.0
    density: float = 1.0  # live stripes / stripes


class Trainer:
    """Trains `recipe` on `splits`, with its checkpoints, log and results in `folder`.

    A folder that holds checkpoints of the same recipe is resumed; of another recipe, ValueError names what
    differs. `model` is gated while skeletons are learned and runs on the stripe kernels after that
    (recipe.packed). start: the folder of the finished run that recipe.pretrain asks for.
    """

    def __init__(
        self, recipe: Recipe, splits: Splits, folder: Path, device: str = "cpu", start: Path | None = None
    ):
        self.recipe, self.folder, self.device = recipe, folder, torch.device(device)
        self.splits = reduced(splits, recipe.images, recipe.resolution).to(self.device)
        if recipe.batch % ranks.count():
            raise ValueError(f"a batch of {recipe.batch} cannot be shared by {ranks.count()} ranks")
        self.per_epoch = max(1, len(self.splits.train) // recipe.batch)
        self.steps = self.per_epoch * recipe.epochs
        self.step, self.seconds = 0, 0.0
        self.equality: dict[str, float] = {}  # frozen against masked, when the network was packed
        self.skeletons: dict[str, Tensor] = {}
        self._coming: tuple[int, Iterator[Images]] | None = (
            None  # step of the next batch, batches from there on
        )
        state = checkpoint.load(folder / "checkpoints")
        self._build(trained_weights(start, recipe) if state is None and recipe.pretrain else None)
        if state is not None:
            self._restore(state)

    # -- construction

    def _build(self, weights: dict[str, Tensor] | None) -> None:
        recipe, splits = self.recipe, self.splits
        self.example = torch.zeros(1, splits.channels, splits.size, splits.size, device=self.device)
        self.model = assemble(recipe, len(splits.classes), self.example, weights)
        self.format = image_format(recipe, self.model, self.device)
        self.network = probe(self.model, self.example)
        self.loss: StripeLoss | None = None
        self.budget = 1.0 if recipe.milliseconds else float(recipe.budget)  # share of what it counts
        if recipe.pruned:
            if recipe.milliseconds:
                self.budget = self._budget_of_time(recipe.milliseconds)
            self.loss = StripeLoss(
                self.model, budget=self.budget, steps=self.steps, warmup=recipe.warmup, meet=recipe.meet,
                settle=recipe.settle, kappa=recipe.kappa, adaptive=recipe.adaptive, eta=recipe.eta,
                tolerance=recipe.tolerance, weight_decay=recipe.weight_decay,
            )  # fmt: skip
        self._prepare()

    def _budget_of_time(self, milliseconds: float) -> float:
        """Price the stripes in ms and return the budget's share of them; measured once a folder, on rank 0."""
        path = self.folder / "latency.json"
        if path.exists():
            latency = Latency(**json.loads(path.read_text()))
        else:
            images = self.example.expand(self.recipe.timed_batch, -1, -1, -1)
            latency = ranks.agreed(lambda: measure(self.model, images))
            if ranks.mine() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_results(self.folder, latency.as_dict(), path.name)
        share = latency.share(milliseconds, self.network)
        network = priced(self.network, latency)
        for gate in gates(self.model).values():
            gate.site, gate.network = network[gate.site.name], network
        return share

    def _prepare(self) -> None:
        """What trains the model as it is now: SGD for the weights, Adam for the gates, see `param_groups`."""
        recipe = self.recipe
        self.parallel = ranks.parallel(self.model)
        groups = param_groups(self.model, recipe.lr, gate_lr=recipe.gate_lr, weight_decay=recipe.weight_decay)
        in_gates = {id(p) for p in gate_parameters(self.model)}
        of_gates = [group for group in groups if id(group["params"][0]) in in_gates]
        weights = [group for group in groups if id(group["params"][0]) not in in_gates]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(weights, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        ]
        if of_gates:
            # A gate's gradient is near 1e-5: the usual epsilon would be a third of its rms.
            self.optimisers.append(torch.optim.Adam(of_gates, betas=(0.9, 0.99), eps=1e-12))

    def _pack(self) -> None:
        """Go on with the live stripes alone, on the stripe kernels, with a fresh optimiser."""
        masked = self.model
        self.skeletons = {name: s.cpu() for name, s in skeletons(masked).items()}
        self.model, self.loss = freeze(masked), None
        some = torch.arange(min(EQUALITY_IMAGES, len(self.splits.held_out)))
        x = normalise(self.splits.held_out.take(some).to(self.device).x, self.splits)
        equality = compare(self.model, masked, x)
        if not equality.ok:
            warnings.warn(f"the frozen network differs from the masked one: {equality}", stacklevel=2)
        self.equality = asdict(equality)
        self._prepare()

    # -- checkpoints

    def save(self) -> None:
        """Write a checkpoint, on rank 0."""
        if ranks.mine() != 0:
            return
        state = {
            "recipe": self.recipe.as_dict(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "loss": self.loss.state_dict() if self.loss else None,
            "skeletons": self.skeletons,
            "images": {
                "classes": len(self.splits.classes),
                "channels": self.splits.channels,
                "size": self.splits.size,
            },
            "seconds": self.seconds,
            "equality": self.equality,
        }
        checkpoint.save(self.folder / "checkpoints", self.step, state)

    def _restore(self, state: dict[str, Any]) -> None:
        ours, theirs = self.recipe.as_dict(), Recipe.from_dict(state["recipe"]).as_dict()
        differing = [f"{k}: {theirs[k]} there, {ours[k]} asked for" for k in ours if ours[k] != theirs[k]]
        if differing:
            raise ValueError(
                f"{self.folder} holds another recipe's run ({'; '.join(differing)}): choose another folder"
            )
        if state["skeletons"]:
            self.skeletons, self.loss = state["skeletons"], None
            self.model = packed_from(self.model, self.skeletons)
            self._prepare()
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        if self.loss:
            self.loss.load_state_dict(state["loss"])
        self.step, self.seconds, self.equality = state["step"], state["seconds"], state["equality"]

    # -- training

    def run(
        self,
        report: Callable[[Step], None] = lambda step: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train to the end, saving every half minute; when `stop` says so, save and raise Interrupted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved_at = time.monotonic()
        with Log(self.folder / f"log{ranks.mine() or ''}.csv", self.step) as log:
            while self.step < self.steps:
                began = time.monotonic()
                done = self.train_step()
                self.seconds += time.monotonic() - began
                log.write(done)
                report(done)
                stopping = ranks.any_of(stop(), self.device)
                if stopping or time.monotonic() - saved_at > SAVE_SECONDS:
                    self.save()
                    saved_at = time.monotonic()
                if stopping:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.steps}; {self.folder} resumes from there"
                    )
        self.save()

    def train_step(self) -> Step:
        """One optimiser step; moves on to the packed network when the skeletons have settled."""
        recipe = self.recipe
        x, y = self._batch(recipe.size(self.step / self.steps))
        self.model.train()
        rate = learning_rate(recipe, (self.step + 0.5) / self.steps)
        for group in self.optimisers[0].param_groups:
            group["lr"] = rate
        phase, target = self.phase, self.loss.target() if self.loss else self.budget
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            task = F.cross_entropy(self.parallel(x), y, label_smoothing=recipe.label_smoothing)
        total = self.loss(task) if self.loss else task
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        total.backward()
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        done = Step(self.step, self.steps, phase, float(task.detach()), rate, x.shape[-1], target=target)
        if self.loss:
            pressure, density = float(self.loss.lambda_now), float(self.loss.density)
            soft, hard = float(self.loss.share_soft), float(self.loss.share_hard)
            done = replace(done, pressure=pressure, share_soft=soft, share_hard=hard, density=density)
        elif phase == "packed":
            live = torch.cat([s.flatten() for s in self.skeletons.values()])
            done = replace(done, share_hard=self.shares()[0], density=float(live.float().mean()))
        if self.loss and self.loss.phase() == "settled" and recipe.packed:
            self._pack()
        return done

    @property
    def phase(self) -> str:
        if self.loss:
            return self.loss.phase()
        return "packed" if self.skeletons else "dense"

    def _batch(self, size: int | None) -> tuple[Tensor, Tensor]:
        """This rank's images of this step: a function of (seed, step), whole or in parts the same."""
        recipe = self.recipe
        if self._coming is None or self._coming[0] != self.step or self.step % self.per_epoch == 0:
            self._coming = (self.step, self._epoch(self.step // self.per_epoch, self.step % self.per_epoch))
        images = next(self._coming[1])
        self._coming = (self.step + 1, self._coming[1])
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        part = (ranks.mine(), ranks.count())
        x = normalise(augment(images.x, generator, recipe.crop, self.splits.flip, part), self.splits, size)
        return x.contiguous(memory_format=self.format), images.y

    def _epoch(self, epoch: int, within: int) -> Iterator[Images]:
        """The batches of an epoch from the one at `within` on, of each the images that are this rank's."""
        order = shuffled(len(self.splits.train), self.recipe.batch, self.recipe.seed, epoch)
        mine = [batch[ranks.mine() :: ranks.count()] for batch in list(order)[within:]]
        return self.splits.train.batches(mine, salt=self.recipe.seed * 1_000_003 + epoch)

    # -- results

    def shares(self) -> tuple[float, float]:
        """MACs kept, as counted and after compaction; for `slim`, of the network at its full width."""
        if self.recipe.method == "slim":
            full = build(self.recipe.model, len(self.splits.classes), self.splits.channels, self.recipe.width)
            share = self.network.macs / probe(full.to(self.device), self.example).macs
            return share, share
        found = self.skeletons or (skeletons(self.model) if gates(self.model) else {})
        return macs_kept(self.network, found), compacted_macs_kept(self.network, found)


class Log:
    """log.csv, one row a step; what a killed run wrote beyond its last checkpoint is dropped."""

    def __init__(self, path: Path, step: int):
        self.path, self.step = path, step

    def __enter__(self) -> Log:
        rows = []
        if self.path.exists():
            rows = [row for row in self.path.read_text().splitlines()[1:] if self._counts(row)]
        text = "\n".join([",".join(field.name for field in fields(Step)), *rows, ""])
        checkpoint.write_atomically(self.path, lambda file: file.write(text.encode()))
        self.file = self.path.open("a")
        return self

    def _counts(self, row: str) -> bool:
        """Whether the row is whole and of a step that the checkpoint has."""
        values = row.split(",")
        return len(values) == len(fields(Step)) and int(values[0]) <= self.step

    def write(self, step: Step) -> None:
        values = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in asdict(step).values()]
        self.file.write(",".join(values) + "\n")
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()


def trained_weights(folder: Path | None, recipe: Recipe) -> dict[str, Tensor]:
    """The weights that recipe.pretrain asks for; raises ValueError when `folder` holds another run's."""
    state = checkpoint.load(folder / "checkpoints") if folder else None
    if state is None or Recipe.from_dict(state["recipe"]) != recipe.before():
        raise ValueError(f"{recipe.name} starts from a pretrained network, which {folder} is not")
    return state["model"]


def assemble(
    recipe: Recipe, classes: int, example: Tensor, weights: dict[str, Tensor] | None = None
) -> nn.Module:
    """The recipe's network with the given weights or freshly initialised, gated for the methods that prune;
    example [1, C, H, W]."""
    torch.manual_seed(recipe.seed)
    width = slim_width(recipe, classes, example) if recipe.method == "slim" else recipe.width
    model = build(recipe.model, classes, example.shape[1], width).to(example.device)
    check_fit(recipe.model, model, recipe.data, classes, example)
    if weights is not None:
        model.load_state_dict(weights)
    model = model.to(memory_format=image_format(recipe, model, example.device))  # type: ignore[call-overload]
    if not recipe.pruned:
        return model
    own = {"seed": recipe.seed} if recipe.method == "random" else {}
    return attach(
        model, recipe.method, example_input=example, pointwise=recipe.pointwise, **own | recipe.options
    )


def image_format(recipe: Recipe, model: nn.Module, device: torch.device) -> torch.memory_format:
    """The recipe's memory format, except where torch cannot be trusted with it: on a CPU with AVX2 its weight
    gradient of a strided 1x1 in channels_last writes beyond its memory (torch 2.13, float32; SECURITY.md)."""
    if not recipe.channels_last:
        return torch.contiguous_format
    strided = any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) for m in model.modules()
    )
    if strided and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warnings.warn(
            "trained in contiguous format: torch's gradient of a strided 1x1 in channels_last is unsafe on AVX2",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.contiguous_format
    return torch.channels_last


def packed_from(model: nn.Module, chosen: dict[str, Tensor]) -> nn.Module:
    """A gated model frozen to the given skeletons: the shape of a packed network, to load a state into."""
    for name, gate in gates(model).items():
        gate.settle(chosen[name])
    return freeze(model)


def learning_rate(recipe: Recipe, done: float) -> float:
    """A triangle: up to `lr` over the first share `rise`, then down to zero."""
    return recipe.lr * min(done / recipe.rise if recipe.rise else 1.0, (1 - done) / (1 - recipe.rise), 1.0)


def slim_width(recipe: Recipe, classes: int, example: Tensor) -> float:
    """The width at which the whole network costs the recipe's budget, by bisection."""

    def macs(width: float) -> int:
        return probe(build(recipe.model, classes, example.shape[1], width), example.cpu()).macs

    allowed, low, high = float(recipe.budget) * macs(recipe.width), 0.0, recipe.width
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= allowed else (low, middle)
    if not low:
        least = macs(high) / macs(recipe.width)
        raise ValueError(
            f"budget {recipe.budget} is out of reach for slim: its thinnest network has {least:.4f}"
        )
    return low


@torch.inference_mode()
def count_errors(model: nn.Module, images: Images | Stream, splits: Splits, batch: int = 256) -> int:
    """Wrongly classified images, at the data's own size."""
    training = model.training
    model.eval()
    wrong = 0
    for part in images.batches(list(torch.arange(len(images)).split(batch))):
        wrong += int((model(normalise(part.x, splits)).argmax(1) != part.y).sum())
    model.train(training)
    return wrong


def write_results(folder: Path, results: dict[str, Any], name: str = "results.json") -> None:
    """folder/NAME, atomically."""
    text = json.dumps(results, indent=2) + "\n"
    checkpoint.write_atomically(folder / name, lambda file: file.write(text.encode()))
