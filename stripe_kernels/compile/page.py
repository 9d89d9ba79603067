"""An explanation as one self-contained page: no script, no network, light or dark as the reader's system is.

Wide and narrow windows get the same elements: grids that wrap, bars in percent, pictures of at most their own width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from stripe_kernels.compile.drawing import Axis, Point, scatter, skeleton, taps
from stripe_kernels.compile.style import STYLE

if TYPE_CHECKING:
    from stripe_kernels.compile.explain import Explanation

_TIMES = {"predicted_ms": "predicted, ms", "measured_ms": "measured, ms", "dense_ms": "dense, ms"}
_HOW_TO_RUN = (
    "No accuracy is recorded for this network. Runs leave records: <code>iessp train digits --out runs/a</code>, "
    "then <code>iessp report runs/a</code>; or <code>iessp reproduce digits</code>, every method with several seeds, "
    "then <code>iessp report MODEL --runs runs/reproduce-digits</code>."
)


def render(
    explanation: Explanation,
    title: str,
    networks: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]] | None,
    remark: str,
) -> str:
    """The page; the arguments are those of `Explanation.html`."""
    e = explanation
    if e.rows:
        parts = [
            _head(e, title, networks, remark),
            _networks(networks),
            _skeletons(e),
            _layers(e),
            _roofline(e),
            _accuracy(runs),
        ]
        parts += [_decisions(e), _notes(e)]
    else:
        parts = [
            f"<h1>{escape(title)}</h1><p>No stripe layer runs in this network.</p>",
            _accuracy(runs),
            _notes(e),
        ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )


def _section(title: str, caption: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p class='caption'>{caption}</p>{body}</section>" if body else ""


def _head(e: Explanation, title: str, networks: Sequence[dict[str, Any]], remark: str) -> str:
    """What was looked at, and the figures that sum it up."""
    first, total = e.rows[0], e.total
    size = "×".join(map(str, e.input or first["input"]))
    live, stripes = (sum(row[key] for row in e.rows) for key in ("live", "stripes"))
    figures = [
        (
            f"{total['macs'] / total['dense_macs']:.1%}",
            "of the multiply-adds",
            f"{_millions(total['macs'])} of {_millions(total['dense_macs'])} M a call",
        ),
        (f"{live / stripes:.1%}", "of the stripes", f"{live:,} of {stripes:,}"),
    ]
    dense, ours = ([n["ms"] for n in networks if _is_dense(n) == kind] for kind in (True, False))
    if dense and ours:
        figures.append(_times("as fast, whole network", min(dense), min(ours), "the fastest of each"))
    elif total["measured_ms"] and total["dense_ms"]:
        figures.append(_times("as fast, sum of all layers", total["dense_ms"], total["measured_ms"], "dense"))
    shares = [
        (row["share_of_peak"], row["measured_ms"]) for row in e.rows if row["share_of_peak"] is not None
    ]
    if shares:
        mean = sum(s * t for s, t in shares) / sum(t for _, t in shares)
        trust = "mean of the layers, by time" if mean <= 1 else "the peak was measured while others computed"
        figures.append((f"{mean:.0%}", "of peak arithmetic", trust))
    cards = "".join(f"<div><b>{a}</b><span>{b}</span><small>{c}</small></div>" for a, b, c in figures)
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    line = f"input {size}, {first['dtype']}, {threads}, torch {torch.__version__}"
    line += f"<br>{escape(remark)}" if remark else ""
    return f"<header><h1>{escape(title)}</h1><p>{line}</p></header><div class='figures'>{cards}</div>"


def _times(what: str, dense: float, ours: float, of: str) -> tuple[str, str, str]:
    return f"{dense / ours:.2f}×", what, f"{_ms(ours)} for {_ms(dense)} ms, {of}"


def _is_dense(network: dict[str, Any]) -> bool:
    return bool(network["network"].startswith("dense"))


def _networks(networks: Sequence[dict[str, Any]]) -> str:
    """Whole networks: a bar a contestant."""
    longest = max((n["ms"] for n in networks), default=0.0)
    rows = "".join(
        f"<div class='pair'><span>{escape(n['network'])}</span><div>"
        + _bar(n["ms"] / longest, "dense" if _is_dense(n) else "stripes", f"{_ms(n['ms'])} ms", 6)
        + f"</div><small>{_ms(n['ms_low'])}–{_ms(n['ms_high'])}</small></div>"
        for n in networks
    )
    caption = "Time of one call, median and quartiles of interleaved runs, after the outputs were compared."
    return _section("Whole network", caption, rows)


def _skeletons(e: Explanation) -> str:
    """Those with something to see."""
    cut = [(row, live) for row, live in zip(e.rows, e.skeletons, strict=True) if row["live"] < row["stripes"]]
    cards = "".join(
        f"<figure>{skeleton(live)}<figcaption>{_name(row)}<small>{escape(_percent(row['density']))} "
        f"of {row['stripes']:,}</small></figcaption></figure>"
        for row, live in cut
    )
    caption = "A tile is a filter, a cell one of its taps; filled cells are stripes that live."
    if whole := len(e.rows) - len(cut):
        caption += f" Not drawn: {whole} layer{'s that keep' if whole > 1 else ' that keeps'} every stripe."
    return _section("Skeletons", caption, f"<div class='skeletons'>{cards}</div>" if cut else "")


def _percent(share: float) -> str:
    """Whole percents, in which a few live stripes are not none and a few dead ones not all."""
    return "<1%" if 0 < share < 0.01 else ">99%" if 0.99 < share < 1 else f"{share:.0%}"


def _layers(e: Explanation) -> str:
    """Density, taps and time, one line a layer; above them the taps of all layers of one filter size."""
    shown = [t for row in e.rows for t in (row["dense_ms"], row["measured_ms"] or row["predicted_ms"]) if t]
    longest, room = max(shown, default=0.0), 0.5 + 0.64 * max((len(f"{_ms(t)} ms") for t in shown), default=0)
    lines = []
    for row in e.rows:
        time = row["measured_ms"] or row["predicted_ms"]
        pairs = [("dense", row["dense_ms"]), ("stripes", time)]
        bars = "".join(_bar(t / longest, kind, f"{_ms(t)} ms", room) for kind, t in pairs if t and longest)
        ratio = f"{row['dense_ms'] / time:.1f}×" if row["dense_ms"] and time else ""
        lines.append(
            f"<div class='layer'><span>{_name(row)}</span>"
            f"<div>{_bar(row['density'], 'kept', escape(_percent(row['density'])), 3)}</div>"
            f"<div>{taps(row['taps'], 9)}</div><div class='times'>{bars}</div><b>{ratio}</b></div>"
        )
    lines += [_sum(part, longest) for part in ([*e.parts, e.total] if e.ordinary else [e.total])]
    heads = "".join(f"<span>{head}</span>" for head in ("", "stripes kept", "by tap", "time"))
    measured = [bool(row["measured_ms"]) for row in e.rows]
    how = (
        "measured"
        if all(measured)
        else "predicted where no kernel was measured"
        if any(measured)
        else "predicted"
    )
    caption = (
        f"Stripes kept, filters that keep each tap, and the time of a call: {_key('dense bars')}dense, "
        f"{_key('stripes bars')}stripes, {how}."
    )
    return _section(
        "Layers", caption, _all_taps(e) + f"<div class='layer head'>{heads}</div>{''.join(lines)}"
    )


def _sum(part: dict[str, Any], longest: float) -> str:
    """A line for layers taken together: multiply-adds and times, without bars, which would dwarf the layers'."""
    time, dense = part["measured_ms"] or part["predicted_ms"], part["dense_ms"]
    of = "" if part["macs"] == part["dense_macs"] else f" of {_millions(part['dense_macs'])}"
    macs = f"{_millions(part['macs'])}{of} M multiply-adds"
    words = (
        ""
        if not time
        else f"{_ms(time)} ms"
        if not dense or dense == time
        else f"{_ms(time)} for {_ms(dense)} ms"
    )
    ratio = f"{dense / time:.1f}×" if time and dense and time != dense else ""
    return (
        f"<div class='layer sum'><span class='name'>{escape(part['layer'])}</span><div>{macs}</div><div></div>"
        f"<div>{words}</div><b>{ratio}</b></div>"
    )


