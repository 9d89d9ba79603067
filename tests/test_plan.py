"""Plans and the registry: a deterministic choice with its reasons, and kernels that run or say why not."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stripe_kernels import list_kernels, plan, registry, stripe_conv2d
from stripe_kernels.backends import cpu_cost, cpu_cycles, cpu_tiling, dense
from stripe_kernels.geometry import ConvShape
from stripe_kernels.plan import Candidate, make_plan
from stripe_kernels.registry import PASSES, Problem
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES
from tests.passes import KERNELS, NATIVE, problem_of

CASE = CASES["one image"]


def problem(which: str = "fprop", dtype: torch.dtype = torch.float32):
    return problem_of(CASE, CASE.operands(dtype), which)


@pytest.fixture
def no_measurements():
    plan.forget()
    yield
    plan.forget()


def test_every_kernel_is_listed() -> None:
    assert list_kernels() == sorted(registry.kernels())
    assert {"dense", "reference"} < set(list_kernels())
    assert NATIVE, "the extension _cpu is not there"


@pytest.mark.parametrize("which", PASSES)
def test_equal_problems_have_equal_plans(which) -> None:
    first = make_plan(problem(which), which)
    make_plan.cache_clear()
    assert make_plan(problem(which), which) == first
    assert first.chosen in first.candidates
    assert first.chosen.refusal is None


@pytest.mark.parametrize("which", PASSES)
def test_auto_takes_the_best_prediction_and_never_the_oracle(which) -> None:
    made = make_plan(problem(which), which)
    runnable = [c for c in made.candidates if c.refusal is None]
    assert made.chosen.predicted == min(c.predicted for c in runnable)
    assert "reference" not in {c.kernel for c in runnable}
    assert "dense" in {c.kernel for c in runnable}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_wgrad_of_small_maps_is_not_dense(size, no_measurements) -> None:
    """torch's takes 5 to 100 times ours there: it runs the taps outside the image as well."""
    live = np.random.default_rng(0).random((512, 3, 3)) < 0.2412
    shape = ConvShape(64, 512, size, size, 512, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    plan = make_plan(Problem(shape, FilterSkeleton(live), "float32", "cpu", False, 1), "wgrad")
    assert plan.chosen.kernel.startswith("cpu_"), plan.explain()


@pytest.mark.parametrize("cost", [cpu_cycles.XEON, cpu_cycles.AMX], ids=["vectors", "matrices"])
@pytest.mark.parametrize("mode", [cpu_tiling.PIXELS, cpu_tiling.BATCH], ids=["pixels", "images"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("which", ["fprop", "dgrad"])
def test_blocks_of_a_xeon_stay_in_its_cache(which, channels_last, mode, cost) -> None:
    """A whole map of 256 channels to 64 on 56x56, one block, took twice as long."""
    most = 8_000_000 if mode == cpu_tiling.BATCH and not channels_last else 1_000_000
    cut = 0
    for channels, size in itertools.product((32, 128, 512), (7, 28, 112)):
        shape = ConvShape(32, channels, size, size, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1)
        full = Problem(shape, FilterSkeleton.full(64, 3, 3), "bfloat16", "cpu", channels_last, 1)
        sides = cpu_tiling.Sides.of(shape, which, mode, cost.matrix)
        for _, images, rows, *_ in cpu_tiling.tilings(full, which, mode, cost):
            assert rows == 1 or sides.block_bytes(rows, images) <= most
            assert rows == size or sides.block_bytes(size, images) > most
            cut += rows < size
    assert cut


def test_a_team_may_share_a_map_that_leaves_the_cache() -> None:
    """Cut into rows, two cores write lines beside each other's, and planes are not written in place."""
    shape = ConvShape(1, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    full = Problem(shape, FilterSkeleton.full(64, 3, 3), "float32", "cpu", False, 2)
    found = {config[2:4] for config in cpu_tiling.tilings(full, "fprop", cpu_tiling.PIXELS, cpu_cycles.XEON)}
    assert found == {(28, 1), (56, 2)}


def test_groups_of_channels_last_cost_their_lines() -> None:
    """One channel a group along images took 15 to 23 times as long as torch's: 32 on 112x112, 144 on 56x56."""
    depthwise = ConvShape(32, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 64)
    seconds = {}
    for channels_last in (False, True):
        full = Problem(depthwise, FilterSkeleton.full(64, 3, 3), "float32", "cpu", channels_last, 1)
        tiling = (cpu_tiling.BATCH, 16, 28, 1, cpu_tiling.WINDOW)
        seconds[channels_last] = cpu_cost.predict(full, "fprop", tiling, cpu_cycles.XEON)
    assert seconds[True] > 5 * seconds[False]


@pytest.mark.parametrize(
    "tiling", [(16,), (cpu_tiling.PIXELS, 1, 32, 1, cpu_tiling.WINDOW)], ids=["taps", "pixels"]
)
def test_a_large_y_of_few_channels_comes_from_memory_in_channels_last(tiling) -> None:
    """Stems of 3 channels with 8 MB of y took 1.2 to 2 times dense's time there, ones with 2 MB less than dense."""

    def predicted(batch: int, channels_last: bool) -> float:
        shape = ConvShape(batch, 3, 32, 32, 16, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1)
        full = Problem(shape, FilterSkeleton.full(16, 3, 3), "float32", "cpu", channels_last, 1)
        return cpu_cost.predict(full, "fprop", tiling, cpu_cycles.XEON)

    assert predicted(128, True) - 4 * predicted(32, True) > 600e-6
    assert predicted(128, False) < 4 * predicted(32, False)


def _avx2(problem: Problem, mode: int) -> float:
    """The fastest prediction of fprop with AVX2, whatever this machine has."""
    cost = cpu_cycles.ZEN3
    tilings = cpu_tiling.tilings(problem, "fprop", mode, cost)
    return min(cpu_cost.predict(problem, "fprop", tiling, cost) for tiling in tilings)


def _some(shape: ConvShape, density: float, channels_last: bool) -> Problem:
    live = np.random.default_rng(0).random((shape.K, shape.R, shape.S)) < density
    return Problem(shape, FilterSkeleton(live), "float32", "cpu", channels_last, 1)


def test_with_avx2_an_im2col_beyond_the_cache_loses_to_pixels() -> None:
    """One of 29 MB took 2.4 times as long."""
    strided = _some(ConvShape(1, 32, 320, 320, 64, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1), 1), 0.5, False)
    assert 1.5 * _avx2(strided, cpu_tiling.PIXELS) < _avx2(strided, cpu_tiling.GATHER)


def test_with_avx2_a_stem_whose_y_leaves_l2_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the stripes of 3 channels to 32, 8 images of channels_last: 2.1 times dense's time."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    stem = ConvShape(8, 3, 224, 224, 32, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1), 1)
    for channels_last in (True, False):
        problem = _some(stem, 0.1, channels_last)
        ours = min(_avx2(problem, mode) for mode in (cpu_tiling.TAPS, cpu_tiling.PIXELS))
        assert (ours > dense.predict(problem, "fprop")) == channels_last


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("which", PASSES)
def test_a_named_kernel_is_the_only_candidate(kernel, which) -> None:
    made = make_plan(problem(which), which, kernel)
    assert {c.kernel for c in made.candidates} == {kernel}
    assert made.build() is not None


@pytest.mark.parametrize("kernel", NATIVE)
def test_a_named_kernel_that_cannot_run_says_why(kernel) -> None:
    x, weight = torch.zeros(1, 2, 4, 4, dtype=torch.float64), torch.zeros(9, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=rf"{kernel}.*float64"):
        stripe_conv2d(x, weight, torch.ones(1, 3, 3, dtype=torch.bool), kernel=kernel)


def test_an_unknown_kernel_is_a_value_error_with_its_neighbours() -> None:
    x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(9, 2)
    with pytest.raises(ValueError, match=r"did you mean.*reference"):
        stripe_conv2d(x, weight, torch.ones(1, 3, 3, dtype=torch.bool), kernel="referenc")
    with pytest.raises(ValueError, match=r"no kernel 'winograd'; there are .*dense, reference"):
        stripe_conv2d(x, weight, torch.ones(1, 3, 3, dtype=torch.bool), kernel="winograd")


def test_explain_shows_every_candidate_and_the_choice() -> None:
    text = make_plan(problem(), "fprop").explain()
    lines = text.splitlines()
    assert "fprop of [1, 19, 13, 11]" in lines[0]
    assert sum(line.startswith(" ->") for line in lines) == 1
    assert any("dense" in line for line in lines)


def test_a_refused_candidate_is_explained() -> None:
    text = make_plan(problem(dtype=torch.float64), "fprop").explain()
    assert "refused" in text
    assert "float64" in text


def test_a_measurement_overrules_the_prediction(no_measurements) -> None:
    before = make_plan(problem(), "fprop")
    slowest = max((c for c in before.candidates if c.refusal is None), key=lambda c: c.predicted)
    measured = [
        dataclasses.replace(c, measured=1e-6 if c == slowest else 1e-3)
        for c in before.candidates
        if c.refusal is None
    ]
    plan.record(problem(), "fprop", measured)
    after = make_plan(problem(), "fprop")
    assert (after.chosen.kernel, after.chosen.config) == (slowest.kernel, slowest.config)
    assert after.chosen.measured == 1e-6
    plan.forget()
    assert make_plan(problem(), "fprop") == before


def test_a_measurement_of_one_problem_leaves_others_alone(no_measurements) -> None:
    other = problem_of(CASE.batch(2), CASE.batch(2).operands(), "fprop")
    before = make_plan(other, "fprop")
    plan.record(problem(), "fprop", [Candidate("dense", measured=1e-9)])
    assert make_plan(other, "fprop") == before


def test_plans_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan(problem(), "fprop").which = "dgrad"  # type: ignore[misc]


def test_a_kernel_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'dense' is registered twice"):
        registry.register(registry.find("dense"))


def test_runners_are_kept_for_as_many_shapes_as_promised() -> None:
    op = StripeOp(*CASE.arguments, "reference")
    for n in range(1, 100):
        operands = CASE.batch(n % 90 + 1).operands()
        op.runner("fprop", tuple(operands.x.shape), operands.x)
    assert len(op._runners) <= 64


def test_every_cache_of_the_library_is_bounded() -> None:
    """Of those that a decorator makes; the others have tests of their own."""
    for path in Path(registry.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for made in getattr(node, "decorator_list", ()):
                text = ast.unparse(made)
                assert text not in ("cache", "functools.cache"), f"{path.name}: {node.name}"
                bounded = re.fullmatch(r"(functools\.)?lru_cache\(maxsize=(\d+|_[A-Z_]+)\)", text)
                assert "lru_cache" not in text or bounded, f"{path.name}: {node.name}"


def test_measured_choices_are_bounded_and_the_latest_stay(no_measurements, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_TUNED_KEPT", 8)
    problems = [dataclasses.replace(problem(), threads=n) for n in range(1, 21)]
    for p in problems:
        plan.record(p, "fprop", [Candidate("dense", measured=1.0)])
    plan.record(problems[15], "fprop", [Candidate("dense", measured=2.0)])  # again: now the latest
    kept = [key[0].threads for key in plan.records()]
    assert kept == [13, 14, 15, 17, 18, 19, 20, 16]
    assert plan.recorded(problems[15], "fprop")[0].measured == 2.0


def test_the_number_of_threads_is_part_of_the_problem() -> None:
    torch.set_num_threads(1)
    one = problem()
    torch.set_num_threads(2)
    assert (one.threads, problem().threads) == (1, 2)


def on_a_gpu(**changes):
    """The same problem on a GPU: predictions need none."""
    return dataclasses.replace(problem(), device="cuda", **changes)


@pytest.mark.parametrize("which", PASSES)
def test_auto_on_a_gpu_is_dense_until_something_was_measured(which, no_measurements) -> None:
    made = make_plan(on_a_gpu(), which)
    assert made.chosen.kernel == "dense"
    assert {"dense", "stripe_gemm"} <= {c.kernel for c in made.candidates if c.refusal is None}
    assert "tune() measures" in made.explain()
    assert make_plan(on_a_gpu(), which, "stripe_gemm").chosen.kernel == "stripe_gemm"


@pytest.mark.parametrize(("gain", "winner"), [(1.01, "dense"), (1.05, "stripe_gemm"), (0.9, "dense")])
def test_a_kernel_has_to_beat_dense_on_a_gpu_by_more_than_luck(gain, winner, no_measurements) -> None:
    config = next(c.config for c in make_plan(on_a_gpu(), "fprop", "stripe_gemm").candidates)
    measured = [Candidate("dense", measured=1e-4), Candidate("stripe_gemm", config, measured=1e-4 / gain)]
    plan.record(on_a_gpu(), "fprop", measured)
    assert make_plan(on_a_gpu(), "fprop").chosen.kernel == winner
    assert "tune() measures" not in make_plan(on_a_gpu(), "fprop").explain()


def test_tf32_is_another_problem(no_measurements) -> None:
    plan.record(on_a_gpu(tf32=(True, True)), "fprop", [Candidate("stripe_gemm", (1, 0), measured=1e-9)])
    assert make_plan(on_a_gpu(), "fprop").chosen.measured is None
    slow, fast = (make_plan(on_a_gpu(tf32=(t, t)), "fprop", "dense").chosen.predicted for t in (False, True))
    assert slow >= fast
