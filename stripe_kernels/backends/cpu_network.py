"""A whole network on activations that stay in batch lanes (csrc/cpu/lane_network.h): Python's side of building one.

Not a kernel of the registry: compile/resident.py builds it from a graph and competes with the layer-by-layer program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stripe_kernels.backends.cpu import _ACTIVATIONS, _cpu, native_layer
from stripe_kernels.geometry import ConvShape
from stripe_kernels.skeleton import FilterSkeleton

_POOLS = {"max": 0, "average": 1, "average_padded": 2}  # torch's default average counts the padding


@dataclass
class Activation:
    """Where an activation lies: its number in the native network, sizes, and place in the arena (floats)."""

    number: int
    c: int
    h: int
    w: int
    offset: int


class Arena:
    """First fit over the lifetimes of a network's activations; offsets and sizes in floats."""

    def __init__(self) -> None:
        self._free = [(0, 1 << 62)]
        self.most = 0  # floats ever in use

    def take(self, size: int) -> int:
        size = -(-size // 16) * 16
        for i, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[i : i + 1] = [(offset + size, room - size)] if room > size else []
                self.most = max(self.most, offset + size)
                return offset
        raise MemoryError(f"no room for {size} floats")

    def give(self, offset: int, size: int) -> None:
        size = -(-size // 16) * 16
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged


class LaneNetwork:
    """Layers added in the order they run; `run` takes x [N, C, H, W] float32 of any N and any memory format.

    A block of images, `vectors` of them (64 images at most), passes through all layers together.
    """

    def __init__(self, threads: int, vectors: int = 1) -> None:
        isa = _cpu.isas()[0]
        self.images = vectors * _cpu.lanes(isa)
        self.threads = threads
        self._native = _cpu.LaneNetwork(self.images, threads, isa)
        self._arena = Arena()
        self._floats: dict[int, int] = {}

    def activation(self, c: int, h: int, w: int) -> Activation:
        """Room for C x H x W, until `release`."""
        size = c * self._native.channel_floats(h, w)
        offset = self._arena.take(size)
        self._floats[offset] = size
        return Activation(self._native.add_activation(c, h, w, offset), c, h, w, offset)

    def channels(self, whole: Activation, first: int, count: int) -> Activation:
        """Channels [first, first + count) of an activation, under a number of their own."""
        h, w = whole.h, whole.w
        offset = whole.offset + first * self._native.channel_floats(h, w)
        return Activation(self._native.add_activation(count, h, w, offset), count, h, w, offset)

    def release(self, a: Activation) -> None:
        """Whoever comes next may use this room."""
        self._arena.give(a.offset, self._floats.pop(a.offset))

    def conv(
        self, skeleton: FilterSkeleton, shape: ConvShape, weight: Tensor, bias: Tensor | None, activation: str,
        x: Activation, residual: Activation | None, y: Activation,
    ) -> None:  # fmt: skip
        """y = activation(conv(x) + bias + residual); weight [A, C/groups] and bias [K] float32 are copied."""
        weight = weight.detach().contiguous()
        shift = None if bias is None else bias.detach().contiguous()
        self._native.add_conv(
            *native_layer(skeleton, shape), weight.data_ptr(), 0, 0 if shift is None else shift.data_ptr(),
            _ACTIVATIONS[activation], x.number, -1 if residual is None else residual.number, y.number,
        )  # fmt: skip

    def pool(
        self, kind: str, window: tuple[int, int, int, int, int, int], x: Activation, y: Activation
    ) -> None:
        """kind is "max", "average" or "average_padded"; window is kernel, stride, padding, each (height, width)."""
        self._native.add_pool(_POOLS[kind], list(window), x.number, y.number)

    def pointwise(
        self, activation: str, x: Activation, residual: Activation | None, y: Activation,
        scale: Tensor | None = None, shift: Tensor | None = None,
    ) -> None:  # fmt: skip
        """y = activation(x * scale[c] + shift[c] + residual)."""
        pointers = [0 if t is None else t.data_ptr() for t in (scale, shift)]
        self._native.add_pointwise(
            *pointers,
            _ACTIVATIONS[activation],
            x.number,
            -1 if residual is None else residual.number,
            y.number,
        )

    @property
    def bytes_per_thread(self) -> int:
        """Memory of one thread's activations."""
        return int(self._native.bytes_per_thread)

    def run(self, x: Tensor, source: Activation, target: Activation) -> Tensor:
        """[N, C, H, W] -> [N, target.c, target.h, target.w], contiguous."""
        y = torch.empty(x.shape[0], target.c, target.h, target.w)
        self._native.run(
            self.threads,
            x.data_ptr(),
            0,
            x.stride(),
            x.shape[0],
            source.number,
            y.data_ptr(),
            0,
            y.stride(),
            target.number,
        )
        return y