def _key(kind: str) -> str:
    return f"<i class='key {kind}'></i>"


def _all_taps(e: Explanation) -> str:
    """Percent of the filters that keep each tap, over all layers of one filter size; 1x1 has nothing to tell."""
    sums: dict[tuple[int, int], torch.Tensor] = {}
    filters: dict[tuple[int, int], int] = {}
    for live in e.skeletons:
        k, r, s = live.shape
        if r * s > 1:
            sums[r, s] = sums.get((r, s), torch.zeros(r, s)) + live.sum(0)
            filters[r, s] = filters.get((r, s), 0) + k
    figures = "".join(
        f"<figure>{taps((sums[r, s] / filters[r, s]).tolist(), 28, numbers=True)}"
        f"<figcaption>all {r}×{s} layers, %<small>{filters[r, s]:,} filters</small></figcaption></figure>"
        for r, s in sums
    )
    return f"<div class='skeletons'>{figures}</div>" if figures else ""


def _roofline(e: Explanation) -> str:
    """Rates against intensity, where a roof and measurements are there."""
    if e.roof is None or not all(row["measured_ms"] for row in e.rows):
        return ""
    pairs: list[list[Point]] = []
    by_share = sorted(e.rows, key=lambda row: row["share_of_peak"])
    told = {id(by_share[0]): "lowest", id(by_share[-1]): "highest"}
    for row in e.rows:
        pair = []
        for kind, macs, moved, t in (
            ("dense", row["dense_macs"], row["dense_bytes"], row["dense_ms"]),
            ("stripes", row["macs"], row["bytes"], row["measured_ms"]),
        ):
            if t and macs:
                rate = 2 * macs / t / 1e6
                note = f"{row['layer']}, {kind}: {rate:.3g} GFLOP/s"
                extreme = told.get(id(row)) if kind == "stripes" else None
                label = f"{extreme} {_of_peak(row)}" if extreme else ""
                pair.append(Point(2 * macs / moved, rate, kind, label, note))
        pairs.append(pair)
    points = [p for pair in pairs for p in pair]
    if not points:
        return ""
    x, y = Axis("FLOP a byte moved", log=True), Axis("GFLOP/s", log=True)
    low, high = x.span([p.x for p in points])
    flops, bandwidth = e.roof.flops / 1e9, e.roof.bandwidth / 1e9
    corners = sorted({low, min(max(flops / bandwidth, low), high), high})
    roof = [(v, min(flops, bandwidth * v)) for v in corners]
    links = [([(p.x, p.y) for p in pair], "link", "") for pair in pairs if len(pair) == 2]
    plot = scatter(points, x, y, [*links, (roof, "roof", f"roof {flops:.0f} GFLOP/s")], "roofline")
    most = max(1.0, *(row["share_of_peak"] for row in e.rows))
    shares = "".join(
        f"<div class='pair'><span>{escape(row['layer'])}</span><div class='peak' style='--peak:{1 / most:.4f}'>"
        f"{_bar(row['share_of_peak'] / most, 'kept', '', 0)}</div><small>{escape(_of_peak(row))}</small></div>"
        for row in e.rows
    )
    caption = (
        f"{_key('dense')}Dense and {_key('stripes')}stripes, one mark a layer, joined: useful arithmetic a second. "
        f"The roof is measured here: {escape(str(e.roof).partition(': ')[2])}. Operands that stay in a cache pass its "
        "slope."
    )
    title = "Share of peak arithmetic, stripes; the line is 100%"
    return _section("Roofline", caption, f"<div class='two'>{plot}<div><h3>{title}</h3>{shares}</div></div>")


