"""The native boundary behind Python's fronts: numbers of tensors, sizes and strides of call lists and lane networks are
checked when these are built. (Kernels' own index lists: tests/test_malformed.py.)"""

from __future__ import annotations

import pytest
import torch

_cpu = pytest.importorskip("stripe_kernels._cpu")


def each(table: dict[str, list[tuple[int, ...]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "numbers"), [(k, n) for k, v in table.items() for n in v], ids=str
    )


def a_list(kind: str, *numbers: int) -> None:
    """A list with tensors 0, rows dense, and 1, pixels dense, both 4 channels of 4x4, and what is asked for."""
    calls, size = _cpu.CallList(), (1, 4, 4, 4)
    calls.add_arena(0, (64, 16, 4, 1), 0)
    calls.add_slot(0, (64, 1, 16, 4), 0)
    stripes = [1, 4, 4, 4, 4, 1, 1, 4, 4, 1, 1, 0, 0, 1, 1, 1], [0, 1], [2], [0]
    kernel = _cpu.Fprop(*stripes, [0, 1, 1, 1, 4], "generic")
    dgrad, wgrad = _cpu.Dgrad(*stripes, [0, 1, 1, 1, 4], "generic"), _cpu.Wgrad(*stripes, 4, "generic")
    asked = {
        "fprop": lambda x, residual, y: calls.add_fprop(kernel, 0, 0, 0, 0, x, residual, y),
        "pack": lambda weight, packed: calls.add_pack(dgrad, weight, packed),
        "packed fprop": lambda packed, bias, x, y: calls.add_packed_fprop(kernel, packed, bias, x, y),
        "dgrad": lambda packed, dy, dx: calls.add_dgrad(dgrad, packed, dy, dx),
        "wgrad": lambda x, dy, dw: calls.add_wgrad(wgrad, x, dy, dw),
        "activation": lambda code: calls.add_fprop(kernel, 0, 0, 0, code, 0, -1, 0),
        "max pool": lambda x, y: calls.add_max_pool((1, 1, 1, 1, 0, 0), size, size, x, y),
        "window": lambda *window: calls.add_max_pool(window, size, size, 0, 0),
        "maps": lambda *maps: calls.add_max_pool((1, 1, 1, 1, 0, 0), maps[:4], maps[4:], 0, 0),
        "average": lambda x, y: calls.add_average(size, x, y),
        "average of": lambda *of: calls.add_average(of, 0, 0),
        "flatten": lambda x, y: calls.add_flatten(size, x, y),
        "linear": lambda weight, bias, x, y: calls.add_linear(weight, bias, (1, 4, 4), x, y),
        "sizes": lambda *sizes: calls.add_linear(1, -1, sizes, 1, 1),
        "arena": lambda type, offset: calls.add_arena(type, (64, 16, 4, 1), offset),
        "slot": lambda slot: calls.add_slot(0, (64, 16, 4, 1), slot),
        "planes": lambda *planes: calls.add_planes(planes, 0),
        "floats of planes": lambda *planes: calls.planes_floats(planes),
        "threads": lambda threads: calls.run(threads, 0, [0]),
        "slots": lambda count: calls.run(1, 0, [0] * count),
    }
    asked[kind](*numbers)


SOUND_LISTS = {
    "fprop": [(0, -1, 1), (0, 1, 1)],
    "pack": [(0, 1)],
    "packed fprop": [(0, -1, 0, 1), (0, 1, 0, 1)],
    "dgrad": [(0, 1, 0)],
    "wgrad": [(0, 1, 0)],
    "activation": [(4,)],
    "max pool": [(0, 0)],
    "average": [(0, 1)],
    "flatten": [(0, 1)],
    "linear": [(1, 1, 1, 1)],
    "arena": [(2, 0)],
    "slot": [(1,)],
    "planes": [(1, 4, 4, 4, 5)],
    "floats of planes": [(1, 4, 4, 4, 5)],
    "threads": [(1,)],
    "slots": [(1,)],
}
WRONG_LISTS = {
    "fprop": [(2, -1, 1), (-1, -1, 1), (0, 2, 1), (0, -1, 2)],
    "pack": [(2, 1), (-1, 1), (0, 2), (0, -1)],
    "packed fprop": [(2, -1, 0, 1), (-1, -1, 0, 1), (0, 2, 0, 1), (0, -1, 2, 1), (0, -1, 0, -1)],
    "dgrad": [(2, 1, 0), (-1, 1, 0), (0, 2, 0), (0, 1, -1)],
    "wgrad": [(2, 1, 0), (-1, 1, 0), (0, 2, 0), (0, 1, -1)],
    "activation": [(5,), (-1,)],
    "max pool": [(0, 2), (-1, 0), (0, 1)],
    "window": [(0, 1, 1, 1, 0, 0), (1, 1, 1, -1, 0, 0), (2**30, 1, 1, 1, 0, 0), (1, 1, 1, 1, 0, 2**30)],
    "maps": [(-1, 4, 4, 4, -1, 4, 4, 4), (1, 4, 4, 4, 1, 5, 4, 4)],
    "average": [(0, 2), (-1, 0), (1, 0)],
    "average of": [(1, 4, 0, 4), (2**15, 2**15, 1, 1)],
    "flatten": [(1, 1), (0, 0), (0, 9)],
    "linear": [(2, -1, 1, 1), (0, -1, 1, 1), (1, 9, 1, 1), (1, 0, 1, 1), (1, 1, 9, 1), (1, 1, 1, -1)],
    "sizes": [(-1, 4, 4), (1, 4, -4)],
    "arena": [(0, -4), (3, 0)],
    "slot": [(-1,), (2**31 - 1,)],
    "planes": [(1, 4, 4, 4, 3), (0, 4, 4, 4, 5), (1, 4, -4, 4, 5), (2**31 - 1,) * 5],
    "floats of planes": [(0, *(2**31 - 1,) * 4), (2**31 - 1, 2**31 - 1, 1, 1, -64), (2**31 - 1,) * 5],
    "threads": [(0,)],
    "slots": [(0,)],
}


@each(SOUND_LISTS)
def test_a_sound_list_is_built(kind: str, numbers: tuple[int, ...]) -> None:
    a_list(kind, *numbers)


@each(WRONG_LISTS)
def test_a_wrong_list_is_refused(kind: str, numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        a_list(kind, *numbers)


def lanes(kind: str, *numbers: int) -> None:
    """Batch lanes with activations 0, 4 channels of 4x4, 1, 4 of 2x2, and 2, 3 of 4x4, and what is asked for."""
    images = _cpu.lanes("generic")
    if kind == "images":
        _cpu.LaneNetwork(*numbers, "generic")
        return
    network, weight = _cpu.LaneNetwork(images, 1, "generic"), torch.ones(4)
    for c, size in ((4, 4), (4, 2), (3, 4)):
        network.add_activation(c, size, size, 0)

    def convolution(kernel: int, x: int, residual: int, y: int) -> None:
        shape = [images, 4, 4, 4, 4, kernel, kernel, 5 - kernel, 5 - kernel, 1, 1, 0, 0, 1, 1, 1]
        tap_ptr = [0, *[1] * kernel**2]
        network.add_conv(shape, tap_ptr, [2], [0], weight.data_ptr(), 0, 0, 0, x, residual, y)

    asked = {
        "activation": network.add_activation,
        "conv": convolution,
        "pool": lambda kind, stride, x, y: network.add_pool(kind, (2, 2, stride, stride, 0, 0), x, y),
        "window": lambda *window: network.add_pool(0, window, 0, 1),
        "pointwise": lambda x, residual, y: network.add_pointwise(0, 0, 0, x, residual, y),
        "run": lambda threads, n, x, y: network.run(threads, 0, 0, (0,) * 4, n, x, 0, 0, (0,) * 4, y),
    }
    asked[kind](*numbers)


SOUND_LANES = {
    "images": [(16, 1)],
    "activation": [(4, 4, 4, 16)],
    "conv": [(1, 0, -1, 0), (3, 0, 1, 1)],
    "pool": [(2, 2, 0, 1)],
    "pointwise": [(0, 0, 0)],
    "run": [(1, 0, 0, 0)],
}
WRONG_LANES = {
    "images": [(0, 1), (17, 1), (128, 1), (16, 0)],
    "activation": [
        (0, 4, 4, 0),
        (4, 4, 4, 8),
        (4, 4, 4, -16),
        (2**20, 4, 4, 0),
        (1, 2**15, 2**15, 0),
        (1, 1, 1, 2**60),
    ],
    "conv": [
        (1, 3, -1, 0),
        (1, -1, -1, 0),
        (1, 0, -1, 1),
        (1, 2, -1, 0),
        (1, 0, -1, 2),
        (1, 0, 3, 0),
        (1, 0, 1, 0),
    ],
    "pool": [(3, 2, 0, 1), (-1, 2, 0, 1), (0, 0, 0, 1), (0, 2**30, 0, 1), (0, 2, 0, 2), (0, 2, 0, 3)],
    "window": [(2, 2, 2, 2, -1, 0), (2, 2, 2, 2, 2**30, 0)],
    "pointwise": [(0, -1, 1), (0, -1, 9), (0, 1, 0)],
    "run": [(0, 0, 0, 0), (1, -1, 0, 0), (1, 0, 3, 0), (1, 0, 0, -1)],
}


@each(SOUND_LANES)
def test_sound_lanes_are_built(kind: str, numbers: tuple[int, ...]) -> None:
    lanes(kind, *numbers)


@each(WRONG_LANES)
def test_wrong_lanes_are_refused(kind: str, numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        lanes(kind, *numbers)
