"""fprop of few channels, and the epilogue behind torch's convolution."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stripe_kernels import backends, ops, registry
from stripe_kernels.backends.dense import DenseFprop
from stripe_kernels.backends.triton.epilogue import epilogue
from stripe_kernels.backends.triton.launch import INTERPRETED, at_hand
from stripe_kernels.backends.triton.pool import TritonMaxPool
from stripe_kernels.backends.triton.schedule import StemSchedule
from stripe_kernels.epilogue import ACTIVATIONS, apply_epilogue
from stripe_kernels.stripe_op import StripeOp, is_channels_last
from stripe_kernels.testing import CASES, Budget, Case, Operands, budgets, case, evaluate, poisoned_memory

backends.load()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
STEM = registry.find("triton_stem")
# Taps and channels in one step, in several; blocks that are not full; a filter that leaves the image on every side.
STEMS = [
    case("3x3 stem", N=2, C=3, H=9, W=7, K=24, padding=(1, 1), density=1.0),
    case("7x7 stem", N=1, C=3, H=13, W=12, K=20, R=7, S=7, stride=(2, 2), padding=(3, 3), density=1.0),
    case("some stripes", N=3, C=5, H=6, W=9, K=37, R=2, S=3, stride=(2, 1), padding=(1, 2), density=0.2),
    case("groups", N=2, C=6, H=7, W=6, K=22, padding=(2, 1), dilation=(2, 1), groups=2, density=0.4),
    case("nothing alive", N=2, C=2, H=5, W=4, K=5, padding=(1, 1), density=0.0),
    CASES["no image"],
]


def run(
    problem: Case, operands: Operands, config: tuple[int, ...] | None = None, epilogue_: bool = False
) -> torch.Tensor:
    op = StripeOp.of(*problem.arguments, "triton_stem")
    x = operands.x
    made = op.problem(tuple(x.shape), x.dtype, x.device, is_channels_last(x))
    assert STEM.refuse(made, "fprop") is None
    configs = STEM.candidates(made, "fprop")
    runner = STEM.build(made, "fprop", config or min(configs, key=configs.__getitem__))
    rest = (
        (operands.bias, operands.scale, operands.residual, "silu")
        if epilogue_
        else (None, None, None, "none")
    )
    with poisoned_memory():
        return runner(x, runner.pack(operands.weight), *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", STEMS, ids=lambda c: c.name)
def test_stem(problem: Case, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last", "sliced"):
        operands = problem.operands(dtype, layout, DEVICE)
        budgets(problem, operands, "fprop").y.check(run(problem, operands), layout)


@pytest.mark.parametrize("config", [(16, 16, 16, 4), (64, 16, 32, 4), (32, 32, 64, 8)], ids=str)
def test_configurations(config: tuple[int, ...]) -> None:
    for problem in STEMS[1:4]:
        operands = problem.operands(torch.float32, "channels_last", DEVICE)
        budgets(problem, operands, "fprop").y.check(run(problem, operands, config), problem.name)


def test_stem_with_its_epilogue() -> None:
    for layout in ("contiguous", "channels_last"):
        problem = STEMS[3]
        operands = problem.operands(torch.float32, layout, DEVICE)
        rest = (operands.bias, operands.scale, operands.residual)
        exact, own = (
            apply_epilogue(
                evaluate(problem, operands, dtype, only="fprop").y, *(t.to(dtype) for t in rest), "silu"
            )
            for dtype in (torch.float64, torch.float32)
        )
        Budget.of(exact, own).check(run(problem, operands, epilogue_=True))


def test_nan_reaches_its_readers() -> None:
    problem = STEMS[0]
    operands = problem.operands(torch.float32, device=DEVICE)
    operands.x[1, 2, 4, 3] = torch.nan
    op = StripeOp.of(*problem.arguments, "triton_stem")
    y = ops.fprop(op, operands.x, operands.weight, activation="relu")
    expected = F.relu(evaluate(problem, operands, torch.float64, only="fprop").y)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().any()


def test_dead_taps_are_not_executed() -> None:
    live = np.zeros((40, 3, 3), bool)
    live[:16, 0, 1] = live[16:32, 1] = True
    problem = case("", N=1, C=3, H=4, W=4, K=40, padding=(1, 1))
    skeleton = type(problem.skeleton)(live)
    plan = StemSchedule.of(skeleton, problem.shape, 16, 16)
    assert plan.step_ptr.tolist() == [0, 1, 2, 2]
    assert (plan.slot[:16, 3] < 1 << 30).sum() == 3
    assert (plan.slot[16:, 3] < 1 << 30).sum() == 9


def test_refusals() -> None:
    problem = StripeOp.of(*STEMS[0].arguments, "auto").problem(
        (1, 3, 9, 7), torch.float32, torch.device("cpu"), False
    )
    assert "fprop" in str(STEM.refuse(problem, "wgrad"))
    wide = case("", N=1, C=16, H=3, W=3, K=2)
    assert "16" in str(STEM.refuse(replace(problem, shape=wide.shape), "fprop"))
    long = case("", N=1, C=3, H=40, W=3, K=2, R=28, S=3)
    assert "28" in str(STEM.refuse(replace(problem, shape=long.shape), "fprop"))
    assert "float64" in str(STEM.refuse(replace(problem, dtype="float64"), "fprop"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(2, 24, 5, 6), (3, 70, 7, 1), (1, 5, 9, 9)], ids=str)
def test_epilogue_in_one_pass(size: tuple[int, ...], activation: str) -> None:
    """In bfloat16 rounded once, where torch rounds after every step."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for last in (torch.contiguous_format, torch.channels_last):
            drawn = (torch.randn(s, generator=generator) for s in (size, (size[1],), (size[1],), size))
            y, bias, scale, residual = (t.to(DEVICE, dtype) for t in drawn)
            y = y.to(memory_format=last)
            for extras in ((bias, None, None), (None, scale, residual), (bias, scale, residual), (None,) * 3):
                exact, own = (
                    apply_epilogue(y.to(t), *(None if e is None else e.to(t) for e in extras), activation)
                    for t in (torch.float64, torch.float32)
                )
                given = y.clone()
                found = epilogue(given, *extras, activation)
                assert found is given
                Budget.of(exact, own.to(dtype)).check(found, f"{dtype} {last}:")