def _of_peak(row: dict[str, Any]) -> str:
    share: float = row["share_of_peak"]
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _accuracy(runs: Sequence[dict[str, Any]] | None) -> str:
    """Accuracy against multiply-adds and against milliseconds, from records of runs."""
    if runs is None:
        return ""
    if not runs:
        return f"<section><h2>Accuracy</h2><p class='caption'>{_HOW_TO_RUN}</p></section>"
    plots, y = [], Axis("accuracy", percent=True)
    for key, x in (
        ("macs_kept", Axis("multiply-adds kept", percent=True)),
        ("ms", Axis("ms a call, batch 1")),
    ):
        points = [
            Point(
                run[key], run["accuracy"], "stripes" if run["mine"] else "other", run["name"],
                f"{run['name']}: {run['accuracy']:.2%}", run["spread"] or 0.0,
            )
            for run in runs
            if run[key] is not None
        ]  # fmt: skip
        if points:
            plots.append(scatter(points, x, y, name=f"accuracy against {x.title}"))
    timed = "" if any(run["ms"] is not None for run in runs) else " No run among them was timed."
    spread = " Lines are a standard deviation over seeds." if any(run["spread"] for run in runs) else ""
    mine = (
        f"{_key('stripes')}This network, {_key('dense')}others. " if any(run["mine"] for run in runs) else ""
    )
    caption = f"{mine}Test accuracy of {len(runs)} recorded runs or methods.{spread}{timed}"
    return _section("Accuracy", caption, f"<div class='two'>{''.join(plots)}</div>")


