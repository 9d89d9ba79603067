"""Offsets beyond 2^31 in the CUDA kernels: memory is reserved and, but for a few pages, never touched.

Below where a tensor begins lie as many values again: an offset that is cut off to 32 bits reads zeros there, or leaves
the NaN of an output in its place, and a test fails where otherwise the process would end.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from stripe_kernels import list_kernels, registry
from stripe_kernels.backends import cuda_stripe_gemm
from stripe_kernels.backends.cuda_mma import dense_channels_last
from stripe_kernels.backends.cuda_tables import Tables
from stripe_kernels.registry import Pass
from stripe_kernels.testing import Case, Operands, case
from tests.cuda import emulated
from tests.cuda.problems import budgets_of, operands_of, problem_of
from tests.cuda.test_errors import RUNNERS, dtype_of
from tests.cuda.test_stripe_gemm import runner_of as gemm_runner

BELOW = 2**31  # values in front of a tensor
FAR = 2**30 + 24  # values from image to image: twice that needs more than 32 bits, no stride does
PITCH = 2**26 + 8  # from one of many rows to the next
CASE = case("far images", N=3, C=8, H=8, W=9, K=16, padding=(1, 0), density=0.5)
STRIDED = case("far images, strided", N=3, C=8, H=9, W=11, K=16, stride=(2, 2), density=0.5)
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Linux; Python names it from 3.13 on
Strides = tuple[int, ...]


def reserved(values: int, dtype: torch.dtype) -> Tensor:
    """[BELOW + values] zeros."""
    bytes_ = (BELOW + values) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except (OSError, ValueError) as error:
        pytest.skip(f"{bytes_ >> 30} GiB of addresses cannot be reserved: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def apart(t: Tensor, strides: Strides) -> Tensor:
    """The same values, so far from each other."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    return reserved(last + 1, t.dtype).as_strided(t.shape, strides, BELOW).copy_(t)


def far_axis(t: Tensor, axis: int = 0) -> Tensor:
    strides = list(t.stride())
    strides[axis] = FAR
    return apart(t, tuple(strides))


def runner_for(native: ModuleType, name: str, c: Case, layout: str, splits: int = 1) -> Any:
    kind, config = RUNNERS[name]
    config = config if "sm90" in name and name != "wgrad_sm90" else (*config[:-1], splits)
    return kind(native, problem_of(c, layout, dtype_of(name)), config)


def call_far(runner: Any, which: Pass, o: Operands, far: Callable[[Tensor], Tensor], dense: bool) -> Tensor:
    """The result of a launch whose tensors are far; `dense`: but for the input, which the kernel wants in one piece."""
    if which == "wgrad":
        x, dy, dw = (
            far(o.x),
            far(o.dy),
            torch.full((runner.stripes, o.x.shape[1]), torch.nan, dtype=o.x.dtype),
        )
        return runner.launch(x, dy, dw, dy.stride())
    inp, out = (o.x, o.dy) if which == "fprop" else (o.dy, o.x)
    return runner.launch(
        inp if dense else far(inp), runner.pack(o.weight), far(torch.full_like(out, torch.nan))
    )


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [name for name in RUNNERS if name.endswith("ffma")])
def test_any_axis_of_strict_float32(native: ModuleType, name: str, axis: int) -> None:
    which: Any = name.split("_")[0]
    for layout in ("contiguous", "channels_last"):
        o = operands_of(CASE, torch.float32, layout)
        result = call_far(
            runner_for(native, name, CASE, layout), which, o, lambda t: far_axis(t, axis), False
        )
        budgets_of(CASE, torch.float32, layout).of(which).check(result, f"{layout}, axis {axis}:")


@pytest.mark.parametrize("c", [CASE, STRIDED], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["fprop_mma", "dgrad_mma", "wgrad_mma"])
def test_images_of_the_tensor_core_kernels(native: ModuleType, name: str, c: Case) -> None:
    which: Any = name.split("_")[0]
    o = operands_of(c, torch.bfloat16, "channels_last")
    result = call_far(runner_for(native, name, c, "channels_last"), which, o, far_axis, False)
    budgets_of(c, torch.bfloat16, "channels_last").of(which).check(result, name)


