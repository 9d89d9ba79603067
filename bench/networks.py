"""Whole networks with every convolution pruned: inference, and a training step.

The weights are random and the normalisations calibrated on random images, so that activations have the
sizes they have in a trained network; time does not depend on what was learned beyond the skeletons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bench.contestants import FORMATS, not_compiled
from bench.job import Entrant, Kind, Oracle
from bench.layers import NETWORKS, Layer, LayerCase
from bench.records import Row
from bench.run import in_two_stages
from bench.skeletons import GENERATORS
from bench.ways import Ways, conv_macs, laid_out
from iessp.models import build
from stripe_kernels import FilterSkeleton, StripeConv2d, freeze
from stripe_kernels.testing import Operands

DENSITY = 0.2412  # the share of VGG-16's multiply-adds that the paper keeps: its FLOPs fall by 75.88 %
BATCHES = (1, 32, 128)
STEP_BATCH = 64


Makers = dict[str, Callable[[], Entrant]]


def workloads(batches: list[int], step: bool) -> dict[str, list[int]]:
    """What is timed, and at which batch sizes."""
    return {"inference": batches or list(BATCHES), **({"training step": [STEP_BATCH]} if step else {})}


@dataclass(frozen=True)
class NetworkJob:
    name: str
    batch: int
    source: str
    which: Literal["inference", "training step"]
    threads: int
    density: float = DENSITY
    given: dict[str, FilterSkeleton] | None = None  # learned skeletons by module name

    @cached_property
    def x(self) -> Tensor:  # [N, 3, H, W]
        size = NETWORKS[self.name][1]
        return torch.randn(self.batch, 3, size, size, generator=torch.Generator().manual_seed(1))

    @cached_property
    def target(self) -> Tensor:  # [N]
        return torch.arange(self.batch) % NETWORKS[self.name][0]

    @cached_property
    def skeletons(self) -> dict[str, FilterSkeleton]:
        if self.given is not None:
            return self.given
        make = GENERATORS[self.source]
        convs = {n: m for n, m in build(self.name, 10).named_modules() if isinstance(m, nn.Conv2d)}
        return {
            n: make((m.out_channels, *m.kernel_size), self.density, f"{self.name} {n}")
            for n, m in convs.items()
        }

    @cached_property
    def masked(self) -> nn.Module:
        """The dense network with zeros for dead stripes, in evaluation mode."""
        model = _fresh(self.name)
        for name, live in self.skeletons.items():
            conv = model.get_submodule(name)
            conv.weight.data.mul_(torch.from_numpy(live.live.copy())[:, None])
        return calibrated(model, NETWORKS[self.name][1])

    @cached_property
    def macs_kept(self) -> float:
        """Live multiply-adds / all, over the convolutions."""
        work = network_macs(self.name)
        return sum(
            m * (self.skeletons[n].density if n in self.skeletons else 1.0) for n, m in work.items()
        ) / sum(work.values())

    @cached_property
    def slim(self) -> nn.Module:
        """The same network, every layer narrower, by the multiple of 1/16 nearest in multiply-adds."""
        model = _fresh(self.name, slim_width(self.name, self.macs_kept))
        return calibrated(model, NETWORKS[self.name][1])

    @cached_property
    def slim_share(self) -> float:
        """The slim network's multiply-adds / the full one's."""
        slim = network_macs(self.name, slim_width(self.name, self.macs_kept))
        return sum(slim.values()) / sum(network_macs(self.name).values())


def _fresh(name: str, width: float = 1.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(name, NETWORKS[name][0], width=width)


def calibrated(model: nn.Module, size: int) -> nn.Module:
    """Normalisations with varied scales and shifts, and the statistics of one random batch."""
    generator = torch.Generator().manual_seed(2)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.2, generator=generator)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size, generator=generator))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def network_macs(name: str, width: float = 1.0) -> dict[str, int]:
    """Multiply-adds of every convolution for one image, by module name."""
    classes, size = NETWORKS[name]
    with torch.device("meta"):
        return conv_macs(build(name, classes, width=width).eval(), torch.empty(1, 3, size, size))


def slim_width(name: str, share: float) -> float:
    """The width, a multiple of 1/16, whose multiply-adds come nearest to `share` of the full network's."""
    full = sum(network_macs(name).values())
    return min(
        (i / 16 for i in range(1, 17)), key=lambda w: abs(sum(network_macs(name, w).values()) / full - share)
    )


def folded(model: nn.Module) -> nn.Module:
    """Normalisations folded into the convolutions before them."""
    return fuse(copy.deepcopy(model))


def run_network(job: NetworkJob, seconds: float, compiled: bool) -> list[Row]:
    """Every contestant's row for one network."""
    torch.set_num_threads(job.threads)
    with _training_seed():
        prepare, later = (
            _inference(job, compiled) if job.which == "inference" else (_training(job, compiled), {})
        )
        dead_filters = sum(len(s.dead_filters) for s in job.skeletons.values())
        base = Row(
            job.name, job.which, job.batch, round(job.macs_kept, 5), job.source, dead_filters, "float32",
            job.threads, "", "",
        )  # fmt: skip
        full = (
            float(sum(network_macs(job.name).values()))
            * job.batch
            * (3 if job.which == "training step" else 1)
        )

        def describe(entrant: Entrant, time: float) -> dict[str, Any]:
            return {"macs": entrant.macs * full, "gflops": 2 * entrant.macs * full / time / 1e9}

        return in_two_stages(base, prepare, later, seconds, describe)


