"""Put gates on a model, read them, and take them off again."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iessp.budget import compacted_macs_kept, cut
from iessp.gate import StripeGate
from iessp.iem import IEMGate
from iessp.network import Network, probe
from iessp.rivals import FilterSkeletonGate, L1FilterGate, MagnitudeGate, RandomGate

METHODS: dict[str, type[StripeGate]] = {
    "iem": IEMGate,
    "filter-skeleton": FilterSkeletonGate,
    "magnitude": MagnitudeGate,
    "random": RandomGate,
    "l1-filter": L1FilterGate,
}

# Learning rate of a module's shared weights, which move many gates at once, over that of a free bias.
MODULE_RATE = 0.1

Model = TypeVar("Model", bound=nn.Module)


def nearest(kind: str, given: str, valid: Iterable[str]) -> str:
    """'unknown method "iam": did you mean "iem"? Valid: ...'"""
    valid = list(valid)
    close = difflib.get_close_matches(given, valid, n=1)
    hint = f' did you mean "{close[0]}"?' if close else ""
    return f'unknown {kind} "{given}":{hint} Valid: {", ".join(valid) or "none"}'


def attach(
    model: Model,
    method: str = "iem",
    *,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    pointwise: bool = False,
    exclude: Iterable[str] = (),
    prices: dict[str, float] | None = None,
    **options: object,
) -> Model:
    """Put a stripe gate on the convolutions of `model`, in place, and return it.

    method: one of `METHODS`; `options` are that method's (`METHODS[name].options` lists them with their
    defaults).
    example_input: [N, C, H, W], or a tuple of all that the model takes, run once to count MACs and to find which layer
        feeds which. None: one 32x32 image with the channels of the first convolution, which gives the same shares of
        MACs as any size the strides divide.
    pointwise: gate 1x1 convolutions too, where a stripe is a whole filter.
    exclude: names of convolutions to leave alone.
    prices: what the budget counts for a stripe of each convolution, in place of its MACs (`iessp.latency`).

    The gates have parameters: build the optimiser afterwards (see `param_groups`). Raises ValueError, before the model
    is touched, for unknown names and options of another type, a model without convolutions to gate or with one that
    cannot have a gate, and one that has gates already.
    """
    check_options(method, options)
    kind = METHODS[method]
    if gates(model):
        raise ValueError(f"{type(model).__name__} has gates already: detach it first")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for name in (*exclude, *(prices or {})):
        if name not in convs:
            raise ValueError(nearest("convolution", name, convs))
    network = _probed(model, convs, example_input).priced(prices or {})

    sites = [
        site
        for site in network.sites
        if site.name not in exclude and (pointwise or convs[site.name].kernel_size != (1, 1))
    ]
    if not sites:
        left = f"pointwise={pointwise}, exclude={exclude}"
        ones = sum(convs[site.name].kernel_size == (1, 1) for site in network.sites)
        hint = f": pointwise=True gates its {ones} 1x1 convolutions" if ones and not pointwise else ""
        raise ValueError(f"{type(model).__name__} has no convolution to gate with {left}{hint}")
    _check_weights(model, {site.name: convs[site.name] for site in sites})
    made = [kind(convs[site.name], site, network, **options) for site in sites]
    for site, gate in zip(sites, made, strict=True):
        parametrize.register_parametrization(convs[site.name], "weight", gate)
        convs[site.name].register_forward_pre_hook(gate.observe)
    found = gates(model)
    for gate in found.values():
        if isinstance(gate, IEMGate) and gate.use["module"]:
            gate.upstream = tuple(g for p in gate.site.producers if isinstance(g := found.get(p), IEMGate))
    return model


def check_options(method: str, options: dict[str, Any]) -> None:
    """Raises ValueError for a method that does not exist, an option that it has not, and one of another type: "False"
    is true."""
    if method not in METHODS:
        raise ValueError(nearest("method", method, METHODS))
    known = METHODS[method].options
    for option, value in options.items():
        if option not in known:
            raise ValueError(nearest(f"option of {method}", option, known))
        kind = type(known[option])
        taken = (int, float) if kind is float else kind
        if not isinstance(value, taken) or isinstance(value, bool) is not (kind is bool):
            raise ValueError(f"option {option} of {method} takes {kind.__name__}, got {value!r}")


def _probed(
    model: nn.Module, convs: dict[str, nn.Conv2d], example: Tensor | tuple[Tensor, ...] | None
) -> Network:
    if not convs:
        import stripe_kernels

        stripes = any(isinstance(m, stripe_kernels.StripeConv2d) for m in model.modules())
        hint = ": its stripes are frozen, stripe_kernels.to_dense(model) has convolutions" if stripes else ""
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d{hint}")
    if example is not None:
        return probe(model, example)
    first = next(iter(convs.values()))
    try:
        return probe(model, first.weight.new_zeros(1, first.in_channels, 32, 32))
    except (RuntimeError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} does not take the image [1, {first.in_channels}, 32, 32] that stands in for "
            f"example_input: {reason}"
        ) from error


def _check_weights(model: nn.Module, convs: dict[str, nn.Conv2d]) -> None:
    """Raises ValueError for a convolution whose weight a gate would mask in vain, or for others too."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    for name, conv in convs.items():
        kind, weight = type(conv), conv._parameters.get("weight")
        if weight is None:
            why = (
                "its weight is computed from others, as by weight_norm or a pruning mask: make it plain first"
            )
        elif kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
            why = f"{kind.__name__} computes something else than nn.Conv2d"
        elif owners[weight] > 1:
            why = "another module has the same weight, which has one mask: use one module in both places"
        else:
            continue
        raise ValueError(f'"{name}" cannot have a gate; exclude it, or: {why}')


