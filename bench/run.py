"""One comparison: every contestant made ready, its output checked, then all timed against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

import stripe_kernels
from bench.contestants import Contestant, stripe_layer
from bench.job import Entrant, Job, Refused
from bench.machine import OtherWork
from bench.records import Row, timing_fields
from bench.timing import Ratio, interleave
from stripe_kernels import Roof


def compare(
    base: Row,
    prepare: Mapping[str, Callable[[], Entrant]],
    kinds: Mapping[str, str],
    seconds: float,
    describe: Callable[[Entrant, float], dict[str, Any]],
) -> tuple[list[Row], dict[str, Entrant]]:
    """Rows of all contestants, in order, and the entrants that passed; `base` has the fields all share.

    A contestant that cannot run or fails its check has a row that says so, and is not timed.
    describe(entrant, seconds) gives the fields that depend on the work.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Entrant] = {}
    for name, make in prepare.items():
        row = replace(base, contestant=name, kind=kinds[name])
        try:
            entrant = make()
        except Refused as reason:
            rows[name] = replace(row, status=f"refused: {reason}")
            continue
        failure = entrant.check()
        if failure:
            rows[name] = replace(row, status=f"wrong: {failure}")
        else:
            rows[name], ready[name] = row, entrant
    other = OtherWork()
    samples = interleave({name: e.call for name, e in ready.items()}, seconds, torch.get_num_threads() > 1)
    others = other.cores()
    dense = [name for name, e in ready.items() if e.kind == "dense"]
    if samples:
        over = min(dense or samples, key=lambda name: samples[name].median)
        for name, sample in samples.items():
            timed = timing_fields(sample, Ratio.of(samples[over], sample), over, others)
            rows[name] = replace(rows[name], **timed, **describe(ready[name], sample.median))
    return list(rows.values()), ready


def run_layer(
    job: Job, contestants: Mapping[str, Contestant], roof: Roof, seconds: float, tuned: bool
) -> list[Row]:
    """Every contestant's row for one layer; `tuned` adds the kernel that stripe_kernels.tune keeps, last."""
    torch.set_num_threads(job.threads)
    base = Row(
        job.layer.name, job.which, job.batch, round(job.live.density, 5), job.source,
        len(job.live.dead_filters), str(job.dtype)[6:], job.threads, "", "",
    )  # fmt: skip

    def describe(entrant: Entrant, time: float) -> dict[str, Any]:
        own = entrant.kind == "stripe"
        return {
            "macs": entrant.macs,
            "gflops": 2 * entrant.macs / time / 1e9,
            "share_of_peak": roof.share_of_peak(entrant.macs, time),
            "share_of_copy": roof.share_of_copy(job.bytes, time) if own else None,
        }

    prepare = {name: partial(make, job) for name, make in contestants.items()}
    later = {"tuned": partial(_tuned, job, contestants["auto"])} if tuned else {}
    return in_two_stages(base, prepare, later, seconds, describe)


def in_two_stages(
    base: Row,
    prepare: Mapping[str, Callable[[], Entrant]],
    later: Mapping[str, Callable[[], Entrant]],
    seconds: float,
    describe: Callable[[Entrant, float], dict[str, Any]],
) -> list[Row]:
    """Rows of all contestants. Those of `later` tune, which changes what "auto" means in this process: they
    meet the fastest dense contestant and the fastest slim one once more, after all the others have been timed. The
    slim one's row is then the one of that meeting: the two are compared where they took turns."""
    kinds = {name: kind_of(name) for name in (*prepare, *later)}
    rows, ready = compare(base, prepare, kinds, seconds, describe)
    over = next((row.over for row in rows if row.over), None)
    if later and over is not None:
        slim = [row for row in rows if row.kind == "slim" and row.seconds is not None]
        again = [over, *[row.contestant for row in sorted(slim, key=lambda row: row.seconds or 0.0)[:1]]]
        met = compare(
            base, {**{n: partial(ready.__getitem__, n) for n in again}, **later}, kinds, seconds / 2, describe
        )
        rows = [row for row in rows if row.contestant not in again[1:]] + met[0][1:]
    return rows


def kind_of(name: str) -> str:
    """A contestant's kind from its name, for those that never became ready."""
    first = name.split()[0]
    return {"slim": "slim", "paper": "paper"}.get(first) or (
        "dense" if first in ("eager", "compile", "onnxruntime", "openvino") else "stripe"
    )


def _tuned(job: Job, auto: Contestant) -> Entrant:
    if job.which != "fprop":
        raise Refused("tune measures inference")
    with TemporaryDirectory() as folder:  # the user's cache stays as it is
        stripe_kernels.tune(stripe_layer(job, "auto"), job.operands.x, folder=folder)
    return auto(job)


def missing(rows: Iterable[Row]) -> dict[str, str]:
    """Contestants that never ran, with the reason: contestant -> status of its first row."""
    rows = list(rows)
    ran = {row.contestant for row in rows if row.seconds is not None}
    return {row.contestant: row.status for row in reversed(rows) if row.contestant not in ran}
