"""A budget in milliseconds: what a stripe of each layer costs in time on the kernels that will run it. Ours.

    time of a network = fixed + sum_l per_stripe_l * live_l

Each layer is timed at several densities as `stripe_kernels` would run it here (device, threads, batch, memory
format) and a line is fitted; `fixed` is everything that does not shrink with the stripes: the layers' constant
parts, norms, activations, linear layers. A share of sum_l per_stripe_l * stripes_l takes the place of a share
of MACs in the loss and in the cut, so a layer that gains little time per stripe is left its stripes.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iessp.attach import detach, gates
from iessp.network import Network
from iessp.timing import interleave

DENSITIES = (0.125, 0.25, 0.5, 1.0)  # 1: the skeletons learned may leave a layer whole, as torch runs it
FREE = 1e-3  # a layer whose time does not grow with its stripes costs this share of an average one


@dataclass(frozen=True)
class Latency:
    """fixed: ms. per_stripe: ms of one stripe by name of its convolution. batch, threads: measured with."""

    fixed: float
    per_stripe: dict[str, float]
    batch: int
    threads: int

    def of(self, skeletons: dict[str, Tensor]) -> float:
        """Predicted ms of a network with these skeletons, bool [K, R, S] by name."""
        return self.fixed + sum(
            cost * int(skeletons[name].sum()) for name, cost in self.per_stripe.items() if name in skeletons
        )

    def share(self, milliseconds: float, network: Network) -> float:
        """The share of all stripes' time that fits, for `StripeLoss`; `network` has these costs (`priced`).

        Raises ValueError when nothing fits and when everything does, naming the shortest and the longest time there is.
        """
        stripes = priced(network, self).cost
        share = (milliseconds - self.fixed) / stripes
        if not 0 < share < 1:
            verdict = "is out of reach" if share <= 0 else "needs nothing cut"
            raise ValueError(
                f"a budget of {milliseconds:g} ms {verdict}: batch {self.batch} on {self.threads} "
                f"thread{'s' if self.threads > 1 else ''} takes {self.fixed:.3g} ms without any stripe and "
                f"{self.fixed + stripes:.3g} ms with all"
            )
        return share

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def priced(network: Network, latency: Latency) -> Network:
    """The network with time in place of MACs as what the budget counts; convolutions without gates cost
    nothing, their time is in `fixed`."""
    return network.priced({site.name: latency.per_stripe.get(site.name, 0.0) for site in network.sites})


def measure(model: nn.Module, example_input: Tensor, *, seconds: float = 10.0) -> Latency:
    """Time the gated convolutions of `model` on what they get from `example_input` [N, C, H, W], and the whole.

    Random skeletons of the densities in DENSITIES stand for the ones to come. The model is not changed. Works
    as long as nothing else runs: see `iessp.timing.busy`.
    """
    import stripe_kernels

    found = gates(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no gates: call iessp.attach(model) first")
    plain = detach(copy.deepcopy(model), merge=False).eval()
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, Callable[[], object]] = {}
    live: dict[str, int] = {}
    for density in DENSITIES:
        chosen = {name: _random(g.site.stripe_shape, density, generator) for name, g in found.items()}
        frozen = stripe_kernels.freeze(plain, chosen)
        calls[f"{density}"] = partial(_run, frozen, example_input)
        for name, x in _inputs(frozen, list(found), example_input).items():
            calls[f"{density} {name}"] = partial(_run, frozen.get_submodule(name), x)
            live[f"{density} {name}"] = int(chosen[name].sum())
    times = {key: timing.median for key, timing in interleave(calls, seconds).items()}

    slopes: dict[str, float] = {}
    for name in found:
        keys = [f"{density} {name}" for density in DENSITIES]
        counts = [live[k] for k in keys]
        slopes[name] = 0.0  # a layer of one stripe has no slope
        if len(set(counts)) > 1:
            slopes[name] = statistics.linear_regression(counts, [times[k] for k in keys]).slope
    stripes = {name: gate.site.stripes for name, gate in found.items()}
    floor = FREE * sum(max(0.0, slopes[n]) * stripes[n] for n in slopes) / sum(stripes.values())
    slopes = {name: max(slope, floor, 1e-12) for name, slope in slopes.items()}
    fixed = [times[f"{d}"] - sum(slopes[name] * live[f"{d} {name}"] for name in found) for d in DENSITIES]
    return Latency(max(0.0, statistics.median(fixed)), slopes, len(example_input), torch.get_num_threads())


def _random(shape: tuple[int, int, int], density: float, generator: torch.Generator) -> Tensor:
    """bool [K, R, S] with round(density * size) live stripes, at least one."""
    order = torch.randperm(shape[0] * shape[1] * shape[2], generator=generator)
    return (order < max(1, round(density * len(order)))).view(shape)


@torch.inference_mode()
def _run(layer: nn.Module, x: Tensor) -> None:
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _inputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What each named layer is called with when the model runs on x."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, args[0].clone())
        )
        for name in names
    ]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return found
