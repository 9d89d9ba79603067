"""What an optimized network costs beyond its kernels, and what `optimize` gives where nothing is pruned.

    python -m bench.overhead

First, what StripeConv2d costs beyond nn.Conv2d, in inference and in a training step, of a layer so small that both
do next to nothing but get to their kernels. Second, microseconds a layer takes from call to call, of a chain of 50
convolutions of one pixel: called from Python one by one, and as one native list. Third, the same for whole networks
at batch 1. Fourth, networks without a dead stripe: `optimize` may not make them slower.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import stripe_kernels
from bench.machine import Machine
from bench.networks import NetworkJob
from bench.skeletons import GENERATORS
from bench.timing import Ratio, Sample, interleave
from stripe_kernels import StripeConv2d, freeze
from stripe_kernels.testing import list_and_calls

DEPTHS = (1, 51)
NETWORKS = ("vgg16", "resnet56")
UNPRUNED = (
    ("vgg16", 1),
    ("vgg16", 32),
    ("resnet56", 1),
    ("resnet56", 32),
    ("resnet18", 1),
    ("mobilenetv2", 1),
)
SECONDS = 4.0


def operator() -> None:
    """StripeConv2d against nn.Conv2d: 16 channels on a 4x4 map, half of the stripes."""
    skeleton = GENERATORS["iid"]((16, 3, 3), 0.5, "overhead")
    layers = {
        "stripe": StripeConv2d(16, 16, 3, padding=1, skeleton=torch.from_numpy(skeleton.live.copy())),
        "conv": nn.Conv2d(16, 16, 3, padding=1),
    }
    x = torch.randn(1, 16, 4, 4)

    def step(layer: nn.Module) -> None:
        inputs = (x.detach().requires_grad_(), *layer.parameters())
        torch.autograd.grad(layer(inputs[0]).sum(), inputs)

    calls: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        calls[f"{name} inference"] = torch.inference_mode()(partial(layer, x))
        calls[f"{name} step"] = partial(step, layer)
    found = interleave(calls, SECONDS)
    for what in ("inference", "step"):
        ours, theirs = (1e6 * found[f"{name} {what}"].median for name in layers)
        print(
            f"{what}: StripeConv2d {ours:.1f} us, nn.Conv2d {theirs:.1f} us, overhead {ours - theirs:+.1f} us, "
            f"n {found[f'stripe {what}'].n}"
        )


def both_ways(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The compacted network's call as one native list and call after call."""
    networks = list_and_calls(model, x)
    return {name: torch.inference_mode()(partial(network, x)) for name, network in networks.items()}


def chain(depth: int) -> nn.Module:
    """Convolutions of two channels and one pixel, each with a ReLU."""
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Conv2d(2, 2, 1), nn.ReLU()))).eval()


def dispatch() -> None:
    calls = {
        f"{name} {depth}": call
        for depth in DEPTHS
        for name, call in both_ways(chain(depth), torch.randn(1, 2, 1, 1)).items()
    }
    found = interleave(calls, SECONDS)
    for name in ("calls", "list"):
        short, long = (found[f"{name} {depth}"].median for depth in DEPTHS)
        print(
            f"{name}: {1e6 * (long - short) / (DEPTHS[1] - DEPTHS[0]):.2f} us a layer, {1e6 * short:.1f} us for one"
        )


def report(name: str, found: dict[str, Sample], base: str, other: str) -> None:
    ratio = Ratio.of(found[other], found[base])
    times = ", ".join(f"{n} {1e3 * s.median:.3f} ms" for n, s in found.items())
    print(f"{name}: {times}; {other} / {base} {ratio}, n {found[base].n}")


def whole_networks(threads: int) -> None:
    for name in NETWORKS:
        job = NetworkJob(name, 1, "iid", "inference", threads)
        report(
            name, interleave(both_ways(freeze(job.masked, job.skeletons), job.x), SECONDS), "calls", "list"
        )


def unpruned(threads: int) -> None:
    for name, batch in UNPRUNED:
        job = NetworkJob(name, batch, "iid", "inference", threads, density=1.0)
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it kept the network is said below
            fast = stripe_kernels.optimize(job.masked, job.x, folder=folder)
        calls = {"given": job.masked, "optimized": fast}
        found = interleave(
            {n: torch.inference_mode()(partial(network, job.x)) for n, network in calls.items()}, SECONDS
        )
        kept = ", kept as it was" if "kept as it was" in str(fast.report) else ""
        report(f"{name}, batch {batch}, unpruned{kept}", found, "given", "optimized")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    threads = torch.get_num_threads()
    machine = Machine.look()
    print(f"{machine}\n{machine.load_text()}")
    operator()
    dispatch()
    whole_networks(threads)
    unpruned(threads)


if __name__ == "__main__":
    main()
