"""Network: a graph that runs as one flat list of calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves

from stripe_kernels import eager
from stripe_kernels.compile.program import Program, write_program
from stripe_kernels.compile.resident import Untranslatable, resident
from stripe_kernels.kept import capturing, hold_for_graphs
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.stripe_op import signature

_PROGRAMS_KEPT = 16  # input signatures a network remembers
_ABSENT = object()


class _Bound:
    """What a network made for its inputs since it last forgot."""

    def __init__(self) -> None:
        self.programs: dict[Any, Program] = {}
        self.front: Callable[..., Any] | None = None  # of the program called last


class Network(nn.Module):
    """An inference-only network; `body` is its torch.fx graph of torch's layers and FusedConv2d.

    The first call with a new input signature (sizes, strides, dtypes, threads) plans every layer for it and
    writes a flat program (program.py): native lists of kernels with their packed weights, and what torch
    computes between them. Where torch has to see the operators (compilation, export, modes, subclasses,
    gradients of the input) `body` runs as it is.

    Calls may come from several threads. Weights and hooks of layers are not meant to change: after writing to the one,
    or registering the other, call `forget()`. The first call of a signature runs the layers twice, and their hooks.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(False)
        self.report: list[str] = []
        self.resident_from: int | None = 16  # the batch from which activations stay in lanes; None: never
        self.inputs: list[tuple[tuple[int, ...], torch.dtype]] | None = None  # what it was made on
        self.lane_vectors = 1  # of images in a block that stays in lanes
        # By torch's number of threads, the largest first input, in values, that one of them is faster on: in layers of
        # 10 us a team's meetings, and maps that the other core wrote, take longer than it saves.
        self.alone_up_to: dict[int, int] = {}
        self._reset()
        self.training = False

    def _reset(self) -> None:
        self._bound = _Bound()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        # Through nn.Module's __call__ and `forward`, the way to the first kernel takes a tenth of a network's time.
        if not is_compiling():
            front = self._bound.front
            if front is not None and not named and self._forward_alone_runs():
                y = front(*inputs)
                if y is not NotImplemented:
                    return y
        return super().__call__(*inputs, **named)

    def _forward_alone_runs(self) -> bool:
        """Whether a call comes to the `forward` below and nothing else: no hook, no other `forward` or `__call__`."""
        return (
            not (self._forward_hooks or self._forward_pre_hooks)
            and self._compiled_call_impl is None
            and type(self).forward is _FORWARD
            and "forward" not in self.__dict__
            and nn.Module.__call__ is _CALL
            and forward_ad._current_level < 0
        )

    # The first input has a place of its own: torch.export's dynamic_shapes are then those of any one-input model.
    def forward(self, first: Any = _ABSENT, /, *others: Any, **named: Any) -> Any:
        """What the network it was made from returns, in evaluation mode."""
        inputs = () if first is _ABSENT else (first, *others)
        if named or not _runs_itself(inputs):
            return self.body(*inputs, **named)
        key = self._key(inputs)
        bound = self._bound  # where forget() puts another in its place, what comes later is not kept
        program = bound.programs.get(key)
        if program is None:
            program = self._bind(bound.programs, key, inputs)
        bound.front = program.front
        if inputs and capturing(inputs[0].device):
            hold_for_graphs(program)
        for kept in program.kept:  # this call may be of another stream than the one that packed the weights
            kept.value()
        # Since the last call the kernels have pushed all of this out of the caches: a step of Python is dear here.
        if not torch.is_grad_enabled():
            return program(*inputs)
        with torch.no_grad():
            return program(*inputs)

    @staticmethod
    def _key(inputs: tuple[Tensor, ...]) -> Any:
        return torch.get_num_threads(), *map(signature, inputs)

    def _bind(self, programs: dict[Any, Program], key: Any, inputs: tuple[Tensor, ...]) -> Program:
        with self._lock:
            program = programs.get(key)
            if program is None:
                if inputs and capturing(inputs[0].device):
                    raise RuntimeError(
                        "call an optimized network once on inputs of this size before capturing a CUDA graph"
                    )
                with torch.inference_mode():
                    program = self._resident(inputs) or write_program(
                        self.body, inputs, _conditions(), self.threads(inputs)
                    )
                if len(programs) >= _PROGRAMS_KEPT:
                    programs.pop(next(iter(programs)))
                programs[key] = program
            return program

    def threads(self, inputs: tuple[Tensor, ...]) -> int:
        """Threads that the kernels of a call use now."""
        threads = torch.get_num_threads()
        alone = bool(inputs) and inputs[0].numel() <= self.alone_up_to.get(threads, 0)
        return 1 if alone else threads

    def _resident(self, inputs: tuple[Tensor, ...]) -> Program | None:
        """The native program for batches that fill the lanes, where the graph has one; see resident.py."""
        if (
            self.resident_from is None
            or not inputs
            or inputs[0].dim() != 4
            or inputs[0].shape[0] < self.resident_from
        ):
            return None
        try:
            return resident(self.body, inputs, self.threads(inputs), self.lane_vectors)
        except (Untranslatable, ImportError) as reason:
            note = f"layer by layer at every batch size: {reason}"
            if note not in self.report:
                self.report.append(note)
            return None

    def forget(self) -> None:
        """Drops programs and packed weights: the next call plans and packs anew."""
        self.unbind()
        for module in self.modules():
            if isinstance(module, StripeConv2d):
                module.repack()
                module._op.forget()

    def unbind(self) -> None:
        """Drops programs: the next call plans anew, from the packed weights there are."""
        self._bound = _Bound()

    def memory(self, *inputs: Tensor) -> dict[str, int]:
        """Bytes a call on `inputs` needs, in a process that has made one.

        "weights": parameters and buffers as stored. "packed": the kernels' own copies of them, kept between
        calls. "activations": at their peak, outputs included, inputs not; every thread that calls at once has
        its own, and a network that is one native list keeps up to 4 MiB of them for the next call. What torch's
        operators use inside, and the scratch a kernel keeps for each thread (a few rows of a map), come on top.
        """
        with torch.inference_mode():
            self(*inputs)
        program = self._bound.programs.get(self._key(inputs))
        if program is None:
            raise ValueError("memory is known of plain tensors only: no subclasses, modes or autocast")
        stored = sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))
        packed = stored if program.packed is None else program.packed
        return {"weights": stored, "packed": packed, "activations": program.activations}

    def train(self, mode: bool = True) -> Network:
        if mode:
            raise RuntimeError("an optimized network only runs: train the model it was made from")
        self.forget()
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Network:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_bound", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("inputs", None)  # of networks pickled before they knew it
        self.__dict__.setdefault("alone_up_to", {})
        self._reset()


