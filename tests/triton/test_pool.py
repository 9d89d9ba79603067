"""Max pools against torch's, bit for bit: windows that leave the image, NaN, zeros of both signs, memory layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels import backends, registry
from stripe_kernels.backends.triton.launch import INTERPRETED
from stripe_kernels.backends.triton.pool import TritonMaxPool
from stripe_kernels.compile.program import write_program
from stripe_kernels.compile.trace import trace
from stripe_kernels.testing import poisoned_memory

backends.load()
DEVICE = "cpu" if INTERPRETED else "cuda"
# kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    (2, 2, 0, 1, False),
    (2, 2, 0, 1, True),
    (3, 2, 1, 1, False),
    ((3, 2), (2, 1), (1, 0), 1, False),
    (2, (1, 3), 1, (2, 1), True),
    (5, 3, 2, 1, True),
]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Few values, so that many are equal; zeros of both signs, infinities and NaN among them."""
    drawn = torch.randint(-3, 4, size, generator=torch.Generator().manual_seed(size[1])).to(dtype)
    drawn[torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.1] = -0.0
    drawn[torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.05] = torch.nan
    drawn[torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.3] = -torch.inf
    return drawn.to(DEVICE, memory_format=torch.channels_last)


def pairs(window: tuple[object, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(v if isinstance(v, tuple) else (v, v) for v in window[:4])  # type: ignore[misc]


def check(x: Tensor, window: tuple[object, ...]) -> None:
    expected = F.max_pool2d(x, *window)  # type: ignore[arg-type]
    assert TritonMaxPool.takes(pairs(window), x)
    pool = TritonMaxPool(pairs(window), x, tuple(expected.shape))
    with poisoned_memory():
        found = pool(x)
    assert found.stride() == expected.stride()
    assert torch.equal(found.isnan(), expected.isnan())
    bits = BITS[x.dtype]
    assert torch.equal(*(t.nan_to_num(nan=9.0, neginf=-9.0).view(bits) for t in (found, expected)))


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_equals_torch(window: tuple[object, ...], dtype: torch.dtype) -> None:
    # Whole vectors of channels, none, more than a block takes.
    for size in ((2, 8, 7, 9), (3, 13, 6, 5), (1, 72, 5, 4)):
        check(image(*size, dtype=dtype), window)


def test_more_pixels_than_a_block_has() -> None:
    check(image(5, 64, 14, 10, dtype=torch.bfloat16), (2, 2, 0, 1, False))


def test_windows_without_a_pixel_of_the_image() -> None:
    x = image(2, 8, 1, 3)
    assert F.max_pool2d(x, 2, 2, 1, 2).isneginf().all()
    check(x, (2, 2, 1, 2, False))


def test_slices() -> None:
    """Pixels and images apart; channels that begin between two vectors."""
    whole = image(3, 24, 9, 10)
    for part in (whole[1:, :, 1:, ::2], whole[:, 3:19], whole[:, 8:16]):
        check(part, (3, 2, 1, 1, False))


def test_a_map_of_other_strides_than_the_first() -> None:
    x = image(2, 8, 6, 7)
    apart = torch.empty(2, 8, 6, 14, device=DEVICE).to(memory_format=torch.channels_last)[..., ::2].copy_(x)
    pool = TritonMaxPool(((2, 2), (2, 2), (0, 0), (1, 1)), x, (2, 8, 3, 3))
    assert torch.equal(pool(apart).nan_to_num(), pool(x).nan_to_num())


def test_what_torch_keeps() -> None:
    window, x = ((2, 2), (2, 2), (0, 0), (1, 1)), image(2, 8, 6, 6)
    assert TritonMaxPool.takes(window, x)
    for other in (x.contiguous(), x.double(), x[:0], x[0], x[:, :1]):
        assert not TritonMaxPool.takes(window, other)
    assert not TritonMaxPool.takes(((9, 9), *window[1:]), image(1, 8, 9, 9))


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[TritonMaxPool]:
    """The kernel offered to networks on the CPU, call lists hidden; what they take of it."""
    made = []

    class Noted(TritonMaxPool):
        def __call__(self, x: Tensor) -> Tensor:
            made.append(self)
            return super().__call__(x)

    def no_list(threads: int) -> None:
        raise ImportError

    monkeypatch.setattr(backends, "call_list", no_list)
    monkeypatch.setitem(registry._parts, "max_pool", Noted)
    return made


def test_networks_call_it(pools: list[TritonMaxPool]) -> None:
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()).eval()
    x = image(2, 8, 9, 11)
    program = write_program(trace(model, 1), (x,))
    assert torch.equal(program(x).nan_to_num(), model(x).nan_to_num())
    assert len(pools) == 2
    contiguous = x.contiguous()
    program = write_program(trace(model, 1), (contiguous,))
    assert torch.equal(program(contiguous).nan_to_num(), model(x).nan_to_num())
    assert len(pools) == 2


def test_hooks_indices_and_subclasses_are_torchs(pools: list[TritonMaxPool]) -> None:
    class Own(nn.MaxPool2d):
        pass

    hooked = nn.MaxPool2d(2)
    seen: list[str] = []
    hooked.register_forward_hook(lambda *args: seen.append("hook"))
    x = image(2, 8, 6, 6)
    for layer, first in itertools.product((hooked, nn.MaxPool2d(2, return_indices=True), Own(2)), (x,)):
        program = write_program(trace(nn.Sequential(layer).eval(), 1), (first,))
        program(first)
    assert not pools
    assert seen
