"""Training loops as people write them, from attach to freeze: each comes to its budget, and frozen equals masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import iessp
from iessp.attach import METHODS, network_of

STEPS, BUDGET = 20, 0.4


def attached(method: str = "iem") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )
    return iessp.attach(net, method, example_input=torch.zeros(1, 2, 8, 8))


def train(
    model: nn.Module,
    *,
    called: nn.Module | None = None,
    passes: int = 1,
    dtype: torch.dtype | None = None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """`passes` calls of the network a step, under autocast to `dtype`; float16 with its scaler."""
    called = called or model.train()
    loss = iessp.StripeLoss(model, budget=BUDGET, steps=STEPS * passes, weight_decay=1e-3)
    optimiser = torch.optim.AdamW(iessp.param_groups(model, 3e-3, gate_lr=0.1, weight_decay=1e-3))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        for _ in range(passes):
            x = torch.randn(8, 2, 8, 8, generator=generator)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                task = F.cross_entropy(called(x), torch.arange(8) % 4)
            scaler.scale(loss(task) / passes).backward()
        scaler.step(optimiser)
        scaler.update()
        after()


def check(model: nn.Module) -> None:
    kept = iessp.macs_kept(network_of(model), iessp.skeletons(model))
    assert BUDGET - 0.01 < kept <= BUDGET
    x: Tensor = torch.randn(4, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(iessp.freeze(model).eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model = attached()
    train(model, dtype=dtype)
    check(model)


def test_gradients_of_several_passes_a_step() -> None:
    model = attached()
    train(model, passes=3)
    check(model)


@pytest.mark.parametrize("method", METHODS)
def test_compiled(method: str) -> None:
    """The schedule changes masks between a pass and its backward, for which the compiled pass saved them; a phase is
    compiled once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = attached(method)
    train(model, called=torch.compile(model, backend=counter, fullgraph=True), passes=2)
    assert counter.frame_count == 3
    if method != "l1-filter":  # its budget is after compaction
        check(model)


def test_averaged_weights() -> None:
    """Gates of an average do not see the schedule: they are put into the state of the model's own."""
    model = attached()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, after=lambda: averaged.update_parameters(model))
    with pytest.warns(UserWarning, match="copy_gates"):
        assert iessp.freeze(averaged) is not None
    with pytest.raises(ValueError, match=r"only one of them has \['0'"):
        iessp.copy_gates(model, iessp.detach(copy.deepcopy(model)))
    iessp.copy_gates(model, averaged)
    check(averaged)
    mine, theirs = (iessp.gates(m)["0"] for m in (model, averaged))
    assert torch.equal(mine.gate(), theirs.gate())
    assert not torch.equal(model[8].weight, averaged.module[8].weight)
