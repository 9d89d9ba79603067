"""What is kept on a GPU between calls, against a stand-in for torch's streams: no GPU is needed, and none is
simulated beyond the calls that torch would get."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stripe_kernels import kept
from stripe_kernels.indices import IndexArrays
from stripe_kernels.kept import Kept

GPU = torch.device("cuda", 0)


class Stream:
    """Notes what it is asked to wait for."""

    def __init__(self, log: list[Any], name: int) -> None:
        self.log, self.cuda_stream = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("waits for stream", self.cuda_stream, other.cuda_stream))

    def wait_event(self, event: Any) -> None:
        self.log.append(("waits for event", self.cuda_stream, event))

    def record_event(self) -> str:
        return f"event of {self.cuda_stream}"


class Memory:
    """A tensor, as far as its memory's owner is asked."""

    def __init__(self, log: list[Any], device: torch.device = GPU) -> None:
        self.log, self.device = log, device

    def record_stream(self, stream: Stream) -> None:
        self.log.append(("read by", stream.cuda_stream))


class FakeCuda:
    """The part of torch.cuda that kept.py uses. Streams a test may set: current is of the calling thread."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.local = threading.local()
        self.capture = False
        self.made = 100

    def use(self, name: int) -> None:
        self.local.stream = Stream(self.log, name)

    def current_stream(self, device: Any) -> Stream:
        return self.local.stream

    def Stream(self, device: Any) -> Stream:
        self.made += 1
        return Stream(self.log, self.made)

    @contextmanager
    def stream(self, stream: Stream):
        self.local.stream = stream
        yield

    @contextmanager
    def device(self, device: Any):
        yield

    def current_device(self) -> int:
        return 0

    def is_current_stream_capturing(self) -> bool:
        return self.capture


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch):
    fake = FakeCuda()
    fake.use(7)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(kept, "_tensors", lambda tree: iter(tree if isinstance(tree, list) else [tree]))
    monkeypatch.setattr(kept, "_in_graphs", set())
    return fake


def made(cuda: FakeCuda) -> tuple[Kept, SimpleNamespace]:
    seen = SimpleNamespace(thread=None, stream=None)

    def make() -> Memory:
        seen.thread, seen.stream = threading.get_ident(), cuda.current_stream(GPU).cuda_stream
        return Memory(cuda.log)

    return Kept(make, GPU), seen


def test_memory_is_made_by_another_thread_and_stream_behind_the_callers_work(cuda) -> None:
    _, seen = made(cuda)
    assert seen.thread != threading.get_ident()
    assert seen.stream == 101
    assert cuda.log == [("waits for stream", 101, 7)]


def test_every_stream_waits_once_and_is_known_to_the_allocator(cuda) -> None:
    memory, _ = made(cuda)
    cuda.log.clear()
    memory.value()
    memory.value()
    cuda.use(8)
    memory.value()
    assert cuda.log == [
        ("waits for event", 7, "event of 101"), ("read by", 7),
        ("waits for event", 8, "event of 101"), ("read by", 8),
    ]  # fmt: skip


def test_what_a_caller_made_is_met_by_the_streams_of_later_calls(cuda) -> None:
    """A network's converted biases and packed weights: freed while another stream reads them, they would be handed out
    again."""
    other = torch.device("cuda", 1)
    made = [Memory(cuda.log), Memory(cuda.log, other), Memory(cuda.log), Memory([], torch.device("cpu"))]
    first, second = kept.kept_here(made)  # type: ignore[arg-type]
    assert (first.device, second.device) == (GPU, other)
    assert cuda.log == []
    cuda.use(8)
    for _ in range(2):
        assert first.value() == [made[0], made[2]]
        assert second.value() == [made[1]]
    assert cuda.log == [
        ("waits for event", 8, "event of 7"), ("read by", 8), ("read by", 8),
        ("waits for event", 8, "event of 7"), ("read by", 8),
    ]  # fmt: skip


def test_what_a_graph_captured_outlives_its_owner(cuda) -> None:
    memory, _ = made(cuda)
    cuda.log.clear()
    cuda.capture = True
    memory.value()
    assert cuda.log == [], "a capture may not wait for what lies outside it"
    assert memory in kept._in_graphs
    cuda.capture = False
    memory.value()
    assert cuda.log == [("waits for event", 7, "event of 101"), ("read by", 7)]


def test_a_capture_without_a_call_before_says_what_to_do(cuda) -> None:
    cuda.capture = True
    with pytest.raises(RuntimeError, match="call the layer once"):
        IndexArrays(rows=np.arange(3)).on(GPU)


def test_what_goes_wrong_in_the_thread_is_raised_here(cuda) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Kept(fail, GPU)


def test_other_devices_have_no_streams() -> None:
    arrays = IndexArrays(rows=np.arange(3, dtype=np.int32))
    first = arrays.on(torch.device("cpu"))
    assert first["rows"].tolist() == [0, 1, 2]
    assert arrays.on(torch.device("cpu")) is first
    assert Kept(lambda: 5, torch.device("cpu")).value() == 5
