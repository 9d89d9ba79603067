"""explain: what every layer of a network costs, which kernel runs it, and why; as text, as data, as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stripe_kernels.compile import ordinary, page
from stripe_kernels.compile.network import Network, as_inputs, report_of, threads_of
from stripe_kernels.compile.tune import Site, sites
from stripe_kernels.plan import PREDICTED_MARGIN, Candidate, Plan
from stripe_kernels.roof import Roof

_COLUMNS = {
    "layer": ("layer", "{}"),
    "input": ("input", "{}"),
    "filter": ("filter", "{}"),
    "density": ("density", "{:.3f}"),
    "macs": ("MACs", "{:,}"),
    "dense_macs": ("of dense", "{:,}"),
    "kernel": ("kernel", "{}"),
    "predicted_ms": ("predicted ms", "{:.3f}"),
    "measured_ms": ("measured ms", "{:.3f}"),
    "dense_ms": ("dense ms", "{:.3f}"),
    "share_of_peak": ("of peak", "{:.0%}"),
    "next": ("next best", "{}"),
}
_TIMES = ("predicted_ms", "measured_ms", "dense_ms")
_HOW_TO_TIME = (
    "no measured total: ordinary layers are timed by explain(..., seconds=1), iessp explain --measure"
)
_NAMES_SHOWN = 6  # in a note that holds for many layers


@dataclass(frozen=True)
class Explanation:
    """One row a stripe layer, in the order they run, the network's other layers, and what `optimize` did to it.

    rows hold: layer, input [N, C, H, W], filter [K, C/groups, R, S], stride, dtype, threads, live (stripes) of
    stripes, density, taps ([R][S], the share of filters that keep each), macs, dense_macs, bytes, dense_bytes (every
    tensor moved once), kernel, config, predicted_ms, measured_ms, dense_ms (None where nothing was measured; dense
    is predicted where it was not measured), share_of_peak (of the roof's arithmetic, live stripes alone counted; None
    without a roof or a measurement), reason (of the choice), next (the best other kernel and its time over the
    chosen one's), epilogue, candidates (dicts of kernel, config, predicted_ms, measured_ms, refusal).
    ordinary holds layer, kind ("convolution" or "linear layer"), input, filter, macs, dense_macs, predicted_ms (None of
    1-D, 3-D and transposed convolutions), measured_ms, dense_ms of the convolutions and linear layers that are torch's
    own.
    """

    rows: list[dict[str, Any]]
    notes: list[str]
    skeletons: list[Tensor] = field(repr=False)  # bool [K, R, S], one a row
    roof: Roof | None = None
    ordinary: list[dict[str, Any]] = field(default_factory=list)
    input: list[int] = field(default_factory=list)  # size of what the network was called with

    def __str__(self) -> str:
        columns = [c for c in _COLUMNS if c != "share_of_peak" or self.roof is not None]
        titles = [_COLUMNS[c][0] for c in columns]
        sums = [*(self.parts if self.ordinary else []), self.total]
        cells = [titles, *(cells_of(row, columns) for row in [*self.rows, *sums])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        words = ("layer", "input", "filter", "kernel", "next")
        aligned = [str.ljust if c in words else str.rjust for c in columns]
        lines = ["  ".join(f(c, w) for f, c, w in zip(aligned, line, widths, strict=True)) for line in cells]
        if not self.rows:
            lines = ["no stripe layer runs in this network", *(lines if self.ordinary else [])]
        roof = [] if self.roof is None else [str(self.roof)]
        untimed = all(r["measured_ms"] for r in self.rows) and any(
            not r["measured_ms"] for r in self.ordinary
        )
        hint = [_HOW_TO_TIME] if self.rows and untimed else []
        return "\n".join([*map(str.rstrip, lines), *hint, *roof, *self.summary])

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Sums as of `total`, of the stripe layers, the ordinary convolutions and the linear layers; `layer` names
        what is summed up."""
        groups = [
            ("stripe layer", self.rows),
            *(
                (name, [r for r in self.ordinary if r["kind"] == kind])
                for name, kind in (("ordinary convolution", "convolution"), ("linear layer", "linear layer"))
            ),
        ]
        return [
            {**_sum(rows), "layer": f"{len(rows)} {name}{'s' if len(rows) > 1 else ''}"}
            for name, rows in groups
            if rows
        ]

    @property
    def total(self) -> dict[str, Any]:
        """The network's macs, dense_macs, and times where every layer has them; of dense's, measured and predicted
        ones are not added up."""
        return {**_sum([*self.rows, *self.ordinary]), "layer": "total"}

    @property
    def macs_kept(self) -> float | None:
        """Share of the convolutions' multiply-adds that live stripes keep, which is what a budget is about."""
        found = [*self.rows, *(row for row in self.ordinary if row["kind"] == "convolution")]
        return sum(r["macs"] for r in found) / sum(r["dense_macs"] for r in found) if found else None

    @property
    def summary(self) -> list[str]:
        """The notes, "NAME: WHAT" with one WHAT gathered on one line."""
        gathered: dict[str, list[str]] = {}
        for note in self.notes:
            name, separator, what = note.partition(": ")
            known = separator and " " not in name
            gathered.setdefault(what if known else note, []).extend([name] if known else [])
        lines = []
        for what, names in gathered.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            lines.append(f"{', '.join(names[:_NAMES_SHOWN])}{more}: {what}" if names else what)
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Everything but the skeletons, ready for JSON."""
        roof = None if self.roof is None else self.roof.as_dict()
        shown = ("layer", "macs", "dense_macs", *_TIMES)
        parts, total = (
            [{key: row[key] for key in shown} for row in rows] for rows in (self.parts, [self.total])
        )
        return {
            "input": self.input,
            "layers": self.rows,
            "ordinary": self.ordinary,
            "parts": parts,
            "total": total[0],
            "macs_kept": self.macs_kept,
            "notes": self.notes,
            "roof": roof,
        }

    def html(
        self,
        title: str = "Stripe layers",
        networks: Sequence[dict[str, Any]] = (),
        runs: Sequence[dict[str, Any]] | None = None,
        remark: str = "",
    ) -> str:
        """One self-contained page, light or dark as the reader's system: no script, nothing from a network.

        networks: timings of whole networks, dicts of network, batch, ms, ms_low, ms_high (quartiles).
        runs: points of accuracy, dicts of name, accuracy (0..1), spread (or None), macs_kept (0..1), ms (or
        None), mine (whether it is the network shown). None leaves the section out, () says how to get some.
        remark: on the conditions, below the title.
        """
        return page.render(self, title, networks, runs, remark)

    def _repr_html_(self) -> str:
        frame = "width:100%;height:40em;border:0"
        return f"<iframe style='{frame}' srcdoc='{html.escape(self.html())}'></iframe>"


def explain(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    roof: Roof | None = None,
    seconds: float = 0.0,
) -> Explanation:
    """Prints a table of the model's stripe layers as they run on `example_input`, and returns it.

    Times are the planner's predictions, and measurements where `tune` or `optimize` made some. roof:
    `Roof.probe(dtype, threads)`, to state times as shares of it. Ordinary convolutions and linear layers are summed
    up, and part of the total; seconds: time spent on measuring them, which nothing else does.
    """
    inputs = as_inputs(example_input, nested=True)
    with threads_of(model, inputs):
        found = sites(model, inputs)
    inside = "body." if isinstance(model, Network) else ""
    rows = [_row(site, site.name.removeprefix(inside), roof) for site in found]
    others = ordinary.rows(model, inputs, seconds)
    for row in others:
        row["layer"] = row["layer"].removeprefix(inside)
    notes = list(report_of(model) or [])
    skeletons = [torch.from_numpy(site.op.skeleton.live.copy()) for site in found]
    explanation = Explanation(rows, notes, skeletons, roof, others, list(tree_leaves(inputs)[0].shape))
    print(explanation)
    return explanation


def _sum(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = dict.fromkeys(_COLUMNS)
    for name in ("macs", "dense_macs", *_TIMES):
        values = [row.get(name) for row in rows]
        sums[name] = sum(values) if values and None not in values else None
    if len({row["measured_ms"] is None for row in rows}) > 1:
        sums["dense_ms"] = None
    return sums


def _row(site: Site, name: str, roof: Roof | None) -> dict[str, Any]:
    plan: Plan = site.op.plan("fprop", site.problem)
    shape, skeleton, chosen = site.problem.shape, site.op.skeleton, plan.chosen
    dense = next((c for c in plan.candidates if c.kernel == "dense"), None)
    macs, dense_macs = shape.macs(skeleton.stripes), shape.macs(shape.K * shape.taps)
    moved, dense_moved = _moved(site, skeleton.stripes), _moved(site, shape.K * shape.taps)
    following = _next(plan)
    return {
        "layer": name,
        "input": list(shape.input_size),
        "filter": [shape.K, shape.group_c, shape.R, shape.S],
        "stride": list(shape.stride),
        "dtype": site.problem.dtype,
        "threads": site.problem.threads,
        "live": skeleton.stripes,
        "stripes": shape.K * shape.taps,
        "density": skeleton.density,
        "taps": skeleton.live.mean(0).tolist(),
        "macs": macs,
        "dense_macs": dense_macs,
        "bytes": moved,
        "dense_bytes": dense_moved,
        "kernel": chosen.kernel,
        "config": list(chosen.config),
        "predicted_ms": _ms(chosen.predicted),
        "measured_ms": _ms(chosen.measured),
        "dense_ms": None if dense is None else _ms(dense.measured or dense.predicted),
        "share_of_peak": roof.share_of_peak(macs, chosen.measured) if roof and chosen.measured else None,
        "reason": _reason(site, plan, following),
        "next": None if following is None else f"{following[0].kernel} {following[1]:.1f}x",
        "epilogue": site.epilogue,
        "candidates": [_candidate(c) for c in plan.candidates],
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _moved(site: Site, stripes: int) -> int:
    """Bytes of one call that moves each of its tensors once."""
    shape = site.problem.shape
    maps = [shape.input_size, shape.output_size, *([] if site.residual is None else [shape.output_size])]
    values = sum(n * c * h * w for n, c, h, w in maps) + stripes * shape.group_c
    return values * site.x.element_size()


def _next(plan: Plan) -> tuple[Candidate, float] | None:
    """The best candidate of another kernel, and its time over the chosen one's; both measured, or both predicted."""
    measured = plan.chosen.measured is not None

    def seconds(c: Candidate) -> float | None:
        return c.measured if measured else c.predicted

    own = seconds(plan.chosen)
    others = [c for c in plan.candidates if c.kernel != plan.chosen.kernel and seconds(c)]
    if not others or not own:
        return None
    best = min(others, key=lambda c: seconds(c) or 0.0)
    return best, (seconds(best) or 0.0) / own


def _reason(site: Site, plan: Plan, following: tuple[Candidate, float] | None) -> str:
    if site.op.kernel != "auto":
        return "named by the caller"
    measured = [c for c in plan.candidates if c.measured]
    runnable = [c for c in plan.candidates if c.refusal is None]
    how = f"fastest of {len(measured)} measured" if measured else f"fastest of {len(runnable)} by prediction"
    if following is None:
        return how if len(runnable) > 1 else "nothing else runs here"
    if not measured and plan.chosen.kernel == "dense" and following[1] < 1:
        gain = f"{following[0].kernel} by a prediction of {following[1]:.2f} times as long, short of {PREDICTED_MARGIN}"
        return f"dense, which nothing beats by enough to trust predictions: {gain}"
    return f"{how}; {following[0].kernel} takes {following[1]:.1f} times as long"


def _candidate(c: Candidate) -> dict[str, Any]:
    return {
        "kernel": c.kernel,
        "config": list(c.config),
        "predicted_ms": _ms(c.predicted),
        "measured_ms": _ms(c.measured),
        "refusal": c.refusal,
    }


def cells_of(row: dict[str, Any], columns: Sequence[str] = tuple(_COLUMNS)) -> list[str]:
    """A row as text, an empty cell for what is not known."""
    values = {name: row[name] for name in columns}
    for name in ("input", "filter"):
        values[name] = None if row[name] is None else "x".join(map(str, row[name]))
    return ["" if v is None else _COLUMNS[name][1].format(v) for name, v in values.items()]
