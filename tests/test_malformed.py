"""Wrong input: a typed error with the sizes, or what torch does with it; no crash and no silent answer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stripe_kernels import StripeConv2d, ops, stripe_conv2d
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, case
from tests.passes import KERNELS, NATIVE

SKELETON = torch.zeros(4, 3, 3, dtype=torch.bool)
SKELETON[0, 1, 1] = SKELETON[2, 0, 1] = SKELETON[2, 1, 1] = True
X, WEIGHT, BIAS = torch.randn(2, 5, 6, 7), torch.randn(3, 5), torch.randn(4)
TYPED = (ValueError, TypeError, RuntimeError)
kernels = pytest.mark.parametrize("kernel", ["auto", *KERNELS])


def call(x=X, weight=WEIGHT, skeleton=SKELETON, bias=BIAS, **settings):
    return stripe_conv2d(x, weight, skeleton, bias, **settings)


WRONG_TENSORS = {
    "x of rank 2": ({"x": X[0, 0]}, r"\[6, 7\]"),
    "x of rank 5": ({"x": X[None]}, r"\[1, 2, 5, 6, 7\]"),
    "x with too few channels": ({"x": X[:, :4]}, r"4 channels.*\[3, 5\].*\[2, 4, 6, 7\]"),
    "x with too many channels": ({"x": X.repeat(1, 2, 1, 1)}, "10 channels"),
    "x without channels": ({"x": X[:, :0]}, "0 channels"),
    "x unbatched with other channels": ({"x": X[0, :3]}, "3 channels"),
    "x without height": ({"x": X[:, :, :0]}, r"\[2, 5, 0, 7\]"),
    "x without width": ({"x": X[..., :0]}, r"\[2, 5, 6, 0\]"),
    "x smaller than the filter": ({"x": X[:, :, :2]}, r"height 2.*2 < 3"),
    "x of integers": ({"x": X.int(), "weight": WEIGHT.int(), "bias": None}, "int32"),
    "x complex": ({"x": X.cfloat(), "weight": WEIGHT.cfloat(), "bias": None}, "complex64"),
    "x of bool": ({"x": X > 0, "weight": WEIGHT > 0, "bias": None}, "bool"),
    "x of another dtype": ({"x": X.double()}, "float64.*float32"),
    "weight of another dtype": ({"weight": WEIGHT.bfloat16()}, "float32.*bfloat16"),
    "bias of another dtype": ({"bias": BIAS.half()}, "float32.*float16"),
    "weight with a stripe too few": ({"weight": WEIGHT[:2]}, r"A=3.*\[4, 3, 3\].*\[2, 5\]"),
    "weight with a stripe too many": ({"weight": WEIGHT.repeat(2, 1)}, r"A=3.*\[6, 5\]"),
    "weight with other channels": ({"weight": WEIGHT[:, :4]}, r"5 channels.*\[3, 4\]"),
    "weight of rank 1": ({"weight": WEIGHT[0]}, r"\[5\]"),
    "weight of rank 4": ({"weight": torch.randn(4, 5, 3, 3)}, r"\[4, 5, 3, 3\]"),
    "bias too short": ({"bias": BIAS[:3]}, r"K=4.*\[3\]"),
    "bias of rank 2": ({"bias": BIAS[None]}, r"K=4.*\[1, 4\]"),
    "bias scalar": ({"bias": BIAS[0]}, r"K=4"),
    "x elsewhere": ({"x": X.to("meta")}, "meta.*cpu"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, "cpu.*meta"),
    "bias elsewhere": ({"bias": BIAS.to("meta")}, "cpu.*meta"),
    "skeleton of another filter size": ({"skeleton": torch.ones(1, 3, 1, dtype=torch.bool)}, r"bias.*K=1"),
    "skeleton of rank 2": ({"skeleton": SKELETON[0]}, r"\[3, 3\]"),
    "skeleton of rank 4": ({"skeleton": SKELETON[None]}, r"\[1, 4, 3, 3\]"),
    "skeleton of bytes": ({"skeleton": SKELETON.byte()}, r"uint8.*\[4, 3, 3\]"),
    "skeleton of floats": ({"skeleton": SKELETON.float()}, "float32"),
    "skeleton without filters": ({"skeleton": SKELETON[:0]}, r"\[0, 3, 3\]"),
    "skeleton a list": ({"skeleton": SKELETON.tolist()}, "list"),
    "skeleton None": ({"skeleton": None}, "NoneType"),
}


@kernels
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fault", WRONG_TENSORS)
def test_wrong_tensors(fault: str, kernel: str, grad: bool) -> None:
    wrong, message = WRONG_TENSORS[fault]
    with torch.set_grad_enabled(grad):
        call(kernel=kernel)  # the runner of a right call must not vouch for a wrong one
        with pytest.raises(TYPED, match=message):
            call(**wrong, kernel=kernel)
        torch.testing.assert_close(call(kernel=kernel), call())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_wrong_tensors_of_a_gradient(requires_grad: bool) -> None:
    op = StripeOp.of(*CASES["lopsided"].arguments, "auto")
    x, weight, dy, *_ = CASES["lopsided"].operands()
    x, weight = x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
    with pytest.raises(TYPED, match=r"\[3, 11, 4, 6\].*\[2, 11, 4, 6\]"):
        ops.wgrad(op, dy[:-1], x)
    for wrong in (dy[:, :-1], dy[..., :-1], dy[0], dy.double(), dy.to("meta"), dy[:, :, :0]):
        with pytest.raises(TYPED, match=r"\[|float|meta"):
            ops.dgrad(op, wrong, weight, x.shape[2:])
        with pytest.raises(TYPED, match=r"\[|float|meta"):
            ops.wgrad(op, wrong, x)
    for wrong in (weight[:-1], weight.double(), weight.to("meta"), weight[0]):
        with pytest.raises(TYPED, match=r"\[|float|meta"):
            ops.dgrad(op, dy, wrong, x.shape[2:])
    for wrong in (x[..., :-3], x[:-1], x[0], x.double(), x.to("meta")):
        with pytest.raises(TYPED, match=r"\[|float|meta"):
            ops.wgrad(op, dy, wrong)
    for size in ([9], [9, 7, 1], [100, 7], [-9, 7], [0, 7]):
        with pytest.raises(TYPED):
            ops.dgrad(op, dy, weight, size)


WRONG_SETTINGS = {
    "negative padding": ({"padding": -1}, "padding.*-1"),
    "padding of three": ({"padding": (1, 1, 1)}, "padding"),
    "padding by another name": ({"padding": "full"}, "'full'"),
    "same padding with a stride": ({"padding": "same", "stride": 2}, r"stride \(2, 2\)"),
    "zero stride": ({"stride": 0}, "stride.*0"),
    "negative stride": ({"stride": (1, -1)}, "stride.*-1"),
    "fractional stride": ({"stride": 1.5}, "stride.*1.5"),
    "zero dilation": ({"dilation": (0, 1)}, "dilation.*0"),
    "zero groups": ({"groups": 0}, "groups=0"),
    "negative groups": ({"groups": -2}, "groups=-2"),
    "groups as text": ({"groups": "2"}, "groups must be an int, got '2'"),
    "padding beyond all memory": ({"padding": 2**20}, "allocate"),
    "padding beyond all integers": ({"padding": 2**62}, r"more values than .* padding \(4611686018427387904"),
    "groups that do not divide K": ({"groups": 3}, "groups=3.*K=4"),
    "groups that do not divide C": ({"groups": 2}, "5 channels.*groups=2.*10"),
    "dilation beyond the map": ({"dilation": 4}, "6 < 9"),
    "an unknown kernel": ({"kernel": "cpu_magic"}, "'cpu_magic'"),
}


@pytest.mark.parametrize("fault", WRONG_SETTINGS)
def test_wrong_settings(fault: str) -> None:
    wrong, message = WRONG_SETTINGS[fault]
    with pytest.raises(TYPED, match=message):
        call(**wrong)


WRONG_MODULES = {
    "skeleton of another filter": ({"skeleton": SKELETON[:, :2]}, r"\[4, 2, 3\].*\(3, 3\)"),
    "skeleton of other filters": ({"skeleton": SKELETON[:3]}, r"\[3, 3, 3\].*K=4"),
    "negative padding": ({"padding": (0, -1)}, "padding"),
    "zero stride": ({"stride": 0}, "stride"),
    "zero kernel size": ({"kernel_size": 0}, "kernel_size"),
    "no channels": ({"in_channels": 0}, "in_channels=0.*all positive"),
    "channels that are no number": ({"in_channels": 5.0}, r"in_channels must be an int, got 5\.0"),
    "groups that are a bool": ({"groups": True}, "groups must be an int, got True"),
    "groups": ({"groups": 2}, "groups=2.*in_channels=5"),
    "padding mode": ({"padding_mode": "mirror"}, "'mirror'"),
    "same padding with a stride": ({"padding": "same", "stride": 2}, "strided"),
}


@pytest.mark.parametrize("fault", WRONG_MODULES)
def test_wrong_modules_fail_at_construction(fault: str) -> None:
    wrong, message = WRONG_MODULES[fault]
    right = {"in_channels": 5, "out_channels": 4, "kernel_size": 3, "skeleton": SKELETON}
    StripeConv2d(**right)
    with pytest.raises((ValueError, TypeError), match=message):
        StripeConv2d(**(right | wrong))


@pytest.mark.parametrize(
    "module", [nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.LazyConv2d(2, 1), nn.Linear(2, 2), None]
)
def test_from_conv2d_takes_conv2d_only(module) -> None:
    with pytest.raises(TypeError, match="Conv2d"):
        StripeConv2d.from_conv2d(module)


def test_from_conv2d_takes_no_subclass_that_computes_something_else() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Named(nn.Conv2d):
        pass

    assert StripeConv2d.from_conv2d(Named(2, 2, 1)).density == 1
    with pytest.raises(TypeError, match="computes what it does, got Standardised"):
        StripeConv2d.from_conv2d(Standardised(2, 2, 1))


@kernels
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(kernel: str) -> None:
    x, weight, bias = (
        X[:0].clone().requires_grad_(),
        WEIGHT.clone().requires_grad_(),
        BIAS.clone().requires_grad_(),
    )
    y = call(x, weight, SKELETON, bias, kernel=kernel)
    assert y.shape == (0, 4, 4, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    assert weight.grad.count_nonzero() == 0
    assert bias.grad.count_nonzero() == 0


@kernels
def test_nan_in_a_weight_is_torchs_answer(kernel: str) -> None:
    weight = WEIGHT.clone()
    weight[1, 2] = torch.nan  # filter 2, tap (0, 1)
    dense = torch.zeros(4, 3, 3, 5)
    dense[SKELETON] = weight
    expected = F.conv2d(X, dense.permute(0, 3, 1, 2), BIAS, padding=1)
    actual = call(weight=weight, padding=1, kernel=kernel)
    assert torch.equal(actual[:, [0, 1, 3]].isnan(), expected[:, [0, 1, 3]].isnan())
    # torch multiplies the zeros of the padding by NaN; an exact kernel skips taps outside the image.
    inside = actual[:, 2, 1:]
    assert inside.isnan().all()


@kernels
def test_no_live_stripe_leaves_the_bias(kernel: str) -> None:
    y = call(weight=torch.empty(0, 5), skeleton=torch.zeros_like(SKELETON), kernel=kernel)
    assert torch.equal(y, BIAS[:, None, None].expand(2, 4, 4, 5))


def test_a_sparse_or_quantized_input_is_a_typed_error() -> None:
    for x in (X.to_sparse(), X.to_mkldnn()):
        with pytest.raises((*TYPED, NotImplementedError)):
            call(x=x)


def test_negative_strides_are_refused() -> None:
    """No tensor has them: torch refuses to make one, whichever way memory that runs backwards comes."""
    backwards = X.numpy()[:, :, ::-1]
    assert backwards.strides[2] < 0
    for x in (lambda: backwards, lambda: torch.from_numpy(backwards)):
        with pytest.raises(TYPED):
            call(x=x())
    with pytest.raises(RuntimeError, match="Negative strides"):
        call(x=X.as_strided(X.shape, (210, 42, -7, 1), 35))
    torch.testing.assert_close(call(x=torch.from_numpy(backwards.copy())), call(x=X.flip(2)))


def test_what_is_no_tensor_is_a_typed_error() -> None:
    for name, value in itertools.product(("x", "weight"), (None, 3, [[1.0]], X.numpy())):
        with pytest.raises((*TYPED, AttributeError)):
            call(**{name: value})
    with pytest.raises(TypeError, match=r"x must be a tensor .* got ndarray"):
        call(x=X.numpy())


@pytest.mark.parametrize("kernel", NATIVE)
def test_an_extent_beyond_the_index_is_refused(kernel: str) -> None:
    x = torch.empty(1, 1, 1, 1).expand(2**27, 1, 3, 3)
    with pytest.raises(RuntimeError, match=r"2\^30"):
        stripe_conv2d(x, torch.ones(1, 1), torch.ones(1, 1, 1, dtype=torch.bool), padding=3, kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_torchs_own_convolution_crashes_ours_answers(dtype: torch.dtype) -> None:
    """No column of the filter meets the image: torch 2.13 ends the process in channels_last, of float16 in any layout
    where the processor has AVX512-FP16."""
    lost = case("", N=3, C=24, H=7, W=1, K=1, R=4, S=2, stride=(2, 3), padding=(0, 4), dilation=(2, 2))
    o = lost.operands(dtype, "channels_last")
    x, weight = o.x.requires_grad_(), o.weight.requires_grad_()
    live = torch.from_numpy(lost.skeleton.live.copy())
    settings = {"stride": (2, 3), "padding": (0, 4), "dilation": (2, 2)}
    y = stripe_conv2d(x, weight, live, **settings)
    dx, dw = torch.autograd.grad(y, (x, weight), o.dy)
    assert [t.count_nonzero() for t in (y, dx, dw)] == [0, 0, 0]
    assert [t.shape for t in (y, dx, dw)] == [o.dy.shape, x.shape, weight.shape]
    with pytest.raises(RuntimeError, match="off the image"):
        stripe_conv2d(x, weight, live, kernel="dense", **settings)


def test_the_operators_check_what_reaches_them_directly() -> None:
    """torch.ops is public: text and numbers that no front has seen."""
    x, weight, *_ = CASES["lopsided"].operands()
    text, stride, padding, dilation, groups = CASES["lopsided"].arguments
    wrong = {
        "skeleton": ("11x3x2:!!!!", stride, padding, dilation, groups, "auto"),
        "stride": (text, (0, 1), padding, dilation, groups, "auto"),
        "padding": (text, stride, (-1, 0, 0, 0), dilation, groups, "auto"),
        "dilation": (text, stride, padding, (0, 1), groups, "auto"),
        "groups": (text, stride, padding, dilation, 0, "auto"),
        "kernel": (text, stride, padding, dilation, groups, "none such"),
    }
    for name, arguments in wrong.items():
        with pytest.raises(TYPED, match=name):
            torch.ops.stripe_kernels.fprop(x, weight, None, None, None, "none", *arguments)


SHAPE, TAP_PTR, FILTER, ROW = (
    [1, 2, 4, 4, 4, 1, 2, 4, 3, 1, 1, 0, 0, 1, 1, 1],
    [0, 2, 3],
    [0, 2, 1],
    [2, 0, 1],
)
CORRUPT = {
    "a row beyond the weight": {"row": [3, 0, 1]},
    "a negative row": {"row": [-1, 0, 1]},
    "a row twice": {"row": [0, 0, 1]},
    "a filter beyond its group": {"filter": [0, 4, 1]},
    "a negative filter": {"filter": [-1, 2, 1]},
    "filters that fall": {"filter": [2, 0, 1]},
    "a tap's end beyond the stripes": {"tap_ptr": [0, 4, 3]},
    "a tap's end before its begin": {"tap_ptr": [0, -1, 3]},
    "a tap too few": {"tap_ptr": [0, 3]},
    "a row too few": {"row": [0, 1]},
    "taps that do not begin at 0": {"tap_ptr": [1, 2, 3]},
    "no channels": {"shape": [1, 0, *SHAPE[2:]]},
    "groups that do not divide": {"shape": [*SHAPE[:15], 3]},
    "an extent beyond 2^30": {"shape": [1, 2, 2**30, *SHAPE[3:]]},
    "extents whose sum overflows": {"shape": [1, 2, 4, 2**30, 4, 1, 2, 4, 2**30, *SHAPE[9:]]},
    "a shape too short": {"shape": SHAPE[:15]},
}


@pytest.mark.parametrize("kind", ["Fprop", "FpropFilters", "FpropMatrix", "FpropTaps", "Dgrad", "Wgrad"])
@pytest.mark.parametrize("fault", CORRUPT)
def test_a_corrupt_index_builds_no_kernel(fault: str, kind: str) -> None:
    from stripe_kernels import _cpu

    last = {"Wgrad": 8, "FpropFilters": [1, 1], "FpropTaps": [1]}.get(kind, [0, 1, 1, 1, 4])
    sound = {"shape": SHAPE, "tap_ptr": TAP_PTR, "filter": FILTER, "row": ROW}
    faulty = sound | CORRUPT[fault]
    isa = "generic"
    if kind == "FpropMatrix":
        if "amx" not in _cpu.isas():
            pytest.skip("this processor has no matrix registers")
        isa = "amx"  # takes 32 channels where the others take 2
        sound, faulty = (
            {**v, "shape": [*v["shape"][:1], 16 * v["shape"][1], *v["shape"][2:]]} for v in (sound, faulty)
        )
    getattr(_cpu, kind)(*sound.values(), last, isa)
    with pytest.raises(ValueError, match=r"stripe_kernels\._cpu"):
        getattr(_cpu, kind)(*faulty.values(), last, isa)
