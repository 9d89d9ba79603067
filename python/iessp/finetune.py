"""Does training on the stripe kernels follow masked dense training, and how much faster is a step?

    python -m iessp.finetune --out runs/finetune

One pruned network is trained three times on the same batches of digits: masked dense in float64 (the
reference), masked dense in float32, packed in float32. Rounding alone makes float32 runs drift from the
reference; packed training is right when it drifts no further than masked dense training does.

Where two precisions disagree about the sign before a ReLU a curve jumps, and after some steps float32 runs are a
hundredth apart however exact their kernels. --smooth takes the jumps out and leaves the rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iessp.attach import attach, detach, settle
from iessp.data import load
from iessp.data.images import Splits, normalise
from iessp.models import build
from iessp.report import draw_curves
from iessp.timing import busy, interleave
from iessp.train import write_results

SHARE = 0.2412  # of the MACs, kept
Batch = tuple[Tensor, Tensor]  # x float32 [N, C, H, W], y [N]


@dataclass(frozen=True)
class Curves:
    """Losses [steps], float64, of one seed."""

    exact: Tensor
    dense: Tensor
    packed: Tensor

    def drift(self, which: str) -> float:
        """Mean distance of a float32 curve from the exact one."""
        return float((getattr(self, which) - self.exact).abs().mean())


def stepper(model: nn.Module, held: dict[str, Tensor], lr: float) -> Callable[[Batch], Tensor]:
    """A function that takes one SGD step and gives its loss; `held` skeletons mask the gradients of dense
    weights."""
    optimiser = torch.optim.SGD(model.train().parameters(), lr, momentum=0.9)
    dtype = next(model.parameters()).dtype

    def step(batch: Batch) -> Tensor:
        loss = F.cross_entropy(model(batch[0].to(dtype)), batch[1])
        optimiser.zero_grad()
        loss.backward()
        for name, skeleton in held.items():
            grad = model.get_submodule(name).weight.grad
            assert isinstance(grad, Tensor)
            grad *= skeleton[:, None]
        optimiser.step()
        return loss.detach().double()

    return step


def pruned(name: str, width: float, seed: int, budget: float = SHARE) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with random skeletons: its masked dense form, and the skeletons."""
    torch.manual_seed(seed)
    gated = attach(build(name, 10, width=width), "random", seed=seed)
    chosen = settle(gated, budget)
    return detach(gated), chosen


def follow(
    name: str,
    width: float,
    splits: Splits,
    seed: int,
    *,
    steps: int = 20,
    batch: int = 32,
    size: int | None = None,
    smooth: bool = False,
) -> Curves:
    """The three curves of one seed."""
    import stripe_kernels

    masked, chosen = pruned(name, width, seed)
    if smooth:
        smoothed(masked)
    models = {
        "exact": copy.deepcopy(masked).double(),
        "dense": copy.deepcopy(masked),
        "packed": stripe_kernels.freeze(masked, chosen),
    }
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(splits.train), (steps, batch), generator=generator)
    images = [splits.train.take(index) for index in order]
    batches = [(normalise(i.x, splits, size), i.y) for i in images]
    found = {}
    for kind, model in models.items():
        step = stepper(model, {} if kind == "packed" else chosen, lr=0.01)
        found[kind] = torch.stack([step(given) for given in batches])
    return Curves(**found)


def smoothed(model: nn.Module) -> nn.Module:
    """`model` with SiLU for ReLU and mean for max pooling, in place: see --smooth."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model


def time_steps(name: str, width: float, splits: Splits, batch: int, seconds: float) -> dict[str, float]:
    """Median ms of a training step, masked dense and packed, interleaved."""
    import stripe_kernels

    masked, chosen = pruned(name, width, 0)
    images = splits.train.take(torch.arange(batch) % len(splits.train))
    given = (normalise(images.x, splits), images.y)
    steps = {
        "masked dense": stepper(copy.deepcopy(masked), chosen, lr=1e-4),
        "packed": stepper(stripe_kernels.freeze(masked, chosen), {}, lr=1e-4),
    }
    calls = {kind: (lambda step=step: step(given)) for kind, step in steps.items()}
    return {kind: timing.median for kind, timing in interleave(calls, seconds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--smooth", action="store_true", help="SiLU for ReLU, mean for max pooling")
    parser.add_argument("--seconds", type=float, default=20.0, help="spent on timing; 0: do not")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    given = parser.parse_args()
    if min(given.seeds, given.steps, given.batch) < 1:
        parser.error("--seeds, --steps and --batch must be at least 1")
    try:
        build(given.model, 10, width=given.width)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    splits = load("digits")
    curves = [
        follow(
            given.model, given.width, splits, seed, steps=given.steps, batch=given.batch, smooth=given.smooth
        )
        for seed in range(given.seeds)
    ]
    drifts = {kind: [c.drift(kind) for c in curves] for kind in ("dense", "packed")}
    for kind, values in drifts.items():
        print(
            f"{kind:7} mean distance from float64: median {statistics.median(values):.2e} of {len(values)} seeds"
        )
    record = {**{k: v for k, v in vars(given).items() if k != "out"}, "share": SHARE, "drift": drifts}
    steps = [float(i) for i in range(1, given.steps + 1)]
    share = [SHARE] * given.steps
    names = {"exact": "masked dense, float64", "dense": "masked dense, float32", "packed": "packed, float32"}
    draw_curves(
        {
            title: {"step": steps, "task_loss": getattr(curves[0], kind).tolist(), "share_hard": share}
            for kind, title in names.items()
        },
        given.out / "curves.png",
    )
    print(f"curves of seed 0 are in {given.out / 'curves.png'}")
    if given.seconds:
        record["busy"] = busy()
        record |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        times = record["ms"] = time_steps(given.model, given.width, splits, given.batch, given.seconds)
        ratio = times["masked dense"] / times["packed"]
        print(", ".join(f"{kind} {ms:.2f} ms a step" for kind, ms in times.items()) + f": {ratio:.2f} times")
        print(record["busy"] or "the machine was quiet")
    write_results(given.out, record, "finetune.json")


if __name__ == "__main__":
    main()