def test_what_torch_finishes() -> None:
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    bias = torch.randn(3, dtype=torch.float64, device=DEVICE)
    assert torch.equal(epilogue(y.clone(), bias, None, None, "relu"), F.relu(y + bias[:, None, None]))
    apart = torch.randn(2, 3, 4, 10, device=DEVICE)[..., ::2]
    assert torch.equal(epilogue(apart, None, None, None, "relu"), F.relu(apart))


def test_without_a_compiler_or_on_older_chips_torch_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for compiler, capability, there in ((None, (9, 0), False), ("/cc", (7, 5), False), ("/cc", (8, 0), True)):
        with monkeypatch.context() as machine:
            machine.delenv("CC", raising=False)
            machine.setattr("shutil.which", lambda name, found=compiler: found)
            machine.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            at_hand.cache_clear()
            assert at_hand(gpu) == there
    at_hand.cache_clear()
    for module in ("epilogue", "pool"):
        name = f"stripe_kernels.backends.triton.{module}"
        monkeypatch.setattr(importlib.import_module(name), "at_hand", lambda device: False)
    y, bias = torch.randn(2, 3, 4, 5, device=DEVICE), torch.randn(3, device=DEVICE)
    given = y.clone()
    assert epilogue(given, bias, None, None, "relu") is not given
    assert torch.equal(epilogue(y.clone(), bias, None, None, "relu"), F.relu(y + bias[:, None, None]))
    x = y.repeat(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    assert not TritonMaxPool.takes(((2, 2), (2, 2), (0, 0), (1, 1)), x)


def test_dense_on_a_gpu_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(*arguments: object) -> torch.Tensor:
        seen.append(arguments)
        return epilogue(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(registry._parts, "epilogue", noted)
    problem = CASES["uneven dilated"]
    operands = problem.operands(torch.float32, "channels_last", DEVICE)
    made = StripeOp.of(*problem.arguments, "dense").problem(
        tuple(operands.x.shape), torch.float32, operands.x.device, True
    )
    rest = (operands.bias, operands.scale, operands.residual, "relu6")
    plain, fused = (DenseFprop(replace(made, device=device)) for device in ("cpu", "cuda"))
    packed = plain.pack(operands.weight)
    torch.testing.assert_close(fused(operands.x, packed, *rest), plain(operands.x, packed, *rest))
    assert len(seen) == 1
    fused(operands.x, packed, operands.bias, None, None, "none")
    assert seen[1][1] is operands.bias