def gated(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The gated convolutions by name, in order of execution; works through DDP and torch.compile wrappers."""
    found = {
        gate.site.name: module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and (gate := StripeGate.of(module)) is not None
    }
    if not found:
        return {}
    first = StripeGate.of(next(iter(found.values())))
    order = first.network.sites if first is not None else ()
    return {site.name: found[site.name] for site in order if site.name in found}


def gates(model: nn.Module) -> dict[str, StripeGate]:
    """The gates by name of their convolution; empty for a model without any."""
    return {name: gate for name, conv in gated(model).items() if (gate := StripeGate.of(conv)) is not None}


def network_of(model: nn.Module) -> Network:
    """Costs and connections of an attached model."""
    return next(iter(_needed(model).values())).network


def skeletons(model: nn.Module) -> dict[str, Tensor]:
    """name -> bool [K, R, S]: the stripes the network sees now."""
    return {name: gate.live() for name, gate in _needed(model).items()}


@torch.no_grad()
def scores_of(model: nn.Module) -> dict[str, Tensor]:
    """name -> [K, R, S]: what the gates think of their stripes."""
    found = _needed(model)
    return {name: found[name].scores(StripeGate.original(conv)) for name, conv in gated(model).items()}


def rank(model: nn.Module, budget: float) -> dict[str, Tensor]:
    """Skeletons by the gates' scores that keep at most `budget` of the MACs: see `cut`.

    A method that drops whole filters is given what that saves in the next layer: its MACs after compaction
    meet the budget.
    """
    scores, network = scores_of(model), network_of(model)
    if not all(gate.whole_filters for gate in gates(model).values()):
        return cut(network, scores, budget)
    low, high = budget, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        within = compacted_macs_kept(network, cut(network, scores, middle, whole_filters=True)) <= budget
        low, high = (middle, high) if within else (low, middle)
    return cut(network, scores, low, whole_filters=True)


def settle(model: nn.Module, budget: float) -> dict[str, Tensor]:
    """Fix the skeletons: the stripes of highest score that keep at most `budget` of the MACs. Returns them
    by name."""
    chosen = rank(model, budget)
    for name, gate in gates(model).items():
        gate.settle(chosen[name])
    return chosen


def copy_gates(model: nn.Module, averaged: nn.Module) -> None:
    """Put the gates of `averaged`, a copy of `model` whose weights are averages, into the state of the model's own:
    their phase is no weight, and an average of masks is none. Call it before `averaged` is evaluated or frozen.

    Raises ValueError where the two have other gates.
    """
    ours, theirs = _needed(model), gates(averaged)
    if set(ours) != set(theirs):
        raise ValueError(
            f"an averaged copy has the gates of its model; only one of them has {sorted(set(ours) ^ set(theirs))}"
        )
    for name, gate in ours.items():
        theirs[name].load_state_dict(gate.state_dict())


def detach(model: Model, *, merge: bool = True) -> Model:
    """Take the gates off, in place: plain convolutions whose weight is W * g (merge=True) or W as if never
    gated."""
    for conv in gated(model).values():
        _unobserved(conv)
        _own_class(conv)
        parametrize.remove_parametrizations(conv, "weight", leave_parametrized=merge)
    return model


def _unobserved(conv: nn.Module) -> None:
    """Takes off the hook through which a gate sees what its convolution is given."""
    for key, hook in list(conv._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), StripeGate):
            del conv._forward_pre_hooks[key]


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: removing the parametrization deletes a property from the
    class that torch made for it, which copies of the module share and still need.
    """
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def freeze(model: nn.Module) -> nn.Module:
    """A new model that runs only the stripes that live now, on the stripe kernels; `model` stays as it is.

    Every gated convolution with dead stripes becomes a `stripe_kernels.StripeConv2d`; outputs equal the
    masked model's; wrappers come off as in `stripe_kernels.freeze`. Warns where `StripeLoss` has not come to the end of
    its cut.
    """
    import stripe_kernels

    if any(gate.phase != "settled" for gate in gates(model).values()):
        warnings.warn(
            "frozen before the schedule of StripeLoss has settled the skeletons: the budget is not met yet; an average "
            "of weights needs copy_gates(model, average) first",
            stacklevel=2,
        )
    live, names = skeletons(model), {module: name for name, module in model.named_modules()}
    frozen = stripe_kernels.freeze(model, {names[conv]: live[site] for site, conv in gated(model).items()})
    for module in frozen.modules():
        _unobserved(module)
    return frozen


def param_groups(
    model: nn.Module, lr: float, *, gate_lr: float = 1e-2, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimiser groups: weights to decay; gated weights, norms and biases, not decayed; gates, at `gate_lr`.

    weight_decay: give it here, an optimiser's own does not reach groups that name one. Gated weights are not decayed
    because a dead stripe would fade and could not return: give their decay to `StripeLoss`, which applies it to live
    stripes. Under plain SGD the budget's gradient on a gate is
    about lambda / (number of stripes) and hardly moves it, so give the gates (`gate_parameters`) to Adam.
    """
    held = {id(StripeGate.original(conv)) for conv in gated(model).values()}
    in_gates = gate_parameters(model)
    apart = {id(p) for gate in gates(model).values() for p in gate.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    decayed = [p for p in rest if p.dim() > 1 and id(p) not in held]
    plain = [p for p in rest if p.dim() <= 1 or id(p) in held]
    plain += [p for g in gates(model).values() if g.with_weights for p in g.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in in_gates if p.dim() == 3], "lr": gate_lr, "weight_decay": 0.0},
        {"params": [p for p in in_gates if p.dim() < 3], "lr": gate_lr * MODULE_RATE, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the gates that are for Adam: all but those of filter-skeleton."""
    return [p for gate in gates(model).values() if not gate.with_weights for p in gate.parameters()]


def _needed(model: nn.Module) -> dict[str, StripeGate]:
    found = gates(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no gates: call iessp.attach(model) first")
    return found
