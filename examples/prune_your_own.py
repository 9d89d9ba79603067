"""Prune a network of your own, in your own training loop, and run it on the stripe kernels.

    python examples/prune_your_own.py --steps 200

The lines that matter are marked; everything else is a network, its data and a loop as anyone has them.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import iessp  # 1


def network() -> nn.Module:
    def block(c: int, k: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(c, k, 3, stride, padding=1), nn.BatchNorm2d(k), nn.ReLU()]

    body = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def images() -> tuple[Tensor, Tensor]:
    scans = load_digits()
    return torch.from_numpy(scans.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(scans.target)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def main(steps: int) -> None:
    torch.manual_seed(0)
    x, y = images()
    train, test = slice(0, 1500), slice(1500, None)
    model = network()

    iessp.attach(model, method="iem", example_input=x[:1])  # 2
    budgeted = iessp.StripeLoss(model, budget=0.25, steps=steps, weight_decay=1e-3)  # 3
    groups = iessp.param_groups(model, lr=3e-3, gate_lr=0.005, weight_decay=1e-3)  # 4
    optimiser = torch.optim.AdamW(groups)  # 5
    model.train()
    for _ in range(steps):
        batch = torch.randint(0, 1500, (64,))
        loss = budgeted(F.cross_entropy(model(x[train][batch]), y[train][batch]))  # 6
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    frozen = iessp.freeze(model)  # 7: a plain nn.Module whose pruned layers are stripe_kernels.StripeConv2d

    torch.testing.assert_close(frozen.eval()(x[test]), model.eval()(x[test]), rtol=1e-3, atol=1e-4)
    kept = float(budgeted.share_hard)
    print(f"{kept:.1%} of the MACs kept, {accuracy(frozen, x[test], y[test]):.1%} of the test images right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    main(given.steps)