@contextmanager
def _training_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _inference(job: NetworkJob, compiled: bool) -> tuple[Makers, Makers]:
    """Contestants by name, those that tune apart. A dense runtime gets the same zeros in its weights."""
    kept, plain, fused, slim = job.macs_kept, job.masked, folded(job.masked), folded(job.slim)
    ways, slim_ways = Ways(plain, job.x, job.threads, fused), Ways(job.slim, job.x, job.threads, slim)

    def frozen(model: nn.Module) -> Callable[[], nn.Module]:
        return partial(freeze, model, job.skeletons)

    names: Makers = {}
    for fmt in FORMATS:
        names[f"freeze {fmt}"] = partial(ways.eager, "stripe", kept, frozen(plain), fmt)
        names[f"freeze folded {fmt}"] = partial(ways.eager, "stripe", kept, frozen(fused), fmt)
    for fmt in FORMATS:
        names[f"eager {fmt}"] = partial(ways.eager, "dense", 1.0, lambda: plain, fmt)
        names[f"eager folded {fmt}"] = partial(ways.eager, "dense", 1.0, lambda: fused, fmt)
        names[f"compile {fmt}"] = partial(ways.compiled if compiled else not_compiled, fmt)
    for name in ("onnxruntime", "openvino"):
        names[name] = partial(ways.runtime, "dense", 1.0, name)
    for fmt in FORMATS:
        names[f"slim eager folded {fmt}"] = partial(
            slim_ways.eager, "slim", job.slim_share, lambda: slim, fmt
        )
    for name in ("onnxruntime", "openvino"):
        names[f"slim {name}"] = partial(slim_ways.runtime, "slim", job.slim_share, name)
    return names, {"optimize": partial(ways.optimized, kept, job.skeletons)}


def _training(job: NetworkJob, compiled: bool) -> Makers:
    """Forward, cross entropy, backward and a step of SGD."""
    kept = job.macs_kept

    def entrant(
        kind: Kind, model: Callable[[], nn.Module], fmt: str, share: float, compile_: bool = False
    ) -> Entrant:
        if compile_ and not compiled:
            return not_compiled()
        network = laid_out(model(), fmt).train()
        data = job.x.contiguous(memory_format=FORMATS[fmt])
        run = torch.compile(network) if compile_ else network
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(run(data), job.target)
            loss.backward()
            optimizer.step()
            return loss

        def check() -> str | None:
            if kind == "stripe":
                return wrong_layers(copy.deepcopy(network), data, job.target)
            loss = step()
            return None if torch.isfinite(loss) else f"loss is {loss.item()}"

        return Entrant(kind, step, check, share)

    names: Makers = {}
    for fmt in FORMATS:
        names[f"freeze {fmt}"] = partial(
            entrant, "stripe", lambda: freeze(job.masked, job.skeletons), fmt, kept
        )
    for fmt in FORMATS:
        names[f"eager {fmt}"] = partial(entrant, "dense", lambda: job.masked, fmt, 1.0)
        names[f"compile {fmt}"] = partial(entrant, "dense", lambda: job.masked, fmt, 1.0, True)
        names[f"slim eager {fmt}"] = partial(entrant, "slim", lambda: job.slim, fmt, job.slim_share)
    return names


def wrong_layers(network: nn.Module, x: Tensor, target: Tensor) -> str | None:
    """What is wrong with y, dx and dw of any StripeConv2d in one pass forward and backward; None if nothing
    is.

    No layer has a bias, as before a normalisation. Each meets the oracle on the operands it had. Gradients
    of the whole network would not do: a rounding that turns a ReLU or moves a maximum is no error, and they
    carry many of those.
    """
    seen: dict[str, list[Tensor]] = {}

    def forward(name: str, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen[name] = [args[0].detach(), y.detach()]

    def backward(name: str, dx: tuple[Tensor, ...], dy: tuple[Tensor, ...]) -> None:
        seen[name] += [dy[0].detach(), dx[0]]

    layers = {n: m for n, m in network.named_modules() if isinstance(m, StripeConv2d)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, a, y, name=name: forward(name, a, y))
        layer.register_full_backward_hook(lambda m, dx, dy, name=name: backward(name, dx, dy))
    F.cross_entropy(network(x.detach().requires_grad_()), target).backward()
    for name, layer in layers.items():
        x, y, dy, dx = seen.pop(name)
        empty = y.new_empty(0)
        operands = Operands(x, layer.weight.detach(), dy, empty, empty, y)
        failure = Oracle(_case(layer, x), operands).wrong(y, dx, layer.weight.grad)
        if failure:
            return f"{name}: {failure}"
    return None


def _case(layer: StripeConv2d, x: Tensor) -> LayerCase:
    (k, r, s), (n, c, h, w) = layer.filter_skeleton.shape, x.shape
    shape = Layer("", c, k, h, w, r, s, layer.stride[0], layer.padding, layer.groups)
    return shape.case(n, layer.filter_skeleton)
