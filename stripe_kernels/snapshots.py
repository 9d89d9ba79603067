"""Packed weights of inference: a kernel's own form of a weight, kept while the weight stays as it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stripe_kernels.kept import Kept, capturing

_FORMS_KEPT = 64  # runners a weight's forms are kept for


@dataclass
class _Snapshot:
    """A weight's packed forms while it stays as it is."""

    weight: weakref.ref[Tensor]
    pointer: int
    version: int
    forms: dict[Any, Any] = field(default_factory=dict)  # by runner
    dropped: dict[Any, Any] = field(default_factory=dict)  # has an entry once `drop_snapshot` was called

    def holds(self, weight: Tensor) -> bool:
        return self.version == weight._version and self.pointer == weight.data_ptr()


# By id of the weight: a WeakTensorKeyDictionary takes 1.5 us, a fifth of a small convolution.
_snapshots: dict[int, _Snapshot] = {}


def packed_weight(runner: Any, weight: Tensor) -> Any:
    """The runner's form of a weight [A, C/groups], from a snapshot keyed by storage and version.

    Inference tensors have no version, a write to them would not be seen: they are packed on every call. A
    CUDA graph reads the form that was there before its capture, or packs the weight itself.
    """
    if weight.is_inference():
        return runner.pack(weight)
    found = _snapshots.get(id(weight))
    if found is None or found.weight() is not weight or not found.holds(weight):
        found = _Snapshot(weakref.ref(weight, _drop_dead(id(weight))), weight.data_ptr(), weight._version)
        _snapshots[id(weight)] = found
    packed = found.forms.get(runner)
    if packed is None:
        if capturing(weight.device):
            return runner.pack(weight)
        if len(found.forms) >= _FORMS_KEPT:
            found.forms.clear()
        form = (
            Kept(lambda: kept_form(runner, weight), weight.device)
            if weight.is_cuda
            else kept_form(runner, weight)
        )
        packed = found.forms[runner] = form
    return packed.value() if type(packed) is Kept else packed


def kept_form(runner: Any, weight: Tensor) -> Any:
    """The weight packed for many calls: some runners have a form that costs more to make than one call saves."""
    return getattr(runner, "pack_to_keep", runner.pack)(weight)


def kept_bias(runner: Any, bias: Tensor | None) -> Tensor | None:
    """The bias for many calls: some runners read another type than the layer's, and would convert it in every one."""
    wanted = getattr(runner, "bias_dtype", None)
    return bias if bias is None or wanted in (None, bias.dtype) else bias.detach().to(wanted)


def _drop_dead(key: int) -> Callable[[weakref.ref[Tensor]], None]:
    def drop(dead: weakref.ref[Tensor]) -> None:
        found = _snapshots.get(key)
        if found is not None and found.weight is dead:
            _snapshots.pop(key, None)

    return drop


def drop_snapshot(weight: Tensor) -> None:
    """Forgets packed copies of a weight that was changed behind torch's back (through .data)."""
    found = _snapshots.pop(id(weight), None)
    if found is not None:
        found.dropped[None] = None


def dropped(weight: Tensor) -> dict[Any, Any]:
    """A dict that gets an entry when the packed copies of now are dropped."""
    return _snapshots[id(weight)].dropped
