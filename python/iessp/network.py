"""What a network's convolutions cost and which feed which: one probing forward pass answers both.

The autograd graph of that pass is walked backwards from each convolution's input to the convolutions that
made it. The graph records what really ran, so residual adds, control flow and modules used twice need no
tracing of Python code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One convolution of a probed network.

    positions: output positions P * Q, summed over the calls of one forward pass of one image.
    producers: names of the convolutions whose output channels are this one's input channels, one to one; none where
        anything else adds to them.
    price: what the budget counts for one stripe, such as its time; None: its MACs.
    """

    name: str
    positions: int
    stripe_shape: tuple[int, int, int]  # K, R, S
    stripe_channels: int  # C / groups: the length of one stripe
    producers: tuple[str, ...]
    price: float | None = None

    @property
    def stripes(self) -> int:
        k, r, s = self.stripe_shape
        return k * r * s

    @property
    def stripe_macs(self) -> int:
        """c_l = C/groups * P * Q: multiply-adds of one stripe on one image, at output resolution."""
        return self.stripe_channels * self.positions

    @property
    def macs(self) -> int:
        return self.stripes * self.stripe_macs

    @property
    def stripe_cost(self) -> float:
        return self.stripe_macs if self.price is None else self.price

    @property
    def cost(self) -> float:
        return self.stripes * self.stripe_cost


@dataclass(frozen=True)
class Network:
    """The convolutions of a model in order of first execution."""

    sites: tuple[Site, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all convolutions for one image; the few of the linear layers are not counted."""
        return sum(site.macs for site in self.sites)

    @property
    def cost(self) -> float:
        """What a budget is a share of."""
        return sum(site.cost for site in self.sites)

    def priced(self, prices: dict[str, float]) -> Network:
        """This network with other costs of a stripe, by name; the rest stays as it is."""
        return Network(tuple(replace(s, price=prices.get(s.name, s.price)) for s in self.sites))

    def __getitem__(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)


def probe(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Network:
    """Run `model` once on `example` [N, C, H, W], or on several tensors, in evaluation mode and read costs and
    producers from what ran.

    The model's mode, buffers and gradients are left as they were. Raises ValueError when no convolution runs.
    """
    examples = example if isinstance(example, tuple) else (example,)
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            names[module] = name
    positions: dict[str, int] = {}
    inputs: dict[str, list[Tensor]] = {}
    made_by: dict[object, str] = {}  # autograd node of a convolution's output -> its name

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        if not args:
            raise ValueError(
                f"{name} is given its input by name: give it by position, as a StripeConv2d takes it"
            )
        positions[name] = positions.get(name, 0) + output.shape[-2] * output.shape[-1]
        inputs.setdefault(name, []).append(args[0])
        made_by[output.grad_fn] = name

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(record) for module in names]
    model.eval()
    try:
        with torch.enable_grad():
            # A gradient on the input makes autograd record the whole pass, frozen layers included.
            given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in examples]
            model(*given)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not positions:
        shapes = ", ".join(str(tuple(x.shape)) for x in examples)
        raise ValueError(f"no nn.Conv2d ran in {type(model).__name__} on an input of shape {shapes}")

    modules = {name: module for module, name in names.items() if isinstance(module, nn.Conv2d)}

    def site(name: str) -> Site:
        conv = modules[name]
        found = dict.fromkeys(p for x in inputs[name] for p in _producers(x, made_by, given))
        alone = all(p is not None and modules[p].out_channels == conv.in_channels for p in found)
        r, s = conv.kernel_size
        shape, channels = (conv.out_channels, r, s), conv.in_channels // conv.groups
        return Site(
            name, positions[name], shape, channels, tuple(p for p in found if p is not None and alone)
        )

    return Network(tuple(site(name) for name in positions))


# Past these nodes a channel is no longer the channel of the convolution before it.
_MIXES = (
    *(
        "Addmm",
        "Mm",
        "Bmm",
        "Cat",
        "Convolution",
        "Reshape",
        "View",
        "Permute",
        "Transpose",
        "Index",
        "Slice",
    ),
    *("PixelShuffle", "NativeLayerNorm", "NativeGroupNorm", "CheckpointFunction"),
)


def _producers(x: Tensor, made_by: dict[object, str], given: list[Tensor]) -> Iterator[str | None]:
    """Names of the convolutions reached from x through nodes that keep channels apart (BN, ReLU, pooling, adds); None
    for whatever else x is made of: `given`, the network's input, and what mixes channels."""
    pending, seen = [x.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made_by:
            yield made_by[node]
        elif node.name().startswith(_MIXES) or any(getattr(node, "variable", None) is leaf for leaf in given):
            yield None
        else:
            pending.extend(parent for parent, _ in node.next_functions)
