"""The operators and torch's machinery: fakes, autograd, compilation, export, autocast, transforms."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from stripe_kernels import StripeConv2d, ops, stripe_conv2d
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.reference import scatter_stripes
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, Case
from tests.passes import KERNELS
from tests.tree import needs_compiler

OPS = torch.ops.stripe_kernels
SOME = [
    CASES[n] for n in ("lopsided", "grouped lopsided", "uneven padding", "no image", "empty", "dead filters")
]
case_of = pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)


def layer_of(case: Case, kernel: str = "auto", dtype: torch.dtype = torch.float32) -> StripeConv2d:
    s = case.shape
    layer = StripeConv2d(
        s.C, s.K, (s.R, s.S), s.stride, s.padding[:2], s.dilation, s.groups,
        skeleton=torch.from_numpy(case.skeleton.live.copy()), dtype=dtype,
    )  # fmt: skip
    layer.kernel = kernel
    return layer


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "channels_last sliced"])
@pytest.mark.parametrize("case", [CASES["lopsided"], CASES["one channel"]], ids=lambda c: c.name)
def test_opcheck_and_strides_of_the_fakes(kernel: str, layout: str, case) -> None:
    arguments = (*case.arguments, kernel)
    x, weight, dy, bias, scale, residual = case.operands(layout=layout)
    calls = {
        OPS.fprop.default: (x, weight, bias, scale, residual, "relu", *arguments),
        OPS.dgrad.default: (dy, weight, list(x.shape[2:]), *arguments),
        OPS.wgrad.default: (dy, x, *arguments),
    }
    for operator, inputs in calls.items():
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@case_of
def test_opcheck_with_gradients_and_dynamic_shapes(kernel: str, case) -> None:
    arguments = (*case.arguments, kernel)
    x, weight, dy, bias, scale, residual = (t.requires_grad_() for t in case.operands())
    torch.library.opcheck(OPS.fprop.default, (x, weight, bias, scale, residual, "silu", *arguments))
    torch.library.opcheck(OPS.dgrad.default, (dy, weight, list(x.shape[2:]), *arguments))
    torch.library.opcheck(OPS.wgrad.default, (dy, x, *arguments))


@case_of
@pytest.mark.parametrize("kernel", ["dense", "reference"])
def test_gradcheck(kernel: str, case) -> None:
    arguments = (*case.arguments, kernel)
    x, weight, dy, *_ = (t.requires_grad_() for t in case.operands(torch.float64))
    size = list(x.shape[2:])
    calls = [
        (lambda x, w: OPS.fprop(x, w, None, None, None, "none", *arguments), (x, weight)),
        (lambda dy, w: OPS.dgrad(dy, w, size, *arguments), (dy, weight)),
        (lambda dy, x: OPS.wgrad(dy, x, *arguments), (dy, x)),
    ]
    for call, inputs in calls:
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True, nondet_tol=1e-12)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, nondet_tol=1e-12)


def test_gradcheck_of_every_entry() -> None:
    case = CASES["lopsided"].batch(2)
    x, weight, *_ = (t.requires_grad_() for t in case.operands(torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, w: ops.fprop(StripeOp.of(*case.arguments, "reference"), x, w), (x, weight)
    )


def test_only_the_gradients_asked_for_are_computed(monkeypatch) -> None:
    case = CASES["lopsided"]
    ran: list[str] = []
    plan = StripeOp.plan

    def recorded(self, which, problem):
        ran.append(which)
        return plan(self, which, problem)

    monkeypatch.setattr(StripeOp, "plan", recorded)
    for name, expected in (("x", ["fprop", "dgrad"]), ("weight", ["fprop", "wgrad"])):
        ran.clear()
        operands = case.operands()
        op = StripeOp(*case.arguments, "reference")
        getattr(operands, name).requires_grad_()
        ops.fprop(op, operands.x, operands.weight).sum().backward()
        assert ran == expected


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("kernel", "dynamic"),
    [*product(("auto", "reference", "stripe_gemm"), (False, True)), ("triton", False)],  # interpreted: slow
)
def test_compiles_into_one_graph(kernel: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    case = CASES["lopsided"]
    layer = layer_of(case, kernel)
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (2, 3) if dynamic else (3,):
        x = case.batch(n).operands().x.requires_grad_()
        expected, actual = model(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        dy = torch.randn_like(expected)
        leaves = (x, *layer.parameters())
        for a, b in zip(
            torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
        ):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@needs_compiler
def test_compiles_with_inductor_in_inference() -> None:
    torch._dynamo.reset()
    case = CASES["grouped"]
    model = nn.Sequential(layer_of(case), nn.ReLU()).eval()
    x = case.operands().x
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_the_functional_form_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    case = CASES["lopsided"]
    s, skeleton = case.shape, case.skeleton
    x, weight, _, bias, *_ = case.operands()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return stripe_conv2d(x, weight, skeleton, bias, s.stride, s.padding[:2], s.dilation, s.groups)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), call(x, weight, bias))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict: bool) -> None:
    case = CASES["lopsided"]
    model = nn.Sequential(layer_of(case), nn.ReLU()).eval()
    x = case.operands().x
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert any("stripe_kernels.fprop" in str(node.target) for node in program.graph.nodes)
    for n in (1, 3, 7):
        x = case.batch(n).operands().x
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_conv2d(dtype: torch.dtype) -> None:
    case = CASES["lopsided"]
    layer = layer_of(case)
    dense = layer.to_conv2d()
    x = case.operands().x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y, expected = layer(x), dense(x)
        assert y.dtype == expected.dtype == dtype
        inner = layer(y.new_zeros(case.shape.input_size))
        assert inner.dtype == dtype
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone_and_can_be_disabled() -> None:
    case = CASES["lopsided"]
    with torch.autocast("cpu", torch.bfloat16):
        double = layer_of(case, dtype=torch.float64)
        x = case.operands(torch.float64).x
        assert double(x).dtype == double.to_conv2d()(x).dtype
        with torch.autocast("cpu", enabled=False):
            assert layer_of(case)(case.operands().x).dtype == torch.float32


def test_vmap_is_torchs_answer_or_a_clear_refusal() -> None:
    case = CASES["lopsided"]
    op = StripeOp.of(*case.arguments, "auto")
    operands = case.operands()
    many = torch.stack([operands.x, operands.x * 2])
    actual = torch.vmap(lambda x: ops.fprop(op, x, operands.weight))(many)
    expected = torch.stack([ops.fprop(op, x, operands.weight) for x in many])
    torch.testing.assert_close(actual, expected)


def dense_and_stripes() -> tuple[nn.Conv2d, StripeConv2d]:
    torch.manual_seed(0)
    layer = (
        StripeConv2d(4, 6, 3, padding=1, skeleton=torch.rand(6, 3, 3) < 0.4).double().requires_grad_(False)
    )
    return layer.to_conv2d(), layer


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "grad of grad": lambda f: torch.func.grad(
        lambda x: torch.func.grad(lambda z: f(z).pow(3).sum())(x).sum()
    ),
    "vjp, called when the transform is over": lambda f: lambda x: torch.func.vjp(f, x)[1](f(x))[0],
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).square().sum())),
    "vmap": torch.vmap,
    "functionalize": torch.func.functionalize,
    "functionalize of vmap": lambda f: torch.func.functionalize(torch.vmap(f)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transforms_of_x(transform: Any) -> None:
    dense, stripes = dense_and_stripes()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(transform(stripes)(x), transform(dense)(x))


FORWARD_OVER_REVERSE = {
    "hessian": torch.func.hessian,
    "jvp of grad": lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x,)),
}


@pytest.mark.parametrize("transform", FORWARD_OVER_REVERSE.values(), ids=FORWARD_OVER_REVERSE)
def test_forward_mode_over_reverse_is_refused_by_name(transform: Any) -> None:
    _, stripes = dense_and_stripes()
    transformed = transform(lambda x: stripes(x).square().sum())
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        transformed(torch.randn(1, 4, 5, 6, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_weights_gradients_image_by_image() -> None:
    dense, stripes = dense_and_stripes()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)

    def gradients(layer: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(layer, parameters, (image,)).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(dict(layer.named_parameters()), x)

    expected, actual = gradients(dense), gradients(stripes)
    torch.testing.assert_close(actual["bias"], expected["bias"])
    live = expected["weight"].permute(0, 1, 3, 4, 2)[:, stripes.skeleton]  # [N, A, C]
    torch.testing.assert_close(actual["weight"], live)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functional_gradients_of_the_whole_epilogue(activation: str) -> None:
    _, layer = dense_and_stripes()
    shapes = (2, 4, 5, 6), layer.weight.shape, (6,), (6,), (2, 6, 5, 6)
    operands = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def loss(*operands: Tensor) -> Tensor:
        return ops.fprop(layer._op, *operands, activation).square().sum()

    actual = torch.func.grad(loss, argnums=tuple(range(5)))(*operands)
    leaves = [t.clone().requires_grad_() for t in operands]
    for found, expected in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_what_is_not_strided_is_named(make: Any) -> None:
    layer = StripeConv2d(4, 6, 3, skeleton=torch.ones(6, 3, 3).triu().bool())
    with pytest.raises(TypeError, match=r"dense and strided, got torch\."):
        layer(make(torch.randn(2, 4, 5, 6)))


def test_inference_mode_and_inference_tensors() -> None:
    case = CASES["lopsided"]
    layer = layer_of(case).eval()
    x = case.operands().x
    expected = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.clone()), expected)
        made_here = layer_of(case)
        made_here.load_state_dict(layer.state_dict())
        y = made_here(x)
        assert y.is_inference()
        assert torch.equal(y, expected)
    with torch.no_grad():
        assert torch.equal(made_here(x), expected)


def test_fake_tensors_take_no_memory_and_have_torchs_sizes_and_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for case in (CASES["lopsided"], CASES["uneven padding"]):
            op = StripeOp.of(*case.arguments, "auto")
            x = torch.empty(case.shape.input_size)
            weight = torch.empty(case.skeleton.stripes, case.shape.group_c)
            assert tuple(ops.fprop(op, x, weight).shape) == case.shape.output_size
            last = ops.fprop(op, x.contiguous(memory_format=torch.channels_last), weight)
            assert last.is_contiguous(memory_format=torch.channels_last)


def test_meta_tensors_give_the_output_size() -> None:
    case = CASES["lopsided"]
    layer = layer_of(case).to("meta")
    y = layer(torch.empty(case.shape.input_size, device="meta"))
    assert y.device.type == "meta"
    assert tuple(y.shape) == case.shape.output_size


def test_modes_and_subclasses_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    case = CASES["lopsided"]
    layer, x = layer_of(case), case.operands().x
    with Recorder(), torch.no_grad():
        layer(x)
    assert OPS.fprop.default in seen

    class Tagged(Tensor):
        pass

    with torch.no_grad():
        assert type(layer(x.as_subclass(Tagged))) is Tagged
    expected = layer(x)
    with FlopCounterMode(display=False):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_mode_is_refused(kernel: str) -> None:
    """torch would drop the tangent of an operator without a forward-mode formula, and say nothing."""
    case = CASES["lopsided"]
    op = StripeOp.of(*case.arguments, kernel)
    x, weight, *_ = case.operands()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.fprop(op, x, weight), (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.fprop(op, x, forward_ad.make_dual(weight, weight))
        assert ops.fprop(op, x, weight).shape == case.shape.output_size


def test_a_trace_holds_the_operator_and_not_its_result() -> None:
    case = CASES["lopsided"]
    layer = layer_of(case).eval()
    x = case.operands().x
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(x * 2), layer(x * 2))


def test_a_negated_view_is_read_with_its_sign() -> None:
    case = CASES["lopsided"]
    layer = layer_of(case).eval()
    z = torch.complex(case.operands().x, case.operands().x)
    negated = z.conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        assert torch.equal(layer(negated), layer(-z.imag.contiguous()))
    assert torch.equal(layer(negated), layer(-z.imag.contiguous()))


def test_checkpointing_recomputes_through_the_operator() -> None:
    from torch.utils.checkpoint import checkpoint

    case = CASES["lopsided"]
    layer = layer_of(case)
    x = case.operands().x.requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    actual = torch.autograd.grad(
        checkpoint(layer, x, use_reentrant=False).square().sum(), (x, *layer.parameters())
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_every_operator_computes_what_torch_computes_under_no_grad_and_with_gradients() -> None:
    """The front and the dispatcher are two ways to one kernel."""
    for case in SOME:
        op = StripeOp.of(*case.arguments, "auto")
        operands = case.operands()
        with torch.no_grad():
            front = ops.fprop(op, operands.x, operands.weight, operands.bias)
            dispatched = OPS.fprop(
                operands.x, operands.weight, operands.bias, None, None, "none", *op.arguments
            )
        graph = ops.fprop(op, operands.x, operands.weight.requires_grad_(), operands.bias)
        assert graph.requires_grad
        assert torch.equal(front, dispatched)
        assert torch.equal(front, graph.detach())


def test_the_oracle_is_torch() -> None:
    case = CASES["lopsided"]
    s, operands = case.shape, case.operands(torch.float64)
    dense = scatter_stripes(operands.weight, torch.from_numpy(case.skeleton.live.copy()))
    expected = F.conv2d(operands.x, dense, operands.bias, s.stride, s.padding[:2], s.dilation, s.groups)
    actual = ops.fprop(StripeOp.of(*case.arguments, "reference"), operands.x, operands.weight, operands.bias)
    torch.testing.assert_close(actual, expected)
