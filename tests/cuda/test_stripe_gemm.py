"""The gather around the vendor's GEMM in CUDA C++, run on the CPU, against the float64 oracle and torch's indexing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from stripe_kernels import backends, plan, registry
from stripe_kernels.backends import cuda_stripe_gemm, gemm
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.snapshots import kept_bias
from stripe_kernels.testing import Case, case
from tests.cuda import emulated
from tests.cuda.problems import check, check_epilogue, problem_of
from tests.cuda.test_mma import WIDE

PROBLEMS = (
    *WIDE,
    case("several tiles and blocks", N=5, C=24, H=13, W=17, K=200, density=0.3),
    case("four phases", N=2, C=16, H=11, W=9, K=24, R=5, S=4, stride=(2, 2), padding=(2, 1)),
    case("phases nobody reads", N=3, C=8, H=8, W=7, K=16, R=1, S=1, stride=(2, 2), padding=(0, 0)),
    case("more taps than a word has bits", N=2, C=8, H=9, W=11, K=40, R=7, S=7, padding=(3, 3), density=0.2),
    case("maps of another size", N=2, C=8, H=9, W=6, K=24, padding=(0, 2)),
    case("groups", N=2, C=32, H=7, W=5, K=48, groups=2),
    case("no stripe of four phases", N=2, C=8, H=5, W=6, K=16, stride=(2, 2), pattern="empty"),
    case("filters off 16 bytes", N=2, C=8, H=6, W=7, K=19),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runner_of(native: ModuleType, c: Case, which: Pass, dtype: torch.dtype, images: int | None = None) -> Any:
    native_gather = {"native gather": partial(cuda_stripe_gemm.CudaGather, native)}
    with patch.dict(registry._parts, native_gather):
        config = gemm.GemmConfig(max(1, images or c.shape.N), 2)
        return gemm._RUNNERS[which](problem_of(c, "channels_last", dtype), config)


def check_stripes(
    native: ModuleType, c: Case, which: Pass, dtype: torch.dtype, images: int | None = None
) -> torch.Tensor:
    runner = runner_of(native, c, which, dtype, images)
    return check(runner, c, which, dtype, "channels_last", f"{images or c.shape.N} images at once")


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_within_the_budget(native: ModuleType, c: Case, which: Pass) -> None:
    for dtype in DTYPES:
        reason = cuda_stripe_gemm.refuse(problem_of(c, "channels_last", dtype), which)
        if reason is not None:
            assert c.shape.group_k % 8, reason
            assert which != "fprop"
            continue
        first = check_stripes(native, c, which, dtype)
        with emulated.backwards(native):
            assert torch.equal(check_stripes(native, c, which, dtype), first)
        check_stripes(native, c, which, dtype, 2)


@pytest.mark.parametrize("blocks", [1, 100])
def test_many_filters_a_warp(native: ModuleType, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(cuda_stripe_gemm, "BLOCKS", blocks)
    for c in PROBLEMS[: len(WIDE) + 2]:
        check_stripes(native, c, "fprop", torch.bfloat16)


def test_columns_in_several_blocks(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check_stripes(native, PROBLEMS[len(WIDE)], "dgrad", torch.bfloat16)
    monkeypatch.setattr(cuda_stripe_gemm, "SPREAD_BLOCKS", 1)
    assert torch.equal(check_stripes(native, PROBLEMS[len(WIDE)], "dgrad", torch.bfloat16), first)


@pytest.mark.parametrize("name", ["several tiles and blocks", "filters off 16 bytes"])
def test_epilogue(native: ModuleType, name: str) -> None:
    c = next(c for c in PROBLEMS if c.name == name)
    runner = runner_of(native, c, "fprop", torch.bfloat16)
    check_epilogue(runner, c, c.operands(torch.bfloat16, "channels_last"))


def test_a_bias_kept_for_many_calls_is_read_where_it_lies(native: ModuleType) -> None:
    """A network converts a 16-bit one once; the other gathers take it as it is."""
    c = PROBLEMS[len(WIDE)]
    read: list[int] = []

    def stripe_sum(*arguments: Any) -> None:
        read.append(arguments[-3])
        native.stripe_sum(*arguments)

    noting = SimpleNamespace(stripe_sum=stripe_sum)
    runner = runner_of(noting, c, "fprop", torch.bfloat16, 2)  # type: ignore[arg-type]
    o = c.operands(torch.bfloat16, "channels_last")
    packed, bias = runner.pack(o.weight), kept_bias(runner, o.bias)
    assert bias is not None
    y = runner(o.x, packed, bias, None, None, "relu")
    assert read == [bias.data_ptr()] * 3, "chunks of two of five images"
    assert torch.equal(runner(o.x, packed, o.bias, None, None, "relu"), y)
    plain = gemm.GemmFprop(problem_of(c, "channels_last", torch.bfloat16), gemm.GemmConfig(c.shape.N, 0))
    assert kept_bias(plain, o.bias) is o.bias


def test_many_taps_and_odd_tiles_are_refused(native: ModuleType) -> None:
    offsets, sizes = (0, 0, 0, 0), (16, 0, 0, 0, 1, 4, 4, 4, 4, 1, 32, 16, 1)
    with pytest.raises(ValueError, match="33 taps, at most 32"):
        native.stripe_sum(0, 0, 0, 1, 0, offsets, 0, (0, 0, 1, 4, 4, 4, 4, 8, 4), [(0, 0)] * 33, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="sizes are positive"):
        native.stripe_sum(0, 0, 0, 1, 0, offsets, 0, (0, 0, 1, 0, 4, 4, 4, 8, 4), [], 0, 0, 0, 0)
    with pytest.raises(ValueError, match="65 taps, at most 64"):
        native.stripe_spread(0, 0, 0, 0, 0, 8, 16, 0, sizes, [(0, 0)] * 65)
    with pytest.raises(ValueError, match="32, 64 or 128 pixels"):
        native.stripe_spread(0, 0, 0, 0, 0, 8, 16, 0, (*sizes[:10], 48, *sizes[11:]), [(0, 0)])
    with pytest.raises(ValueError, match="16 bytes"):
        native.stripe_spread(0, 0, 0, 0, 0, 6, 16, 0, sizes, [(0, 0)])


def test_what_does_not_fit_is_refused_by_name() -> None:
    big = case("big", N=1, C=8, H=64, W=512, K=512, R=3, S=3)
    far = case("far", N=1, C=8, H=40000, W=1, K=8, R=2, S=1, dilation=(39000, 1), padding=(0, 0))
    reasons = {
        "contiguous": cuda_stripe_gemm.refuse(problem_of(big, "contiguous", torch.bfloat16), "fprop"),
        "float64": cuda_stripe_gemm.refuse(problem_of(big, "channels_last", torch.float64), "fprop"),
        "filters": cuda_stripe_gemm.refuse(
            problem_of(PROBLEMS[-1], "channels_last", torch.bfloat16), "dgrad"
        ),
        "halo": cuda_stripe_gemm.refuse(problem_of(big, "channels_last", torch.bfloat16), "wgrad"),
        "far taps": cuda_stripe_gemm.refuse(problem_of(far, "channels_last", torch.bfloat16), "fprop"),
    }
    wanted = {
        "contiguous": "channels_last",
        "float64": "not float64",
        "filters": "16 bytes",
        "halo": "shared memory",
        "far taps": "32768 pixels",
    }
    assert all(word in (reasons[name] or "") for name, word in wanted.items()), reasons
    assert cuda_stripe_gemm.refuse(problem_of(big, "channels_last", torch.bfloat16), "fprop") is None


def test_a_table_without_stripes_has_a_map() -> None:
    flat, (_, _, maps), shifts = cuda_stripe_gemm.sum_tables([[], []], single=False, width=2)
    assert flat[maps : maps + 4].tolist() == [0, 0, 0, 0]
    assert shifts == []


def test_gathers_that_are_there_are_tried_and_old_choices_hold() -> None:
    """Triton's alone, the native one alone where it takes the problem, both, or torch's indexing."""
    backends.load()
    c = case("any", N=4, C=16, H=9, W=9, K=16)
    fits = replace(problem_of(c, "channels_last", torch.bfloat16), device="cuda")
    refused = replace(fits, channels_last=False)
    triton = {"gather": object}
    native = {"native gather": object, "native gather's refusal": cuda_stripe_gemm.refuse}
    for parts, wanted, other in (
        (triton | native, [1, 2], [1]),
        (triton, [1], [1]),
        (native, [2], [0]),
        ({}, [0], [0]),
    ):
        with patch.object(registry, "_parts", parts):
            assert gemm._gathers(fits, "fprop") == wanted
            assert gemm._gathers(refused, "fprop") == other
            # A choice of Triton's gather, of a file from before there was another, where that is there; else dense.
            plan.forget()
            plan.record(fits, "fprop", [plan.Candidate("stripe_gemm", (4, 1), measured=1e-5)])
            chosen = plan.make_plan(fits, "fprop", "auto").chosen
            assert (chosen.kernel, chosen.config) == (
                ("stripe_gemm", (4, 1)) if "gather" in parts else ("dense", ())
            )
    plan.forget()
