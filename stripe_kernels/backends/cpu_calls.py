"""Consecutive calls of a network made as one (csrc/cpu/call_list.h): Python's side of building a list.

compile/program.py hands over what follows each other in a graph; between the calls no Python runs, and what nobody
outside reads lies in one arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stripe_kernels.backends.cpu import (
    _ACTIVATIONS,
    _DTYPES,
    CpuDgrad,
    CpuFprop,
    CpuWgrad,
    _cpu,
    _float,
    _WeightRunner,
)
from stripe_kernels.backends.cpu_network import Arena

if not hasattr(_cpu.CallList, "add_pack"):
    raise ImportError("the extension stripe_kernels._cpu is older than this code; run: pip install -e .")


# torch's C interface to its tensors (2.13 has it); without it Python reads their addresses, which takes longer.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if not _cpu.usable_exchange(_EXCHANGE):
    _EXCHANGE = None
# Up to so many bytes the arena of a whole network waits for the next call: to map it takes a good part of a short one.
_ARENA_KEPT = 4 << 20

# Types of the inputs; functions that return something false; functions of an input that do; functions and what they
# return; dicts without an entry.
Conditions = tuple[
    tuple[type, ...],
    tuple[Callable[[], Any], ...],
    tuple[Callable[[Tensor], Any], ...],
    tuple[tuple[Callable[[], Any], Any], ...],
    tuple[dict[Any, Any], ...],
]


class CallList:
    """Calls added in the order they run. Tensors are named by the numbers `arena`, `given` and `returned` hand out."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._native = _cpu.CallList()
        self._arena = Arena()
        self._taken: dict[int, tuple[int, int]] = {}  # number -> offset and size in floats
        self._held: list[Tensor] = []  # packed weights and biases: the native list has their addresses
        self._parameters: list[Tensor] = []  # read at each run; their slots come after those of the outputs
        self._slots = 0
        self._inputs: list[Tensor] = []
        self._returned: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []

    @staticmethod
    def takes(runner: Any) -> bool:
        """Whether a kernel's runner can be called from here."""
        return isinstance(runner, (CpuFprop, CpuDgrad, CpuWgrad))

    @property
    def arena_bytes(self) -> int:
        """Memory of everything between the calls."""
        return int(4 * self._arena.most)

    def arena(self, t: Tensor) -> int:
        """Room for a dense tensor like `t`, until `release`."""
        size = -(-t.numel() * t.element_size() // 4)
        offset = self._arena.take(size)
        number = int(self._native.add_arena(_code(t), _strides(t), 4 * offset))
        self._taken[number] = offset, size
        return number

    def planes(self, t: Tensor, pitch: int) -> int:
        """Room like `arena`'s for a float32 map whose rows lie `pitch` values apart, as `plane_pitch` asks for."""
        sizes = (*t.shape, pitch)
        size = int(self._native.planes_floats(sizes))
        offset = self._arena.take(size)
        number = int(self._native.add_planes(sizes, 4 * offset))
        self._taken[number] = offset, size
        return number

    @staticmethod
    def plane_pitch(runner: CpuFprop) -> int | None:
        """The pitch of planes that a kernel reads where they lie; 0: it packs them. None: rather not planes."""
        return int(runner.native.plane_pitch) if isinstance(runner.native, _cpu.Fprop) else None

    def release(self, number: int) -> None:
        """Whoever comes next may use this tensor's room; nothing happens for one that is not in the arena."""
        if number in self._taken:
            self._arena.give(*self._taken.pop(number))

    def given(self, t: Tensor) -> int:
        """The next input, always laid out as `t`. Inputs come before the outputs of `returned`."""
        self._inputs.append(t)
        return self._slot(t)

    def returned(self, t: Tensor) -> int:
        """The next output, a new dense tensor like `t` in every run."""
        self._returned.append((tuple(t.shape), t.stride(), t.dtype))
        return self._slot(t)

    def fprop(
        self, runner: CpuFprop, packed: Tensor, bias: Tensor | None, activation: str,
        x: int, residual: int | None, y: int,
    ) -> None:  # fmt: skip
        """y = activation(conv(x) + bias + residual), where a bias of float32 is read at each run."""
        bias = _float(bias)
        self._held += [t for t in (packed, bias) if t is not None]
        self._native.add_fprop(
            runner.native, packed.data_ptr(), 0, 0 if bias is None else bias.data_ptr(), _ACTIVATIONS[activation],
            x, -1 if residual is None else residual, y,
        )  # fmt: skip

    def pack(self, runner: _WeightRunner, weight: int) -> int:
        """The runner's own form of a contiguous weight, which may be another one in each run."""
        packed = self.arena(torch.empty_strided(*runner.packed_layout, dtype=torch.float32, device="meta"))
        self._native.add_pack(runner.native, weight, packed)
        return packed

    def packed_fprop(self, runner: CpuFprop, packed: int, bias: int | None, x: int) -> None:
        """Returns conv(x) + bias, both read at each run; a bias is float32."""
        y = self._output(runner)
        self._native.add_packed_fprop(runner.native, packed, -1 if bias is None else bias, x, y)

    def dgrad(self, runner: CpuDgrad, packed: int, dy: int) -> None:
        """Returns dx."""
        self._native.add_dgrad(runner.native, packed, dy, self._output(runner))

    def wgrad(self, runner: CpuWgrad, x: int, dy: int) -> None:
        """Returns dw."""
        self._native.add_wgrad(runner.native, x, dy, self._output(runner))

    def max_pool(
        self, window: tuple[int, ...], x_size: tuple[int, ...], y_size: tuple[int, ...], x: int, y: int
    ) -> None:
        """window is kernel, stride, padding, each (height, width); both tensors float32."""
        self._native.add_max_pool(window, x_size, y_size, x, y)

    def average(self, size: tuple[int, ...], x: int, y: int) -> None:
        """y [N, C, 1, 1] or [N, C] = the mean over the pixels of x, of [N, C, H, W] float32 with dense rows."""
        self._native.add_average(size, x, y)

    def flatten(self, size: tuple[int, ...], x: int, y: int) -> None:
        """y [N, C*H*W] of x, of [N, C, H, W] float32 with dense rows."""
        self._native.add_flatten(size, x, y)

    def linear(self, weight: Tensor, bias: Tensor | None, images: int, x: int, y: int) -> None:
        """y [N, K] = x [N, C] weight^T + bias [K]; contiguous float32, read where they lie at each run."""
        outputs, features = weight.shape
        at = self._parameter(weight), -1 if bias is None else self._parameter(bias)
        self._native.add_linear(*at, (images, features, outputs), x, y)

    def finish(self, keep: bool = False) -> Callable[..., Sequence[Tensor]]:
        """A function of the inputs that returns the outputs; inputs laid out other than `given` said raise ValueError.
        keep: a small arena waits for the next call."""
        if _EXCHANGE is None:
            return self._called_from_python()
        outputs = [partial(torch.empty_strided, *sizes, dtype=dtype) for *sizes, dtype in self._returned]
        arena = partial(torch.empty, self.arena_bytes, dtype=torch.uint8)
        tensors = tuple(self._inputs), tuple(outputs), tuple(self._parameters), arena
        run: Callable[..., Sequence[Tensor]] = _cpu.list_function(
            self._native,
            self._held,
            Tensor,
            _EXCHANGE,
            self.threads,
            *tensors,
            keep and self.arena_bytes <= _ARENA_KEPT,
        )
        return run

    def _called_from_python(self) -> Callable[..., list[Tensor]]:
        native, threads, layouts, size = self._native, self.threads, self._returned, self.arena_bytes
        held, parameters = self._held, self._parameters
        expected = [(t.shape, t.stride(), t.dtype) for t in self._inputs]

        def run(*inputs: Tensor, held: list[Tensor] = held) -> list[Tensor]:
            if [(t.shape, t.stride(), t.dtype) for t in inputs] != expected:
                raise ValueError("an input is laid out other than when the list was made")
            outputs = [torch.empty_strided(*sizes, dtype=dtype) for *sizes, dtype in layouts]
            arena = torch.empty(size, dtype=torch.uint8)
            native.run(threads, arena.data_ptr(), [t.data_ptr() for t in (*inputs, *outputs, *parameters)])
            return outputs

        return run

    def _parameter(self, t: Tensor) -> int:
        """A slot for memory that may move, as into another process's reach; `data` put elsewhere is not followed."""
        self._parameters.append(t.detach())
        return self._slot(t)

    def _output(self, runner: CpuFprop | CpuDgrad | CpuWgrad) -> int:
        return self.returned(torch.empty_strided(*runner.output, dtype=runner.dtype, device="meta"))

    def _slot(self, t: Tensor) -> int:
        self._slots += 1
        return int(self._native.add_slot(_code(t), _strides(t), self._slots - 1))


def guard(
    function: Callable[..., Any], rest: tuple[Any, ...], conditions: Conditions,
    inputs: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...],
) -> Callable[..., Any] | None:  # fmt: skip
    """A function of inputs and parameters: function(*inputs, *rest), or what it is a tuple of, where the conditions
    hold, the inputs are laid out as these and the parameters are as they are now, else NotImplemented. None without
    torch's interface."""
    if _EXCHANGE is None:
        return None
    guard: Callable[..., Any] = _cpu.guard(function, rest, conditions, Tensor, _EXCHANGE, inputs, parameters)
    return guard


def _code(t: Tensor) -> int:
    return _DTYPES[str(t.dtype)[6:]]


def _strides(t: Tensor) -> tuple[int, ...]:
    if t.dim() not in (1, 2, 4):
        raise ValueError(f"a tensor is [N, C, H, W], [N, C] or [K], got {list(t.shape)}")
    return (*t.stride(), 1, 1, 1)[:4]
