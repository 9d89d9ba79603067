"""Operations in place: a graph without them computes the same, or is refused with the names that stand in the way."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels import load, optimize, save
from stripe_kernels.compile.exact import check_exact
from stripe_kernels.compile.freeze import UnchangedWarning
from stripe_kernels.compile.optimize import compact
from tests.compile.test_compact import assert_same


class Program(nn.Module):
    """A drawn list of steps over a list of maps: views, other names, operations in place and ordinary ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.conv = nn.Conv2d(3, 4, 1)
        self.steps = [(rng.choice(list(STEPS)), rng.randrange(99), rng.randrange(99)) for _ in range(5)]
        self.read = [rng.randrange(99) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.conv(x)]
        for step, one, other in self.steps:
            found = STEPS[step](maps[one % len(maps)], maps[other % len(maps)])
            maps += found if isinstance(found, list) else [found]
        return sum(maps[i % len(maps)].flatten(1).mean(1) for i in self.read)  # type: ignore[return-value]


def iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b.flatten(1).mean()
    return a


def imul(a: Tensor, b: Tensor) -> Tensor:
    name = a
    a *= 0.5
    return name


STEPS = {
    "add in place": iadd,
    "multiply in place": imul,
    "method in place": lambda a, b: a.clamp_(-1, 1),
    "function in place": lambda a, b: F.leaky_relu_(a, 0.2),
    "keyword in place": lambda a, b: F.silu(a, inplace=True),
    "no counterpart": lambda a, b: a.fill_(0.5),
    "sum": lambda a, b: a + 1,
    "activation": lambda a, b: torch.tanh(a),
    "view": lambda a, b: a.reshape(a.shape[0], -1),
    "slice": lambda a, b: a[:, :2],
    "chunk": lambda a, b: list(a.chunk(2, 1)),
    "other name": lambda a, b: a,
}


def outcome(seed: int) -> str:
    torch.manual_seed(seed)
    model, x = Program(seed).eval(), torch.randn(2, 3, 4, 5)
    try:
        network = compact(model, (x,))
    except ValueError as error:
        return re.sub(r".*(in place|fewer than).*", "refused: \\1", str(error))
    assert_same(model, network, [x])
    return "same"


