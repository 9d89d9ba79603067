"""What `optimize` compares: every kind of input and output, and that it notices others."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stripe_kernels import freeze, optimize
from stripe_kernels.compile.exact import check_exact
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.race import Ratio

optimizer = importlib.import_module("stripe_kernels.compile.optimize")


class Two(NamedTuple):
    a: Tensor
    b: Tensor


@dataclasses.dataclass
class Pair:
    a: Tensor
    b: Any


class Model(nn.Module):
    """What `compute` makes of a convolution and the inputs."""

    def __init__(self, compute: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.compute = compute
        self.eval().to(dtype)

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(lambda x: self.norm(self.conv(x)), *inputs)


class OneInput(Model):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class TwoInputs(Model):
    def forward(self, x: Tensor, z: Tensor) -> Any:
        return super().forward(x, z)


def image(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(len(size)))


def pixels() -> Tensor:
    return torch.randint(256, (2, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def asserts_its_batch(f: nn.Module, x: Tensor) -> Tensor:
    torch._assert(x.shape[0] == 2, "two images")
    return f(x)


MODELS: dict[str, tuple[Model, tuple[Tensor, ...]]] = {
    "an image without a batch": (OneInput(lambda f, x: f(x[None])), (image(3, 8, 6),)),
    "images of two sizes": (
        TwoInputs(lambda f, x, z: f(x) + f(z[:, :, ::8, ::8])), (image(1, 3, 64, 64), image(1, 3, 512, 512)),
    ),
    "images of two batches": (TwoInputs(lambda f, x, z: f(x) + f(z)), (image(2, 3, 8, 6), image(1, 3, 8, 6))),
    "a number beside": (TwoInputs(lambda f, x, z: f(x) * z.log()), (image(2, 3, 8, 6), torch.tensor(0.5))),
    "a vector an image": (TwoInputs(lambda f, x, z: f(x) + z[:, :, None, None]), (image(2, 3, 8, 6), image(2, 8))),
    "a batch asserted": (OneInput(asserts_its_batch), (image(2, 3, 8, 6),)),
    "a spectrum": (OneInput(lambda f, x: torch.fft.fft(f(x)).conj()), (image(2, 3, 8, 6),)),
    "a batch in the code": (OneInput(lambda f, x: f(x).view(2, -1)), (image(2, 3, 8, 6),)),
    "an empty batch": (OneInput(lambda f, x: f(x)), (image(0, 3, 8, 6),)),
    "pixels cast": (OneInput(lambda f, x: f(x.float() / 255)), (pixels(),)),
    "pixels divided": (OneInput(lambda f, x: f(x / 255)), (pixels(),)),
    "cast to float64": (OneInput(lambda f, x: f(x.double()), torch.float64), (image(2, 3, 8, 6),)),
    "cast to bfloat16": (OneInput(lambda f, x: f(x.bfloat16()).float(), torch.bfloat16), (image(2, 3, 8, 6),)),
    "given out in float64": (OneInput(lambda f, x: f(x).double()), (image(2, 3, 8, 6),)),
    "in two dtypes": (OneInput(lambda f, x: (f(x), f(x).half())), (image(2, 3, 8, 6),)),
    "None and a size": (OneInput(lambda f, x: (f(x), None, x.shape[0])), (image(2, 3, 8, 6),)),
    "classes": (OneInput(lambda f, x: f(x).argmax(1)), (image(2, 3, 8, 6),)),
    "a mask": (OneInput(lambda f, x: {"m": f(x) > 0, "y": [f(x), (x,)]}), (image(2, 3, 8, 6),)),
    "a named tuple": (OneInput(lambda f, x: Two(f(x), f(x).relu())), (image(2, 3, 8, 6),)),
    "a dataclass": (OneInput(lambda f, x: Pair(f(x), [f(x).relu()])), (image(2, 3, 8, 6),)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_compares_what_models_take_and_give(name: str) -> None:
    model, inputs = MODELS[name]
    frozen = freeze(model, {"conv": torch.rand(8, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5})
    network = optimizer.compact(frozen, inputs)
    check_exact(frozen, network, inputs)
    if not inputs[0].numel():
        return
    for p in network.parameters():
        p.data.mul_(1.1).add_(0.1)
    network.forget()
    with pytest.raises(ValueError, match=r"error against float64 would be|values of an output in"):
        check_exact(frozen, network, inputs)


class Gives(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.forward = compute  # type: ignore[method-assign]


def tied(x: Tensor) -> Tensor:
    """True or false by rounding alone."""
    return x * 0.1 + x * 0.2 > x * 0.3


def test_rounding_may_decide_ties_and_nothing_else() -> None:
    x = image(1, 3, 64, 64)
    assert not torch.equal(tied(x), tied(x.double()))
    check_exact(Gives(tied), Gives(lambda x: tied(x.double())), (x,))
    one = torch.zeros(8, 3, 64, 64, dtype=torch.bool)
    one[0, 0, 0, 0] = True
    check_exact(
        Gives(lambda x: x > 0), Gives(lambda x: (x > 0) ^ one[: len(x)] if len(x) > 1 else x > 0), (x,)
    )
    with pytest.raises(ValueError, match=r"1 of 12288 values of an output in torch\.bool would be others"):
        check_exact(Gives(lambda x: x > 0), Gives(lambda x: (x > 0) ^ one[: len(x)]), (x,))


@pytest.mark.parametrize(
    ("given", "said"),
    [(lambda x: (x, None), r"is None instead of torch\.float32 \[1, 2, 3, 4\]"),
     (lambda x: (x, x[0]), r"is torch\.float32 \[2, 3, 4\] instead of"),
     (lambda x: (x, x.double()), r"is torch\.float64 \[1, 2, 3, 4\] instead of"),
     (lambda x: (x,), "shorter"),
     (lambda x: (x, x * float("nan")), "would be nan")],
)  # fmt: skip
def test_outputs_of_another_kind_are_named(given: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_exact(Gives(lambda x: (x, x)), Gives(given), (image(1, 2, 3, 4),))


def test_sparse_outputs_are_compared() -> None:
    sparse, x = Gives(lambda x: x.relu().to_sparse()), image(1, 2, 3, 4)
    check_exact(sparse, sparse, (x,))
    with pytest.raises(ValueError, match="error against float64 would be"):
        check_exact(sparse, Gives(lambda x: x.relu().mul(1.1).to_sparse()), (x,))


def test_a_model_that_refuses_float64_is_kept_and_told_so() -> None:
    model, inputs = OneInput(lambda f, x: f(x)), (image(2, 3, 8, 6),)
    network = optimizer.compact(model, inputs)
    refusing = Gives(lambda x: model(x) if x.dtype == torch.float32 else model(x.view(torch.int32)))
    asserting = OneInput(lambda f, x: torch._assert(x.dtype == torch.float32, "single precision") or f(x))
    for one in (refusing, asserting):
        with pytest.raises(ValueError, match=r"cannot be compared with torch\.float64's"):
            check_exact(one, network, inputs)


def test_optimize_takes_what_it_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that channels_last maps do not have lose that variant alone."""
    monkeypatch.setattr(optimizer, "_race", lambda *_: Ratio(0.5, 0.4, 0.6))
    for model, inputs in (
        MODELS["pixels cast"], (OneInput(lambda f, x: f(x).view(x.size(0), 2, -1).sum(2)), (image(2, 3, 8, 6),)),
        MODELS["an image without a batch"],
    ):  # fmt: skip
        network = optimize(model, inputs)
        assert isinstance(network, Network)
        torch.testing.assert_close(network(*inputs), model(*inputs))
