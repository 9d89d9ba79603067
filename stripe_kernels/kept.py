"""Device memory that outlives the call that made it: index tables and packed weights.

On a GPU such a cache meets four things that a CPU does not have:

- **Private pools.** While torch.compile(mode="reduce-overhead") warms up, what its thread allocates belongs
  to the CUDA graph, which later hands the same memory out again. What is kept is therefore made by another
  thread, on a stream of its own.
- **Capture.** A table cannot be copied from the host inside a capture: RuntimeError says to call once before.
- **Streams.** A caller's stream waits once for the stream that made the memory, and the allocator is told of
  every stream that reads it.
- **Graphs.** A captured graph holds addresses. What was read in a capture stays until the process ends,
  whatever its owner forgets.

Reading costs two queries of the stream, and no synchronisation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_in_graphs: set[Any] = set()


def hold_for_graphs(owner: Any) -> None:
    """Keeps `owner`'s memory until the process ends: a captured CUDA graph has its addresses."""
    _in_graphs.add(owner)


class Kept:
    """What `make` returns, a tree of tensors on one device, made once. Not for use under capture: `make`
    may copy from the host. elsewhere: see the module; without, it is made by this thread on its current stream."""

    def __init__(self, make: Callable[[], Any], device: torch.device, elsewhere: bool = True) -> None:
        self.device = device
        self._streams: set[int] = set()
        self._value: Any
        self._ready: Any = None
        if device.type == "cuda" and elsewhere:
            self._value, self._ready = _made_elsewhere(make, device)
        else:
            self._value = make()
            if device.type == "cuda":
                self._ready = torch.cuda.current_stream(device).record_event()

    def value(self) -> Any:
        """The tensors, ready for the current stream."""
        if self._ready is not None:
            self._meet()
        return self._value

    def _meet(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if capturing(self.device):
            # torch waits for the device before it captures, so what was made before is there.
            hold_for_graphs(self)
        elif stream.cuda_stream not in self._streams:
            stream.wait_event(self._ready)
            for t in _tensors(self._value):
                t.record_stream(stream)
            self._streams.add(stream.cuda_stream)


def kept_here(tensors: Iterable[Tensor]) -> tuple[Kept, ...]:
    """What this thread has made, on current streams, for many calls: one for each GPU, none for the CPU. A call asks
    each for its `value()` before it reads. Not for what torch.compile's warm-up makes: that is the graph's memory."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.device.type == "cuda":
            by_device.setdefault(t.device, []).append(t)
    return tuple(Kept(partial(list, here), device, elsewhere=False) for device, here in by_device.items())


def _made_elsewhere(make: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """What `make` returns in a thread and a stream of its own, behind the caller's work, and an event after
    it."""
    caller = torch.cuda.current_stream(device)
    found: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(caller)
            with torch.cuda.stream(stream), torch.no_grad():
                value = make()
                found.extend((value, stream.record_event()))
        except BaseException as error:  # noqa: BLE001 -- raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, name="stripe_kernels.kept")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    value, ready = found
    return value, ready


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)
