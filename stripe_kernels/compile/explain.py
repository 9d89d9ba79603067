"""explain: what every layer of a network costs, which kernel runs it, and why."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stripe_kernels.compile.tune import Site, sites
from stripe_kernels.plan import Candidate, Plan

_COLUMNS = {
    "layer": ("layer", "{}"),
    "input": ("input", "{}"),
    "filter": ("filter", "{}"),
    "density": ("density", "{:.3f}"),
    "macs": ("MACs", "{:,}"),
    "dense_macs": ("of dense", "{:,}"),
    "kernel": ("kernel", "{}"),
    "predicted": ("predicted ms", "{:.3f}"),
    "measured": ("measured ms", "{:.3f}"),
    "dense": ("dense ms", "{:.3f}"),
}
_HEAD = (
    "<!doctype html><meta charset='utf-8'><title>stripe_kernels</title><style>body{font:13px sans-serif}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:2px 6px;text-align:right}</style>"
)
_SECONDS = ("predicted", "measured", "dense")


@dataclass(frozen=True)
class Explanation:
    """One row a stripe layer, in the order they run, and what `optimize` did to the network.

    rows hold: layer, input [N, C, H, W], filter [K, C/groups, R, S], stride, dtype, threads, live (stripes),
    density, macs, dense_macs, kernel, config, predicted, measured, dense (seconds; None where nothing was
    measured; dense is predicted where it was not measured), epilogue, candidates (dicts of kernel, config,
    predicted, measured, refusal).
    """

    rows: list[dict[str, Any]]
    notes: list[str]
    skeletons: list[Tensor] = field(repr=False)  # bool [K, R, S], one a row

    def __str__(self) -> str:
        cells = [[title for title, _ in _COLUMNS.values()], *map(_cells, self.rows), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        left = [str.ljust] * 3 + [str.rjust] * (len(widths) - 3)
        lines = ("  ".join(f(c, w) for f, c, w in zip(left, line, widths, strict=True)) for line in cells)
        return "\n".join([*map(str.rstrip, lines), *self.notes])

    @property
    def total(self) -> dict[str, Any]:
        """The rows' sums: macs, dense_macs, and times where every row has them."""
        sums: dict[str, Any] = dict.fromkeys(_COLUMNS)
        sums["layer"] = "total"
        for name in ("macs", "dense_macs", *_SECONDS):
            values = [row[name] for row in self.rows]
            sums[name] = sum(values) if values and None not in values else None
        return sums

    def html(self) -> str:
        """The table as a page of its own; every skeleton drawn as the share of filters that keep each tap."""
        titles = [*(title for title, _ in _COLUMNS.values()), "taps", "candidates"]
        lines = ["".join(f"<th>{html.escape(title)}</th>" for title in titles)]
        for row, skeleton in zip(self.rows, self.skeletons, strict=True):
            cells = [*map(html.escape, _cells(row)), _drawing(skeleton), _race(row)]
            lines.append("".join(f"<td>{cell}</td>" for cell in cells))
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"{_HEAD}<table>{table}</table><ul>{notes}</ul>"

    def _repr_html_(self) -> str:
        return self.html()


def explain(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> Explanation:
    """Prints a table of the model's stripe layers as they run on `example_input`, and returns it.

    Times are the planner's predictions, and measurements where `tune` or `optimize` made some; explain
    measures nothing. Ordinary convolutions are not listed: in an optimized network every convolution is a
    stripe layer.
    """
    found = sites(model, example_input)
    rows = [_row(site) for site in found]
    report = getattr(model, "report", [])
    explanation = Explanation(
        rows, list(report), [torch.from_numpy(site.op.skeleton.live.copy()) for site in found]
    )
    print(explanation)
    return explanation


def _row(site: Site) -> dict[str, Any]:
    plan: Plan = site.op.plan("fprop", site.problem)
    shape, skeleton, chosen = site.problem.shape, site.op.skeleton, plan.chosen
    dense = next((c for c in plan.candidates if c.kernel == "dense"), None)
    return {
        "layer": site.name,
        "input": list(shape.input_size),
        "filter": [shape.K, shape.group_c, shape.R, shape.S],
        "stride": list(shape.stride),
        "dtype": site.problem.dtype,
        "threads": site.problem.threads,
        "live": skeleton.stripes,
        "density": skeleton.density,
        "macs": shape.macs(skeleton.stripes),
        "dense_macs": shape.macs(shape.K * shape.taps),
        "kernel": chosen.kernel,
        "config": list(chosen.config),
        "predicted": chosen.predicted,
        "measured": chosen.measured,
        "dense": None if dense is None else dense.measured or dense.predicted,
        "epilogue": site.epilogue,
        "candidates": [_candidate(c) for c in plan.candidates],
    }


def _candidate(c: Candidate) -> dict[str, Any]:
    return {
        "kernel": c.kernel,
        "config": list(c.config),
        "predicted": c.predicted,
        "measured": c.measured,
        "refusal": c.refusal,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """A row as text; times in milliseconds, an empty cell for what is not known."""
    values = {name: row[name] for name in _COLUMNS}
    for name in _SECONDS:
        values[name] = None if row[name] is None else row[name] * 1e3
    for name in ("input", "filter"):
        values[name] = None if row[name] is None else "x".join(map(str, row[name]))
    return ["" if v is None else _COLUMNS[name][1].format(v) for name, v in values.items()]


def _drawing(skeleton: Tensor) -> str:
    """A square a tap, darker the more filters keep it."""
    share = skeleton.float().mean(0)
    squares = "".join(
        f"<rect x='{8 * s}' y='{8 * r}' width='7' height='7' fill='rgb({v},{v},{v})'/>"
        for r, line in enumerate(share.tolist())
        for s, v in enumerate(round(235 * (1 - x)) for x in line)
    )
    rows, columns = share.shape
    return f"<svg width='{8 * columns}' height='{8 * rows}'>{squares}</svg>"


def _race(row: dict[str, Any]) -> str:
    """Every candidate and its time, or why it did not run."""
    lines = []
    for c in row["candidates"]:
        name = html.escape(f"{c['kernel']} {c['config'] or ''}".strip())
        seconds = c["measured"] or c["predicted"]
        what = html.escape(c["refusal"]) if c["refusal"] else f"{seconds * 1e3:.3f} ms"
        lines.append(f"{name}: {what}{'' if c['measured'] or c['refusal'] else ' (predicted)'}")
    summary = f"<summary>{len(lines)}</summary>"
    return f"<details>{summary}{'<br>'.join(lines)}</details>"
