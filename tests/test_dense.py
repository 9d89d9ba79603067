"""dense keeps filters of half precision in oneDNN's own form between calls; a filter for one call stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stripe_kernels import StripeConv2d, registry
from stripe_kernels.snapshots import packed_weight
from stripe_kernels.testing import CASES, LAYOUTS, Case, live_stripes
from tests.passes import budgets_of, operands_of, problem_of

HALVES = [
    dtype
    for dtype, supported in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    )
    if supported()
]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def dense_layer(dtype: torch.dtype) -> StripeConv2d:
    skeleton = live_stripes("random", (8, 3, 2), 0.5, 1)
    made = StripeConv2d(6, 8, (3, 2), padding=(1, 2), skeleton=skeleton, dtype=dtype).eval()
    made.kernel = "dense"
    return made


def kept_by(layer: StripeConv2d, x: Tensor) -> Tensor:
    return packed_weight(layer._op.runner("fprop", tuple(x.shape), x), layer.weight)


@halves
@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_a_filter_for_one_call(case: Case, dtype: torch.dtype) -> None:
    """What training packs; what inference keeps is what test_fprop.py has."""
    for layout in LAYOUTS:
        o = operands_of(case, dtype, layout)
        problem, kernel = problem_of(case, o, "fprop"), registry.find("dense")
        if kernel.refuse(problem, "fprop"):
            continue
        runner = kernel.build(problem, "fprop", ())
        packed = runner.pack(o.weight)
        assert not packed.is_mkldnn
        found = budgets_of(case, dtype, layout).y.failure(runner(o.x, packed, None, None, None, "none"))
        assert found is None, f"{case}, {dtype}, {layout}: y {found}"


@halves
def test_is_kept_in_inference_alone(dtype: torch.dtype) -> None:
    layer, x = dense_layer(dtype), torch.randn(2, 6, 7, 5, dtype=dtype)
    with torch.no_grad():
        assert kept_by(layer, x).is_mkldnn
        for _ in range(4):  # the short way from the third call on
            torch.testing.assert_close(layer(x), layer.to_conv2d()(x))
        layer.weight.mul_(-2)
        torch.testing.assert_close(layer(x), layer.to_conv2d()(x))


@halves
def test_training_packs_no_filter_to_keep(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = dense_layer(dtype).train(), torch.randn(2, 6, 7, 5, dtype=dtype)
    runner = layer._op.runner("fprop", tuple(x.shape), x)

    def fail(weight: Tensor) -> Tensor:
        raise AssertionError("made for one call")

    monkeypatch.setattr(runner, "pack_to_keep", fail)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer.to_conv2d()(x))


@halves
@pytest.mark.parametrize(
    "size", [(1, 6, 1, 1), (1, 6, 1, 5), (3, 6, 5, 1), (0, 6, 7, 5), (2, 6, 7, 5)], ids=str
)
def test_strides_are_torchs(size: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = dense_layer(dtype)
    conv: nn.Conv2d = layer.to_conv2d()
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size, dtype=dtype).contiguous(memory_format=memory_format)
            assert layer(x).stride() == conv(x).stride()


def test_float32_and_depthwise_filters_stay_torchs() -> None:
    x = torch.randn(2, 6, 7, 5)
    assert not kept_by(dense_layer(torch.float32), x).is_mkldnn
    for dtype in HALVES:
        skeleton = live_stripes("random", (6, 3, 2), 0.5, 1)
        depthwise = StripeConv2d(6, 6, (3, 2), groups=6, skeleton=skeleton, dtype=dtype)
        depthwise.kernel = "dense"
        assert not kept_by(depthwise, x.to(dtype)).is_mkldnn