@pytest.mark.parametrize("name", ["fprop_sm90", "fprop_taps_sm90", "fprop_whole_sm90", "dgrad_sm90"])
def test_images_of_the_kernels_of_sm_90(native: ModuleType, name: str) -> None:
    """Tap by tap and in dgrad what is read is one matrix of pixels, which the copy engine addresses."""
    which: Any = name.split("_")[0]
    o = operands_of(CASE, torch.bfloat16, "channels_last")
    runner = runner_for(native, name, CASE, "channels_last")
    result = call_far(runner, which, o, far_axis, name in ("fprop_taps_sm90", "dgrad_sm90"))
    budgets_of(CASE, torch.bfloat16, "channels_last").of(which).check(result, name)


@pytest.mark.parametrize("name", [name for name in RUNNERS if name.startswith("fprop")])
def test_a_residual_is_read_where_the_output_lies(native: ModuleType, name: str) -> None:
    o = operands_of(CASE, dtype_of(name), "channels_last")
    runner = runner_for(native, name, CASE, "channels_last")
    residual, y = far_axis(o.residual), far_axis(torch.full_like(o.dy, torch.nan))
    packed = runner.pack(torch.zeros_like(o.weight))
    x = o.x if name == "fprop_taps_sm90" else far_axis(o.x)
    runner.launch(x, packed, y, None, (None, None, residual, "none"), (CASE.shape.K, 1))
    assert torch.equal(y, o.residual)


class Seen:
    """A kernel that notes what it was called with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arguments = kernel, ()

    def run(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.kernel.run(*arguments)


@pytest.mark.parametrize("name", [name for name in RUNNERS if name.split("_")[1] != "ffma"])
def test_who_wants_dense_channels_last_gets_a_copy(native: ModuleType, name: str) -> None:
    which = name.split("_")[0]
    near = operands_of(CASE, torch.bfloat16, "channels_last")
    o = near._replace(x=far_axis(near.x), dy=far_axis(near.dy))
    assert dense_channels_last(o.x).stride() == near.x.stride()
    runner = runner_for(native, name, CASE, "channels_last")
    runner.kernel = seen = Seen(runner.kernel)
    if which == "wgrad":
        result = runner(o.dy, o.x)
    else:
        result = runner(o.dy, runner.pack(o.weight)) if which == "dgrad" else runner(
            o.x, runner.pack(o.weight), None, None, None, "none"
        )  # fmt: skip
    budgets_of(CASE, torch.bfloat16, "channels_last").of(which).check(result, name)
    assert seen.arguments[3] == (near.dy if which == "dgrad" else near.x).stride()


def test_who_takes_any_strides_makes_no_copy(native: ModuleType) -> None:
    x = far_axis(operands_of(CASE, torch.float32, "contiguous").x)
    runner = runner_for(native, "fprop_ffma", CASE, "contiguous")
    runner.kernel = seen = Seen(runner.kernel)
    o = operands_of(CASE, torch.float32, "contiguous")
    y = runner(x, runner.pack(o.weight), None, None, None, "none")
    budgets_of(CASE, torch.float32, "contiguous").y.check(y)
    assert seen.arguments[2:4] == (x.data_ptr(), x.stride())


@pytest.mark.parametrize(
    "name", [name for name in RUNNERS if not name.endswith("sm90") or name == "wgrad_sm90"]
)
def test_shares_of_a_sum(native: ModuleType, name: str) -> None:
    """Three shares FAR values apart, as of an output of so many."""
    which: Any = name.split("_")[0]
    dtype, o = dtype_of(name), operands_of(CASE, dtype_of(name), "channels_last")
    runner = runner_for(native, name, CASE, "channels_last", splits=3)
    runner.kernel = seen = Seen(runner.kernel)
    if which == "wgrad":
        out = runner(o.dy, o.x)
    else:
        out = runner.launch(*((o.x, runner.pack(o.weight), torch.empty_like(o.dy)) if which == "fprop" else (
            o.dy, runner.pack(o.weight), torch.empty_like(o.x)
        )))  # fmt: skip
    shares = reserved(2 * FAR + out.numel(), torch.float32)[BELOW:]
    # What seen.arguments point to lives here: `out`, and `packed`, which is small and made again.
    packed = None if which == "wgrad" else runner.pack(o.weight)
    weights = seen.arguments[4] if packed is None else packed.data_ptr()
    seen.kernel.run(
        *seen.arguments[:4], weights, *seen.arguments[5:7], shares.data_ptr(), FAR, *seen.arguments[9:]
    )
    total = sum(shares[s * FAR : s * FAR + out.numel()] for s in range(3))
    result = total.as_strided(out.shape, out.stride()).to(dtype)
    budgets_of(CASE, dtype, "channels_last").of(which).check(result, name)


@pytest.mark.parametrize("name", ["fprop_ffma", "dgrad_ffma", "fprop_mma", "dgrad_mma"])
def test_weights_far_from_where_they_begin(
    native: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last of many steps reads them."""
    which: Any = name.split("_")[0]
    o = operands_of(CASE, dtype_of(name), "channels_last")
    plain = runner_for(native, name, CASE, "channels_last").pack(o.weight)
    unit = plain[0].numel() if name != "dgrad_mma" else plain[0, 0].numel()
    further = 2**31 // unit + 1  # units
    add_step = Tables.add_step

    def add_further(
        self: Tables, origin: Any, channel: int, fresh: bool, entries: Any, weights: int, units: int
    ) -> None:
        add_step(self, origin, channel, fresh, entries, weights + further, units)

    monkeypatch.setattr(Tables, "add_step", add_further)
    runner = runner_for(native, name, CASE, "channels_last")
    memory = reserved(further * unit + plain.numel(), plain.dtype)[BELOW:]
    memory[further * unit :].copy_(runner.pack(o.weight).flatten())
    inp, out = (o.x, o.dy) if which == "fprop" else (o.dy, o.x)
    result = runner.launch(inp, memory, torch.full_like(out, torch.nan))
    budgets_of(CASE, plain.dtype, "channels_last").of(which).check(result, name)


