"""Tables for people: one line a comparison, one column a contestant."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import QUIET
from bench.records import Row, best

_SHORT = {"contiguous": "nchw", "channels_last": "nhwc", "eager": "", "onnxruntime": "ORT", "openvino": "OV"}
LEGEND = """\
auto ×: time of the fastest dense contestant / time of auto, paired median, 95 % interval; ×·d: share of 1/d.
peak, copy: auto's share of the two roofs, multiply-adds inside the image. ~: other processes disturbed it.
Columns to the right: times faster than the same dense contestant. kernel: the fastest by name. slim: whole
channels removed, equal MACs. paper: 1x1 convolution and shifted adds. nchw, nhwc: torch eager.
Green or red: the interval lies above or below 1."""


def console() -> Console:
    """Wide where nobody looks, so that files hold whole lines."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=180)


def short(name: str) -> str:
    """A contestant's name for a narrow column: "eager channels_last" -> "nhwc"."""
    return " ".join(filter(None, (_SHORT.get(word, word) for word in name.split())))


def _groups(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _times(row: Row | None) -> str:
    """The speed-up, coloured by what its interval says; of a contestant without one, why."""
    if row is None:
        return ""
    if row.speedup is None:
        return row.status.split(":")[0]
    colour = "green" if (row.speedup_low or 0) > 1 else "red" if (row.speedup_high or 0) < 1 else "yellow"
    return f"[{colour}]{row.speedup:.2f}[/]"


def _with_interval(row: Row) -> str:
    interval = "" if row.speedup is None else f" [dim]{row.speedup_low:.2f}-{row.speedup_high:.2f}[/]"
    return _times(row) + interval


def _mark(row: Row) -> str:
    return "~" if (row.others or 0.0) > QUIET else ""


def _table(title: str, columns: Iterable[str], left: Iterable[str]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _columns(rows: list[Row]) -> dict[str, Row | None]:
    """The columns to the right: the best of each family, and every dense contestant."""
    by_name = {row.contestant: row for row in rows}
    kernels = [r for r in rows if r.kind == "stripe" and r.contestant.split()[0] not in ("auto", "tuned")]
    compiled = [row for name, row in by_name.items() if name.startswith("compile")]
    dense = {short(r.contestant): r for r in rows if r.kind == "dense" and r not in compiled}
    return {
        "tuned": by_name.get("tuned"),
        "auto nhwc": by_name.get("auto channels_last"),
        "kernel": best(kernels, "stripe"),
        "slim": best(rows, "slim"),
        "paper": by_name.get("paper"),
        **dense,
        "compile": best(compiled, "dense"),
    }


def layer_tables(rows: list[Row]) -> list[Table]:
    """A table for each pass, dtype and number of threads."""
    return [_layers(group) for group in _groups(rows, lambda r: (r.which, r.dtype, r.threads))]


def _layers(rows: list[Row]) -> Table:
    jobs = [(job, _columns(job)) for job in _groups(rows, lambda r: r.job)]
    extra = [name for name in jobs[0][1] if any(c.get(name) and c[name].seconds for _, c in jobs)]  # type: ignore[union-attr]
    one = rows[0]
    title = f"{one.which}, {one.dtype}, {one.threads} thread{'s' if one.threads > 1 else ''}"
    first = ("layer", "N", "d", "dense ms", "by", "auto ms", "auto × (95 %)", "×·d", "peak", "copy")
    table = _table(title, (*first, *extra), ("layer", "by"))
    before = None
    for job, columns in jobs:
        auto, base = next(row for row in job if row.contestant == "auto"), best(job, "dense")
        if before not in (None, (auto.what, auto.batch)):
            table.add_section()
        before = auto.what, auto.batch
        table.add_row(
            auto.what + ("" if auto.source == "iid" else f" {auto.source}"),
            str(auto.batch),
            f"{auto.density:.2f}",
            _ms(base.seconds) if base else "",
            short(base.contestant) if base else "",
            _mark(auto) + _ms(auto.seconds),
            _with_interval(auto),
            f"{auto.speedup * auto.density:.2f}" if auto.speedup else "",
            f"{auto.share_of_peak:.0%}" if auto.share_of_peak else "",
            f"{auto.share_of_copy:.0%}" if auto.share_of_copy else "",
            *(_times(columns[name]) + _variant(name, columns[name]) for name in extra),
        )
    return table


def _variant(column: str, row: Row | None) -> str:
    """Which kernel is the fastest: "cpu_batch_avx512" -> " batch"."""
    if column != "kernel" or row is None:
        return ""
    parts = row.contestant.split("_")
    return f" [dim]{parts[1] if len(parts) > 1 else parts[0]}[/]"


def network_table(rows: list[Row]) -> Table:
    """Networks: every contestant on a line of its own, fastest first."""
    columns = (
        "network",
        "N",
        "threads",
        "MACs kept",
        "contestant",
        "ms",
        "quartiles",
        "n",
        "× (95 %)",
        "×·kept",
    )
    table = _table("Whole networks", columns, ("network", "contestant"))
    for job in _groups(rows, lambda r: r.job):
        one = job[0]
        head = [
            f"{one.what} {one.which}, {one.source}",
            str(one.batch),
            str(one.threads),
            f"{one.density:.4f}",
        ]
        for row in sorted((row for row in job if row.seconds), key=lambda row: row.seconds or 0.0):
            stripe = row.kind == "stripe"
            table.add_row(
                *head,
                f"[bold]{row.contestant}[/]" if stripe else row.contestant,
                _mark(row) + _ms(row.seconds),
                f"{_ms(row.low_quartile)}-{_ms(row.high_quartile)}",
                str(row.n),
                _with_interval(row),
                f"{(row.speedup or 0.0) * row.density:.2f}" if stripe else "",
            )
            head = [""] * 4
        table.add_section()
    return table
