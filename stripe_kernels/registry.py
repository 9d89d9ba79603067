"""What kernels exist. One `register` line makes a kernel selectable, tested and benchmarked.

A kernel covers the passes "fprop", "dgrad" and "wgrad" of one family and states, torch-free, whether it takes a problem
(`refuse` gives the reason it does not), in which configurations, and how long each should take.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stripe_kernels.geometry import ConvShape
from stripe_kernels.skeleton import FilterSkeleton

Pass = Literal["fprop", "dgrad", "wgrad"]
PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")
Config = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Everything a plan depends on. `dtype` is torch's name without the prefix, `device` a device type. `tf32`
    says whether float32 may be rounded to it on a GPU: in convolutions, in matrix products (torch has a switch
    for each)."""

    shape: ConvShape
    skeleton: FilterSkeleton
    dtype: str
    device: str
    channels_last: bool
    threads: int
    tf32: tuple[bool, bool] = (False, False)

    def wrong_in_torch(self) -> str | None:
        """Why kernels that call torch's convolution refuse: found by generated problems, its dw, with AMX its y, holds
        garbage there, and where no column meets the image it crashes; in float16 the latter, with AVX512-FP16."""
        if self.device == "cpu" and self.dtype in ("bfloat16", "float16") and self.shape.idle_column():
            return f"torch's {self.dtype} convolution is wrong where a stride keeps a filter's column off the image"
        return None


@dataclass(frozen=True)
class Kernel:
    """`candidates(problem, which)` maps each configuration to its predicted seconds; `build(problem, which, config)`
    gives the runner. `automatic` kernels take part in kernel="auto"; all can be forced by name."""

    name: str
    refuse: Callable[[Problem, Pass], str | None]
    candidates: Callable[[Problem, Pass], Mapping[Config, float]]
    build: Callable[[Problem, Pass, Config], Any]
    automatic: bool = True


_kernels: dict[str, Kernel] = {}
_missing: dict[str, str] = {}
_parts: dict[str, Any] = {}


def register(kernel: Kernel) -> None:
    """Adds a kernel; a second one of the same name is an error."""
    if kernel.name in _kernels:
        raise ValueError(f"kernel {kernel.name!r} is registered twice")
    _kernels[kernel.name] = kernel


def withdraw(name: str) -> None:
    """Takes a kernel back, or one pass of it ("cuda_wgmma:wgrad"): it exists no more in this process."""
    kernel, _, lost = name.partition(":")
    if not lost:
        _kernels.pop(kernel, None)
    elif kernel in _kernels:
        whole = _kernels[kernel]

        def refuse(problem: Problem, which: Pass) -> str | None:
            return f"its {lost} was withdrawn" if which == lost else whole.refuse(problem, which)

        _kernels[kernel] = replace(whole, refuse=refuse)


def register_missing(backend: str, reason: str) -> None:
    """Remembers why a backend's kernels are not there, for messages."""
    _missing[backend] = reason


def provide(part: str, implementation: Any) -> None:
    """Offers a piece of one backend to the others, which may not import it, under a name such as "gather"."""
    if part in _parts:
        raise ValueError(f"part {part!r} is provided twice")
    _parts[part] = implementation


def provided(part: str) -> Any | None:
    """What was provided under that name, or None."""
    return _parts.get(part)


def kernels() -> dict[str, Kernel]:
    """All registered kernels by name."""
    return dict(_kernels)


def missing() -> dict[str, str]:
    """Backends that could not be loaded, with the reason."""
    return dict(_missing)


def find(name: str) -> Kernel:
    """The kernel of that name; ValueError names the nearest ones and what could not be loaded."""
    if name in _kernels:
        return _kernels[name]
    near = difflib.get_close_matches(name, _kernels, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(_kernels))}"
    absent = "".join(f"; {backend} is missing: {reason}" for backend, reason in _missing.items())
    raise ValueError(f"no kernel {name!r}; {hint}{absent}")