@pytest.mark.parametrize("c", [CASE, STRIDED], ids=lambda c: c.name)
def test_the_sum_of_stripes(native: ModuleType, c: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """z of rows PITCH apart, y and a residual of images FAR apart."""
    o = operands_of(c, torch.bfloat16, "channels_last")
    runner = gemm_runner(native, c, "fprop", torch.bfloat16)
    layout, gather = runner.layout, runner.gather
    assert len(layout.row) * PITCH > 2**31
    monkeypatch.setattr(layout, "pitch", lambda images: PITCH)
    z, packed = reserved(len(layout.row) * PITCH, torch.bfloat16)[BELOW:], runner.pack(o.weight)
    for i, phase in enumerate(layout.phases):
        weight = packed[layout.column_ranges[i]]
        layout.matrix(z, c.shape.N, i).copy_(weight @ runner.pixel_major(o.x, phase).t())
    y = far_axis(torch.full_like(o.dy, torch.nan))
    gather.sum(z, y, None, None, None, "none")
    budgets_of(c, torch.bfloat16, "channels_last").y.check(y)
    z = reserved(len(layout.row) * PITCH, torch.bfloat16)[BELOW:]
    gather.sum(z, y, None, None, far_axis(o.residual), "none")
    assert torch.equal(y, o.residual)


class FarPixels:
    """The extension, for a spread of dy whose pixels lie PITCH values apart."""

    def __init__(self, native: ModuleType, dy: Tensor) -> None:
        self.native, self.pixels = native, dy.permute(0, 2, 3, 1).flatten(0, 2)

    def stripe_spread(
        self, stream: int, dtype: int, dy: int, p: int, tables: int, pitch: int, pixel_bytes: int, *rest: Any
    ) -> None:
        size = self.pixels.element_size()
        assert pixel_bytes == self.pixels.stride(0) * size
        far = apart(self.pixels, (PITCH, 1))
        self.native.stripe_spread(stream, dtype, far.data_ptr(), p, tables, pitch, PITCH * size, *rest)


@pytest.mark.parametrize("c", [CASE, STRIDED], ids=lambda c: c.name)
@pytest.mark.parametrize("far", ["p", "dy"])
def test_the_spread_of_stripes(
    native: ModuleType, c: Case, far: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    dy = operands_of(c, dtype, "channels_last").dy
    runner = gemm_runner(native, c, "wgrad", dtype)
    layout, gather = runner.layout, runner.gather
    for i in range(len(layout.phases)):
        buffer = torch.full((layout.values(c.shape.N),), torch.nan, dtype=dtype)
        gather.spread(dy, i, buffer)
        expected = layout.matrix(buffer, c.shape.N, i).clone()
        assert not expected.isnan().any()
        with monkeypatch.context() as m:
            if far == "dy":
                result = layout.matrix(buffer.fill_(torch.nan), c.shape.N, i)
                m.setattr(gather, "native", FarPixels(native, dy))
            else:
                result = apart(torch.full_like(expected, torch.nan), (PITCH, 1))
                m.setattr(layout, "matrix", lambda *_, result=result: result)
            gather.spread(dy, i, buffer)
        assert torch.equal(result, expected)


def test_the_last_values_of_a_sum_of_shares(native: ModuleType) -> None:
    """More than 2^31 values, of which one block of the grid adds its own."""
    blocks, threads = 65535, 256
    first = (blocks - 1) * threads + 128 * blocks * threads  # what the block adds last
    count = first + threads
    assert count > 2**31
    shares, out = reserved(2 * count, torch.float32)[BELOW:], reserved(count, torch.bfloat16)[BELOW:]
    mine, shift = torch.randn(2, threads), torch.randn(5)
    shares[first:count], shares[count + first :] = mine
    with emulated.last_block(native):
        native.reduce(0, shares.data_ptr(), 2, out.data_ptr(), 1, count, 5, 1, 0, shift.data_ptr(), 0, 0)
    expected = mine.sum(0) + shift[torch.arange(first, count) % 5]
    assert torch.equal(out[first:], expected.bfloat16())


def test_the_last_rows_of_a_copy(native: ModuleType) -> None:
    blocks, threads, width = 65535, 256, 128  # width: values of a row, 16 pieces
    first = (blocks - 1) * threads + 128 * blocks * threads  # piece
    count = (first + threads) // 16
    row = reserved(count, torch.int32)[BELOW:]
    row[-2:] = torch.tensor([count + 1, -1])
    values, out = (
        reserved((count + 2) * width, torch.bfloat16)[BELOW:],
        reserved(count * width, torch.bfloat16),
    )
    out = out[BELOW:]
    values[-width:] = mine = torch.randn(width).bfloat16()
    out[-2 * width :] = torch.nan
    with emulated.last_block(native):
        native.copy_rows(0, values.data_ptr(), row.data_ptr(), out.data_ptr(), count, width * 2)
    assert torch.equal(out[-2 * width : -width], mine)
    assert not out[-width:].any()


def test_more_pixels_than_32_bits_number_are_refused() -> None:
    p = problem_of(CASE, "channels_last", torch.bfloat16)
    huge = replace(p, shape=replace(p.shape, N=2**31 // 72 + 1), device="cuda")
    for which in registry.PASSES:
        assert "more pixels than 32 bits number" in (cuda_stripe_gemm.refuse(huge, which) or "")
        for name in set(list_kernels()) & {"cuda_ffma", "cuda_mma", "cuda_mma_tf32", "cuda_wgmma"}:
            of_kernel = replace(huge, dtype="bfloat16" if name in ("cuda_mma", "cuda_wgmma") else "float32")
            assert "more pixels than 32 bits number" in (registry.find(name).refuse(of_kernel, which) or "")
