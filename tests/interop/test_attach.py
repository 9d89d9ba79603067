"""iessp.attach on models that others wrote: timm's, where it can be imported."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iessp
from iessp.attach import network_of
from iessp.timing import compare
from stripe_kernels import StripeConv2d
from tests.interop import needed

STEPS = 8


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv2_050", "regnety_002", "ghostnet_050", "convnext_atto"]
)
def test_a_model_of_timm_is_pruned_in_an_ordinary_loop(name: str) -> None:
    timm = needed("timm")
    torch.manual_seed(0)
    # Pointwise too: but for the first they hold most of the multiply-adds, and 30 % were out of reach.
    model = iessp.attach(timm.create_model(name, num_classes=4), example_input=images(1), pointwise=True)
    budgeted = iessp.StripeLoss(model, budget=0.3, steps=STEPS, weight_decay=1e-3)
    optimiser = torch.optim.AdamW(iessp.param_groups(model, lr=1e-3, weight_decay=1e-3))
    for _ in range(STEPS):
        loss = budgeted(F.cross_entropy(model(images(8)), torch.arange(8) % 4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    skeletons = iessp.skeletons(model)
    dead = {n for n, s in skeletons.items() if not s.all()}
    assert len(dead) > len(skeletons) // 2
    assert 0.29 < iessp.macs_kept(network_of(model), skeletons) <= 0.3

    frozen = iessp.freeze(model)
    packed = {n: m for n, m in frozen.named_modules() if isinstance(m, StripeConv2d)}
    assert packed.keys() == dead
    assert all(torch.equal(layer.skeleton, skeletons[n]) for n, layer in packed.items())
    assert compare(frozen, model, images(4)).ok


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050", "regnetx_002"])
def test_channels_of_a_model_of_timm_come_from_where_the_gates_think(name: str) -> None:
    """A producer's first channel, made NaN, spoils the reader's first channel and no other."""
    timm = needed("timm")
    model = iessp.attach(timm.create_model(name, num_classes=4).eval(), example_input=images(1))
    claims = [(p, reader) for reader, gate in iessp.gates(model).items() for p in gate.site.producers]
    assert len(claims) >= len(iessp.gates(model)) - 1
    for producer, reader in claims:
        assert spoilt(model, producer, reader) == [0], (producer, reader)


def spoilt(model: nn.Module, producer: str, reader: str) -> list[int]:
    """The channels of what `reader` gets that are NaN once the producer's first is; nothing passes through other
    convolutions."""
    arrived: list[Tensor] = []

    def output(conv: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if conv is model.get_submodule(producer):
            return y.index_fill(1, torch.tensor(0), torch.nan)
        return torch.zeros_like(y)

    hooks = [conv.register_forward_hook(output) for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    hooks.append(
        model.get_submodule(reader).register_forward_pre_hook(lambda conv, args: arrived.append(args[0]))
    )
    with torch.no_grad():
        model(images(1))
    for hook in hooks:
        hook.remove()
    return arrived[0].isnan().all(dim=(0, 2, 3)).nonzero().flatten().tolist()
