"""Measured choices as data: written beside a network, kept in the tune cache, given back to the planner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from stripe_kernels import plan
from stripe_kernels.geometry import ConvShape
from stripe_kernels.plan import Candidate
from stripe_kernels.registry import PASSES, Pass, Problem
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.stripe_op import StripeOp

Measured = tuple[Candidate, ...]


def operators(network: nn.Module) -> dict[str, StripeOp]:
    """The stripe operators of a network by module name."""
    named = network.named_modules()
    return {name: m._op for name, m in named if isinstance(getattr(m, "_op", None), StripeOp)}


def belongs(problem: Problem, op: StripeOp) -> bool:
    """Whether `op` can pose this problem: all but input size, dtype, device, layout and threads agrees."""
    s = problem.shape
    geometry = (s.stride, s.padding, s.dilation, s.groups)
    return problem.skeleton == op.skeleton and geometry == (op.stride, op.padding, op.dilation, op.groups)


def of_network(network: nn.Module) -> dict[str, Any]:
    """Every measured choice of this process that the network's layers use, by module name, as JSON."""
    entries: dict[str, Any] = {}
    for name, op in operators(network).items():
        mine = [key for key in plan.records() if belongs(key[0], op)]
        if mine:
            entries[name] = [entry(problem, which, plan.recorded(problem, which)) for problem, which in mine]
    return entries


def restore(entries: dict[str, Any], network: nn.Module) -> int:
    """Gives the planner what `of_network` wrote; returns how many. ValueError for malformed entries."""
    ops = operators(network)
    count = 0
    for name, listed in entries.items():
        op = ops[name]
        for written in listed:
            problem, which = problem_of(written, op)
            plan.record(problem, which, candidates_of(written["candidates"]))
            count += 1
        op.forget()
    return count


def entry(problem: Problem, which: Pass, measured: Iterable[Candidate]) -> dict[str, Any]:
    """A problem and its candidates' times. Whoever holds the skeleton keeps it; its digest is here."""
    return {
        "input": list(problem.shape.input_size),
        "skeleton": problem.skeleton.digest,
        "dtype": problem.dtype,
        "device": problem.device,
        "channels_last": problem.channels_last,
        "threads": problem.threads,
        "tf32": list(problem.tf32),
        "pass": which,
        "candidates": [[c.kernel, list(c.config), c.predicted, c.measured] for c in measured],
    }


def problem_of(written: dict[str, Any], op: StripeOp) -> tuple[Problem, Pass]:
    """The problem an entry was written for, posed to `op`; ValueError where they do not fit."""
    skeleton: FilterSkeleton = op.skeleton
    if written["skeleton"] != skeleton.digest or written["pass"] not in PASSES:
        raise ValueError(
            f"a tuned choice for skeleton {written['skeleton']} does not belong to {skeleton.digest}"
        )
    size = [int(v) for v in written["input"]]
    shape: ConvShape = op.shape(*size)
    conv, product = written.get("tf32", (False, False))
    problem = Problem(
        shape,
        skeleton,
        str(written["dtype"]),
        str(written["device"]),
        bool(written["channels_last"]),
        int(written["threads"]),
        (bool(conv), bool(product)),
    )
    return problem, cast(Pass, written["pass"])


def candidates_of(written: Iterable[Any]) -> Measured:
    """Candidates with positive finite times; the planner passes over kernels this machine lacks."""
    found = []
    for kernel, config, predicted, measured in written:
        if not 0 < float(measured) < float("inf"):
            raise ValueError(f"a measured time of {measured!r} s for {kernel!r}")
        guess = None if predicted is None else float(predicted)
        found.append(Candidate(str(kernel), tuple(int(v) for v in config), guess, float(measured)))
    return tuple(found)