def _decisions(e: Explanation) -> str:
    """The plan, layer by layer, with everything that was in the race."""
    known = [key for key in _TIMES if any(row[key] for row in e.rows)]
    heads = ("layer", "kernel", *(_TIMES[key] for key in known), "why")
    body = []
    for row in e.rows:
        times = [_ms(row[key]) if row[key] else "–" for key in known]
        race = f"<details><summary>{escape(row['reason'])}</summary>{_race(row['candidates'])}</details>"
        cells = [escape(row["layer"]), f"<code>{escape(row['kernel'])}</code>", *times, race]
        body.append(f"<tr>{''.join(map(_cell, heads, cells))}</tr>")
    head = "".join(_cell(h, h, "th") for h in heads)
    table = f"<table class='plan'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return _section("Decisions", "Which kernel runs each layer; open a reason to see every candidate.", table)


def _cell(head: str, text: str, tag: str = "td") -> str:
    kind = " class='ms'" if head in _TIMES.values() else ""
    return f"<{tag}{kind} data-head='{head}'>{text}</{tag}>"


def _race(candidates: Iterable[dict[str, Any]]) -> str:
    lines = []
    for c in candidates:
        name = escape(f"{c['kernel']} {c['config'] or ''}".strip())
        what = escape(c["refusal"]) if c["refusal"] else f"{_ms(c['measured_ms'] or c['predicted_ms'])} ms"
        lines.append(
            f"<li><code>{name}</code> {what}{'' if c['measured_ms'] or c['refusal'] else ', predicted'}</li>"
        )
    return f"<ul>{''.join(lines)}</ul>"


def _notes(e: Explanation) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in e.summary)
    return _section(
        "Rewritten", "What was folded, removed or left as it was.", f"<ul>{lines}</ul>" if lines else ""
    )


def _name(row: dict[str, Any]) -> str:
    k, c, r, s = row["filter"]
    return f"<span class='name'>{escape(row['layer'])}</span> <small>{c}→{k}, {r}×{s}</small>"


def _bar(share: float, kind: str, label: str, room: float) -> str:
    """A thin bar of `share` of the width that `room` em for its label leave."""
    return f"<div class='bar {kind}' style='--share:{share:.4f};--room:{room:g}em'><i></i><span>{label}</span></div>"


def _ms(value: float) -> str:
    """Milliseconds with three digits."""
    return f"{value:#.3g}".rstrip(".")


def _millions(value: float) -> str:
    return f"{value / 1e6:,.1f}" if value >= 1e5 else f"{value / 1e6:.2g}"
