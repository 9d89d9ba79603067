"""fprop, dgrad and wgrad of the Triton kernels: in the interpreter, or on a GPU where TRITON_INTERPRET=0 is
set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stripe_kernels import backends, ops, registry
from stripe_kernels.backends.triton import configs
from stripe_kernels.backends.triton.launch import INTERPRETED
from stripe_kernels.epilogue import ACTIVATIONS, apply_epilogue
from stripe_kernels.registry import PASSES, Config, Pass, Problem
from stripe_kernels.stripe_op import StripeOp, is_channels_last
from stripe_kernels.testing import (
    CASES,
    Budget,
    Case,
    Operands,
    Trial,
    budgets,
    case,
    evaluate,
    failure,
    poisoned_memory,
)

backends.load()
# What the interpreter does with numpy.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
RESULT = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}
# Several tiles, blocks and splits in every direction, and nothing a multiple of a block.
BLOCKS = case(
    "several blocks", N=2, C=37, H=9, W=8, K=35, R=2, S=3, stride=(2, 1), padding=(1, 2), density=0.3
)
# A bit for each tap fits 64 and no word: bounds are checked in two other ways.
TAPS = [
    case("42 taps", N=2, C=3, H=9, W=8, K=5, R=6, S=7, padding=(3, 2), density=0.3),
    case("64 taps", N=1, C=3, H=9, W=10, K=5, R=8, S=8, padding=(4, 2), density=0.2),
]
PIXELS = case("many pixels", N=7, C=5, H=7, W=9, K=9, density=0.2)


def problem_of(case: Case, operands: Operands, which: Pass) -> Problem:
    like = operands.dy if which == "dgrad" else operands.x
    op = StripeOp.of(*case.arguments, "triton")
    return op.problem(case.shape.input_size, like.dtype, like.device, is_channels_last(like))


def run(name: str, which: Pass, case: Case, operands: Operands, config: Config | None = None) -> Tensor:
    """One pass in one configuration, by default the one predicted to be fastest."""
    kernel, problem = registry.find(name), problem_of(case, operands, which)
    assert kernel.refuse(problem, which) is None
    configs = kernel.candidates(problem, which)
    runner = kernel.build(problem, which, config or min(configs, key=configs.__getitem__))
    with poisoned_memory():
        if which == "wgrad":
            return runner(operands.dy, operands.x)
        packed = runner.pack(operands.weight)
        if which == "dgrad":
            return runner(operands.dy, packed)
        return runner(operands.x, packed, None, None, None, "none")


def check(name: str, case: Case, dtype: torch.dtype, layout: str, config: Config | None = None) -> None:
    operands = case.operands(dtype, layout, DEVICE)
    budget = budgets(case, operands)
    for which in PASSES:

        def trial(draw: int, which: Pass = which) -> Trial:
            drawn = case.operands(dtype, layout, DEVICE, draw) if draw else operands
            allowed = budgets(case, drawn, which) if draw else budget
            return Trial(allowed.of(which), run(name, which, case, drawn, config))

        found = failure(trial)
        assert found is None, f"{name} {which} of {case}, {dtype}, {layout}: the result {found}"


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    check("triton", CASES[name], torch.float32, "contiguous")


@pytest.mark.parametrize(
    "name", ["lopsided", "grouped lopsided", "many channels", "strided", "no image", "tiny map"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_channels_last(name: str, dtype: torch.dtype) -> None:
    check("triton", CASES[name], dtype, "channels_last")


@pytest.mark.parametrize(
    "layout", ["channels_last", "permuted", "sliced", "channels_last sliced", "expanded", "offset"]
)
def test_layouts(layout: str) -> None:
    check("triton", CASES["grouped lopsided"], torch.float32, layout)


@pytest.mark.parametrize("which", PASSES)
def test_every_configuration(which: Pass) -> None:
    for layout in ("contiguous", "channels_last"):
        operands = BLOCKS.operands(torch.float32, layout, DEVICE)
        budget: Budget = getattr(budgets(BLOCKS, operands), RESULT[which])
        configs = registry.find("triton").candidates(problem_of(BLOCKS, operands, which), which)
        assert len(configs) > 2
        for config in configs:
            budget.check(run("triton", which, BLOCKS, operands, config), f"{which} {layout} {config}:")


@pytest.mark.parametrize("problem", TAPS, ids=lambda c: c.name)
@pytest.mark.parametrize("which", PASSES)
def test_filters_of_many_taps(problem: Case, which: Pass) -> None:
    for layout in ("contiguous", "channels_last"):
        operands = problem.operands(torch.float32, layout, DEVICE)
        budget: Budget = getattr(budgets(problem, operands), RESULT[which])
        configs: list[tuple[str, Config | None]] = [("triton", None), ("stripe_gemm", (1, 1))]
        if which == "fprop":
            configs.append(("triton", (16, 16, 16, 1, 4, 2)))
        for name, config in configs:
            budget.check(run(name, which, problem, operands, config), f"{name} {layout}:")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["grouped lopsided", "strided", "dead filters", "empty", "no image", "uneven dilated"]
)
def test_filters_split_by_kernel_row(name: str, dtype: torch.dtype) -> None:
    """Two images a chunk, so that the last one is of another size; with the epilogue in the second stage."""
    problem = CASES[name]
    for layout in ("contiguous", "channels_last"):
        operands = problem.operands(dtype, layout, DEVICE)
        made = problem_of(problem, operands, "fprop")
        config = (16, 16, 16, 2, 4, 2)
        budgets(problem, operands).y.check(run("triton", "fprop", problem, operands, config), layout)
        split, whole = (registry.find("triton").build(made, "fprop", (16, 16, 16, s, 4, 2)) for s in (2, 0))
        rest = (operands.bias, operands.scale, operands.residual, "hardswish")
        with poisoned_memory():
            found, expected = (r(operands.x, r.pack(operands.weight), *rest).float() for r in (split, whole))
        close = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=close, atol=8 * close)


@pytest.mark.parametrize("splits", [3, 17])
def test_split_pixels_add_up_and_repeat(splits: int) -> None:
    """17 splits of 7 steps: most have nothing to add."""
    operands = PIXELS.operands(torch.float32, device=DEVICE)
    config = (16, 16, 64, splits, 0, 4, 2)
    first = run("triton", "wgrad", PIXELS, operands, config)
    budgets(PIXELS, operands).dw.check(first)
    assert torch.equal(first, run("triton", "wgrad", PIXELS, operands, config))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("extras", ["bias", "scale bias", "bias residual", "scale bias residual"])
def test_epilogue(activation: str, extras: str) -> None:
    problem = CASES["grouped lopsided"]
    operands = problem.operands(torch.float32, "channels_last", DEVICE)
    given = [
        getattr(operands, name) if name in extras.split() else None for name in ("bias", "scale", "residual")
    ]
    exact, own = (
        apply_epilogue(
            evaluate(problem, operands, dtype).y,
            *(None if t is None else t.to(dtype) for t in given),
            activation,
        )
        for dtype in (torch.float64, torch.float32)
    )
    with poisoned_memory():
        op = StripeOp.of(*problem.arguments, "triton")
        y = ops.fprop(op, operands.x, operands.weight, *given, activation)
    Budget.of(exact, own).check(y)


def test_a_residual_of_another_layout() -> None:
    problem = CASES["lopsided"]
    operands = problem.operands(torch.float32, "contiguous", DEVICE)
    residual = operands.residual.to(memory_format=torch.channels_last)
    op = StripeOp.of(*problem.arguments, "triton")
    both = [
        ops.fprop(op, operands.x, operands.weight, None, None, r, "none")
        for r in (residual, operands.residual)
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_nan_of_x_reaches_its_readers(activation: str) -> None:
    problem = CASES["full"]
    operands = problem.operands(torch.float32, device=DEVICE)
    operands.x[1, 3, 2, 2] = torch.nan
    y = ops.fprop(
        StripeOp.of(*problem.arguments, "triton"), operands.x, operands.weight, activation=activation
    )
    exact = apply_epilogue(evaluate(problem, operands, torch.float64).y, None, None, None, activation)
    assert torch.equal(y.isnan(), exact.isnan())
    assert y.isnan().any()


def test_gradients_through_the_operator() -> None:
    problem = CASES["strided"]
    operands = problem.operands(torch.float32, device=DEVICE)
    x, weight = operands.x.requires_grad_(), operands.weight.requires_grad_()
    y = ops.fprop(StripeOp.of(*problem.arguments, "triton"), x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), operands.dy)
    budget = budgets(problem, operands)
    budget.y.check(y)
    budget.dx.check(dx)
    budget.dw.check(dw)


@pytest.mark.parametrize("which", PASSES)
def test_refusals_have_reasons(which: Pass) -> None:
    kernel = registry.find("triton")
    problem = problem_of(PIXELS, PIXELS.operands(device=DEVICE), which)
    assert "float64" in str(kernel.refuse(replace(problem, dtype="float64"), which))
    assert "xpu" in str(kernel.refuse(replace(problem, device="xpu"), which))


@pytest.mark.parametrize("which", PASSES)
def test_stripe_gemm_with_the_fused_gather(which: Pass) -> None:
    """Two images a chunk, so that the last chunk is another size."""
    for name in (
        "lopsided",
        "grouped lopsided",
        "strided",
        "stride beyond the filter",
        "many channels",
        "empty",
    ):
        for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last")):
            operands = CASES[name].operands(dtype, layout, DEVICE)
            budget: Budget = getattr(budgets(CASES[name], operands), RESULT[which])
            budget.check(run("stripe_gemm", which, CASES[name], operands, (2, 1)), f"{name} {dtype}:")


def test_fused_gather_epilogue_and_float64() -> None:
    problem = CASES["lopsided"]
    for dtype in (torch.float32, torch.float64):
        operands = problem.operands(dtype, "contiguous", DEVICE)
        made = problem_of(problem, operands, "fprop")
        fused, plain = (registry.find("stripe_gemm").build(made, "fprop", (2, f)) for f in (1, 0))
        packed = plain.pack(operands.weight)
        rest = (operands.bias, operands.scale, operands.residual, "hardswish")
        with poisoned_memory():
            difference = fused(operands.x, packed, *rest) - plain(operands.x, packed, *rest)
        assert difference.abs().max() <= 8 * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("kilobytes", [227, 99, 64])
def test_configurations_fit_the_shared_memory_there_is(
    which: Pass, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_shared_memory", lambda: kilobytes * 1024)
    wide = case("wide", N=64, C=256, H=14, W=14, K=256, density=0.3)
    operands = wide.operands(torch.bfloat16, "channels_last", "meta")
    offered = registry.find("triton").candidates(problem_of(wide, operands, which), which)
    assert offered
    for rows, columns, depth, *_, stages in offered:  # every configuration begins and ends like this
        assert stages * (rows + columns) * depth * 2 <= kilobytes * 1024
    if kilobytes == 227:
        assert len(offered) > 4
