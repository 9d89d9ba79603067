"""Packed weights are kept in inference and never outlive the weight they were made from."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from stripe_kernels import StripeConv2d, ops, snapshots
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, live_stripes
from tests.passes import KERNELS, operands_of

kernels = pytest.mark.parametrize("kernel", KERNELS)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
modes = pytest.mark.parametrize("mode", MODES)
X = torch.randn(2, 6, 7, 5)


def layer(kernel: str = "auto") -> StripeConv2d:
    module = StripeConv2d(6, 8, 3, padding=1, skeleton=live_stripes("random", (8, 3, 3), 0.4, 1)).eval()
    module.kernel = kernel
    return module


def fresh(module: StripeConv2d, x: torch.Tensor = X) -> torch.Tensor:
    """What the layer has to compute: a dense convolution of the weight as it is now."""
    with torch.no_grad():
        return module.to_conv2d()(x)


def check(module: StripeConv2d, mode: str, x: torch.Tensor = X) -> None:
    with MODES[mode]():
        torch.testing.assert_close(module(x), fresh(module, x), atol=1e-5, rtol=1e-5)


def in_place(module: StripeConv2d) -> None:
    with torch.no_grad():
        module.weight.mul_(-2)


def in_place_in_inference_mode(module: StripeConv2d) -> None:
    with torch.inference_mode():
        module.weight.add_(1)


def through_a_view(module: StripeConv2d) -> None:
    with torch.no_grad():
        module.weight[0, 1:3] = 7


def through_detach(module: StripeConv2d) -> None:
    module.weight.detach().zero_()


def data_assigned(module: StripeConv2d) -> None:
    module.weight.data = torch.randn_like(module.weight)


def data_written_and_repacked(module: StripeConv2d) -> None:
    module.weight.data.mul_(3)
    module.repack()


def data_written_before_training(module: StripeConv2d) -> None:
    module.weight.data.mul_(3)
    module.train()
    module.eval()


def state_loaded(module: StripeConv2d) -> None:
    module.load_state_dict(layer().state_dict())


def state_assigned(module: StripeConv2d) -> None:
    module.load_state_dict(layer().state_dict(), assign=True)


def another_skeleton_loaded(module: StripeConv2d) -> None:
    other = StripeConv2d(6, 8, 3, padding=1, skeleton=live_stripes("random", (8, 3, 3), 0.7, 2))
    module.load_state_dict(other.state_dict())


def optimizer_step(module: StripeConv2d) -> None:
    module(X).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()


def fused_optimizer_step(module: StripeConv2d) -> None:
    module(X).square().sum().backward()
    torch.optim.AdamW(module.parameters(), 0.1, fused=True).step()


def fused_optimizer_step_after_a_look(module: StripeConv2d) -> None:
    module(X).square().sum().backward()
    check(module, "no_grad")
    torch.optim.AdamW(module.parameters(), 0.1, fused=True).step()


def master_weights_copied(module: StripeConv2d) -> None:
    """As optimizers of others than torch do it: through .data, where the backward pass is all that shows."""
    module(X).square().sum().backward()
    module.weight.data.copy_(module.weight.double() - module.weight.grad)


def foreach_optimizer_step(module: StripeConv2d) -> None:
    module(X).square().sum().backward()
    torch.optim.AdamW(module.parameters(), 0.1, foreach=True).step()


def moved_to_double_and_back(module: StripeConv2d) -> None:
    module.weight.data.mul_(3)
    module.double().float()


def replaced(module: StripeConv2d) -> None:
    module.weight = nn.Parameter(torch.randn_like(module.weight))


def initialised_again(module: StripeConv2d) -> None:
    module.reset_parameters()


def swapped(module: StripeConv2d) -> None:
    with torch.no_grad():
        module.weight.set_(torch.randn_like(module.weight))


CHANGES = [
    in_place,
    in_place_in_inference_mode,
    through_a_view,
    through_detach,
    data_assigned,
    data_written_and_repacked,
    data_written_before_training,
    state_loaded,
    state_assigned,
    another_skeleton_loaded,
    optimizer_step,
    fused_optimizer_step,
    fused_optimizer_step_after_a_look,
    master_weights_copied,
    foreach_optimizer_step,
    moved_to_double_and_back,
    replaced,
    initialised_again,
    swapped,
]


@modes
@kernels
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_packed_again(change, kernel: str, mode: str) -> None:
    module = layer(kernel)
    check(module, mode)
    before = fresh(module)
    change(module)  # no module.eval() here: it packs again by itself
    assert not torch.allclose(fresh(module), before), "the change has to show"
    check(module, mode)
    check(module, mode)


@modes
def test_an_unchanged_weight_is_packed_once(mode: str) -> None:
    case = CASES["lopsided"]
    op = StripeOp(*case.arguments, "reference")
    x, weight, *_ = operands_of(case, torch.float32, "contiguous")
    packs = []
    with MODES[mode]():
        ops.fprop(op, x, weight)
        runner = op.runner("fprop", tuple(x.shape), x)
        original = runner.pack
        runner.pack = lambda w: (packs.append(w), original(w))[1]
        snapshots.drop_snapshot(weight)
        for _ in range(5):
            ops.fprop(op, x, weight)
        assert len(packs) == 1
        ops.fprop(op, x[:2], weight)
        ops.fprop(op, x, weight)
    assert len(packs) == 1


@modes
def test_a_compiled_layers_training_is_seen(mode: str) -> None:
    torch._dynamo.reset()
    module = layer()
    compiled = torch.compile(module, backend="aot_eager")
    optimizer = torch.optim.SGD(module.parameters(), 0.01, fused=True)
    for _ in range(2):
        check(module, mode)
        compiled(X).sum().backward()
        optimizer.step()
    check(module, mode)


def test_a_frozen_weight_keeps_its_form_while_others_train() -> None:
    frozen, trained = layer().requires_grad_(False), layer()
    optimizer = torch.optim.SGD([*frozen.parameters(), *trained.parameters()], 0.1)
    frozen(X)
    before = snapshots._snapshots[id(frozen.weight)]
    trained(frozen(X)[:, :6]).sum().backward()
    optimizer.step()
    assert snapshots._snapshots[id(frozen.weight)] is before


def test_the_weight_that_trains_is_packed_on_every_call() -> None:
    """Optimizers write through .data; with gradients no snapshot can go stale."""
    module = layer().train()
    module(X).sum().backward()
    module.weight.data.mul_(-3)
    torch.testing.assert_close(module(X).detach(), fresh(module), atol=1e-5, rtol=1e-5)


@kernels
def test_inference_tensors_have_no_version_and_are_still_seen(kernel: str) -> None:
    case = CASES["lopsided"]
    op = StripeOp.of(*case.arguments, kernel)
    x, weight, *_ = operands_of(case, torch.float32, "contiguous")
    with torch.inference_mode():
        inference = weight.clone()
        assert inference.is_inference()
        before = ops.fprop(op, x, inference)
        inference.mul_(2)
        torch.testing.assert_close(ops.fprop(op, x, inference), before * 2)


def test_a_layer_made_in_inference_mode_keeps_its_packed_weight() -> None:
    with torch.inference_mode():
        module = layer()
        check(module, "inference_mode")
        module.weight.mul_(2)
        check(module, "inference_mode")
    assert not module.weight.is_inference()
    assert id(module.weight) in snapshots._snapshots


def test_snapshots_die_with_their_weight() -> None:
    gc.collect()
    before = len(snapshots._snapshots)
    modules = [layer() for _ in range(5)]
    with torch.no_grad():
        for module in modules:
            module(X)
    assert len(snapshots._snapshots) == before + 5
    del modules, module
    gc.collect()
    assert len(snapshots._snapshots) == before


def test_a_weight_at_a_dead_weights_address_is_its_own() -> None:
    case = CASES["lopsided"]
    op = StripeOp.of(*case.arguments, "auto")
    x, weight, *_ = operands_of(case, torch.float32, "contiguous")
    with torch.no_grad():
        for factor in range(1, 30):
            scaled = weight * factor
            torch.testing.assert_close(
                ops.fprop(op, x, scaled), ops.fprop(op, x, weight) * factor, atol=1e-4, rtol=1e-4
            )
            del scaled


def test_a_copy_has_a_snapshot_of_its_own() -> None:
    module = layer()
    with torch.no_grad():
        module(X)
        twin = copy.deepcopy(module)
        twin.weight.mul_(2)
    check(twin, "no_grad")
    check(module, "no_grad")


def test_a_changed_bias_needs_no_packing() -> None:
    module = layer()
    check(module, "no_grad")
    module.bias.data.add_(5)
    check(module, "no_grad")


@kernels
def test_each_size_dtype_and_format_has_its_own(kernel: str) -> None:
    module = layer(kernel)
    for x in (
        X,
        X[:1],
        X[..., :4],
        X.contiguous(memory_format=torch.channels_last),
        X.repeat(20, 1, 1, 1),
        X,
    ):
        check(module, "no_grad", x)


@pytest.mark.parametrize("through", [lambda s: s, lambda s: s.data, lambda s: s.numpy()])
def test_a_changed_skeleton_tensor_is_read_again(through) -> None:
    """Numpy and .data leave no mark on it."""
    from stripe_kernels import stripe_conv2d

    skeleton = torch.zeros(2, 1, 1, dtype=torch.bool)
    skeleton[0] = True
    x, weight = torch.randn(1, 3, 2, 2), torch.randn(1, 3)
    first = stripe_conv2d(x, weight, skeleton)
    through(skeleton)[:] = ~through(skeleton)
    second = stripe_conv2d(x, weight, skeleton)
    assert first[:, 1].count_nonzero() == second[:, 0].count_nonzero() == 0
    assert torch.equal(first[:, 0], second[:, 1])


def test_a_form_packed_in_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the graph's: before a replay it holds nothing. (What a GPU does with one packed outside has
    tests/test_kept.py.)"""

    class Weight:  # a CUDA tensor as far as a snapshot looks at one
        is_cuda, _version, device = True, 0, "cuda:0"

        def is_inference(self) -> bool:
            return False

        def data_ptr(self) -> int:
            return 64

    class Runner:
        packed = 0

        def pack(self, weight: Weight) -> int:
            self.packed += 1
            return self.packed

    class Kept:
        def __init__(self, make, device: str) -> None:  # type: ignore[no-untyped-def]
            self.made = make()

        def value(self) -> int:
            return self.made

    weight, runner, capturing = Weight(), Runner(), [True]
    monkeypatch.setattr(snapshots, "capturing", lambda device: capturing[0])
    monkeypatch.setattr(snapshots, "Kept", Kept)
    assert [snapshots.packed_weight(runner, weight) for _ in range(2)] == [1, 2]
    capturing[0] = False
    assert [snapshots.packed_weight(runner, weight) for _ in range(2)] == [3, 3]
    capturing[0] = True
    assert snapshots.packed_weight(runner, weight) == 3


def test_optimizers_with_groups_of_their_own() -> None:
    """The hooks around every step look at weights only, frozen ones with a gradient among them."""
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, fused=True)
    module(X).sum().backward()
    module.weight.requires_grad_(False)
    check(module, "no_grad")
    optimizer.step()
    check(module, "no_grad")

    class Foreign(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.zeros(1)], {})
            self.param_groups = [{"lr": 1.0}, {"params": [nn.ReLU()]}]

        def step(self, closure: None = None) -> None: ...

    Foreign().step()