class Does(nn.Module):
    """`compute` of the map that a convolution with a dead filter gives, and of a tensor of the model's own."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.compute = nn.Conv2d(3, 4, 1), compute
        self.conv.weight.data[1] = 0
        self.register_buffer("own", torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.compute(self.conv(x), self.own)


def another_name(x: Tensor, own: Tensor) -> Tensor:
    y = x
    y += 1
    y /= 2
    return x * y


def numbers(x: Tensor, own: Tensor) -> Tensor:
    height = before = x.shape[2]
    height += 1
    height *= 2
    return F.interpolate(x, size=(height, before))


def strides(x: Tensor, own: Tensor) -> Tensor:
    stride = before = x.stride(2)
    stride += 1
    return x * stride + before


def parts(first: int, second: int) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(x: Tensor, own: Tensor) -> Tensor:
        chunks = x.chunk(2, 1)
        one = chunks[first]
        one += 1
        return chunks[second] * 2

    return compute


def transposed(x: Tensor, own: Tensor) -> Tensor:
    other = x.mT
    x += 1
    return other


def counted(x: Tensor, own: Tensor) -> Tensor:
    own.add_(x.mean())
    return x


def remembered(x: Tensor, own: Tensor) -> Tensor:
    own.add_(x.mean())
    return x + own


def bits(x: Tensor, own: Tensor) -> Tensor:
    positive = x > 0
    name = positive
    name &= x < 1
    name |= x < -1
    return x * positive


def attribute(x: Tensor, own: Tensor) -> Tensor:
    other = x.mT
    other *= 2
    return x


def assigned(x: Tensor, own: Tensor) -> Tensor:
    x.data = x * 2
    return x


def collected(x: Tensor, own: Tensor) -> Tensor:
    total = torch.zeros(1)
    total.add_(x.mean())
    return x + total


def unversioned(x: Tensor, own: Tensor) -> Tensor:
    own.data.add_(1)
    return x + own


def part_of_own(x: Tensor, own: Tensor) -> Tensor:
    own.add_(x.mean())
    return x[:, :2] + own[:, :2]


def item(x: Tensor, own: Tensor) -> Tensor:
    own[:, 0] = x.mean()
    return x + own


def out(x: Tensor, own: Tensor) -> Tensor:
    y = x + 1
    torch.mul(x, 2, out=y)
    return y


def narrow(x: Tensor, own: Tensor) -> Tensor:
    y = x.half()
    y += x
    return y


def expanded(x: Tensor, own: Tensor) -> Tensor:
    both = x.mean(0).expand(2, 4, 4, 5)
    one = both[0]
    one += 1
    return both[1]


def whole_numbers(x: Tensor, own: Tensor) -> Tensor:
    found = x.argmax(1)
    same = found.long()
    same += 1
    return found


def by_einsum(x: Tensor, own: Tensor) -> Tensor:
    other = torch.einsum("nchw->nhwc", x)
    other += 1
    return x


def of_a_maximum(x: Tensor, own: Tensor) -> Tensor:
    found = x.max(1)
    values = found.values
    values += 1
    return found[0]


VIEWED = "in place, which has views, which"
CHANGES = "in every call|which the next call would read"


@pytest.mark.parametrize(
    ("compute", "refused"),
    [
        (bits, None),
        (attribute, VIEWED),
        (assigned, "assigned to a tensor's data"),
        (collected, CHANGES),
        (unversioned, CHANGES),
        (part_of_own, CHANGES),
        (item, CHANGES),
        (out, "by `out=`"),
        (narrow, None),
        (expanded, VIEWED),
        (whole_numbers, VIEWED),
        (by_einsum, VIEWED),
        (of_a_maximum, VIEWED),
        (lambda x, own: torch.searchsorted(sorted_sequence=torch.arange(4.0), input=x) * 1.0, None),
        (another_name, None),
        (numbers, None),
        (strides, None),
        (parts(0, 1), None),
        (parts(0, 0), "in place, which has views, which"),
        (parts(0, -2), "in place, which has views, which"),
        (transposed, None),
        (lambda x, own: (x.fill_(2), x)[1], "fill_ writes conv in place, which has a reader, output"),
        (lambda x, own: x.new_zeros(4, 1, 1).fill_(2) + x, None),
        (counted, None),
        (remembered, "changes own, which the next call would read"),
    ],
)
def test_who_else_reads_it_decides(compute: Callable[..., Any], refused: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Does(compute).eval(), torch.randn(2, 3, 4, 5)
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            compact(model, (x,))
        return
    assert_same(model, compact(model, (x,)), [x])


IN_FILES = [
    another_name,
    numbers,
    parts(0, 1),
    parts(0, 0),
    transposed,
    bits,
    attribute,
    of_a_maximum,
    narrow,
]


@pytest.mark.parametrize("compute", IN_FILES)
def test_files_keep_what_is_in_place(compute: Callable[..., Any], tmp_path: Path) -> None:
    model, x = Does(compute).eval(), torch.randn(2, 3, 4, 5)
    save(model, tmp_path / "net")
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "net")(x), model(x))


@pytest.mark.parametrize("compute", [assigned, collected, unversioned, part_of_own])
def test_files_do_not_remember_what_a_model_forgets(compute: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data|{CHANGES}"):
        save(Does(compute), tmp_path / "net")


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight *= 0.5
        return x * weight


def test_what_a_model_does_to_its_parameter_goes_on(tmp_path: Path) -> None:
    model, x = Halves(), torch.ones(1, 3, 2, 2)
    save(model, tmp_path / "net")
    loaded = load(tmp_path / "net")
    with torch.inference_mode():
        assert [float(loaded(x).mean()) for _ in range(2)] == [0.5, 0.25]
    with pytest.raises(ValueError, match=CHANGES):
        compact(model, (x,))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_a_number_that_a_model_counts_is_no_constant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changes its calls in every call"):
        save(Counts(), tmp_path / "net")


def test_fewer_parts_than_asked_for_are_refused() -> None:
    model = Does(lambda x, own: sum(list(x.chunk(3, 1))))
    with pytest.raises(ValueError, match="chunk returns 2 parts, fewer than the 3 it was asked for"):
        compact(model, (torch.randn(2, 3, 4, 5),))


def test_the_input_is_left_alone() -> None:
    """A model that writes to its input: every comparison begins with the caller's values, and those stay."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x -= 3
            return self.conv(x.div_(2))

    model, x = Scales().eval(), torch.randn(2, 3, 4, 5)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnchangedWarning)  # whoever wins the race
        optimize(model, x)
    assert torch.equal(x, before)
    network = compact(model, (x,))
    check_exact(model, network, (x,))
    next(iter(network.parameters())).data.mul_(1.001)
    network.forget()
    with pytest.raises(ValueError, match="error against float64 would be"):
        check_exact(model, network, (x,))


class Draws(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.conv(x))


@pytest.mark.parametrize(
    "how",
    [lambda x: x + torch.randn(1, 4, 1, 1), lambda x: x * random.random(), lambda x: x * np.random.rand()],
)
def test_random_numbers_of_a_model_are_no_constants(how: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model, x = Draws(how), torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match="Draws draws random numbers in every call"):
        compact(model, (x,))
    with pytest.raises(ValueError, match="Draws draws random numbers in every call"):
        save(model, tmp_path / "net")


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) / self.calls


def test_what_a_model_remembers_is_no_constant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Remembers changes its calls in every call at .*self\.calls"):
        compact(Remembers(), (torch.randn(2, 3, 4, 5),))


def test_drawn_programs_are_the_same_or_refused() -> None:
    outcomes = [outcome(seed) for seed in range(300)]
    assert set(outcomes) == {"same", "refused: in place", "refused: fewer than"}
    assert outcomes.count("same") > 100