def report_of(model: nn.Module) -> list[str] | None:
    """What `optimize` did to a model, nothing for one it has not seen; None: its `report` is something of its own."""
    report: Any = getattr(model, "report", [])
    return report if isinstance(report, list) and all(isinstance(line, str) for line in report) else None


def as_arguments(example_input: Any) -> tuple[Any, ...]:
    """What a model is called with, of any kind."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def as_inputs(example_input: Any, nested: bool = False) -> tuple[Any, ...]:
    """What a network is called with; TypeError for what is neither a tensor nor a tuple of tensors.

    nested: a tuple's parts may be tuples, lists and dicts of tensors, as the states of recurrent layers are.
    """
    inputs = as_arguments(example_input)
    parts = tree_leaves(inputs) if nested and isinstance(example_input, tuple) else inputs
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        got = f"a tuple of ({kinds})" if isinstance(example_input, tuple) else kinds
        raise TypeError(f"example_input must be a tensor or a tuple of tensors, got {got}")
    return inputs


@contextmanager
def threads_of(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """torch's number of threads is the one that `model` uses on `inputs`, for a while."""
    before = torch.get_num_threads()
    threads = model.threads(inputs) if isinstance(model, Network) else before
    if threads == before:  # to set it is to change it: torch takes it for the user's wish
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_FORWARD, _CALL = Network.forward, nn.Module.__call__


def _runs_itself(inputs: tuple[Any, ...]) -> bool:
    """Whether only the kernels are needed: plain tensors; no gradient, autocast, mode or compiler."""
    if not (eager.nobody_listens() and eager.plain(*inputs)):
        return False
    grad = torch.is_grad_enabled()
    try:
        return not any((grad and x.requires_grad) or torch.is_autocast_enabled(x.device.type) for x in inputs)
    except AttributeError:  # of None, an optional tensor to `plain`: the layer that gets it says so
        return False


def _conditions() -> Any:
    """The same for a front, which asks from native code; Network.__call__ asks the rest."""
    return (
        eager.PLAIN_TYPES,
        (*eager.LISTENERS, torch._C._is_any_autocast_enabled),
        (Tensor.is_neg, Tensor.requires_grad.__get__),  # type: ignore[attr-defined]
        ((torch.get_num_threads, torch.get_num_threads()),),
        (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks),
    )
