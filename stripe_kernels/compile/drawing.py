"""Pictures of the page as inline SVG: skeletons, taps, scatter plots. Colours are classes; page.py has the inks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from torch import Tensor

_SKELETON = 184  # pixels a skeleton is wide at most, while a tap has one
_WIDTH, _HEIGHT = 380, 300  # of a scatter plot, in units of its view box
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 38
_LETTER = 5.9  # width of a label's letter


def skeleton(live: Tensor) -> str:
    """bool [K, R, S] -> every filter a tile of taps, live ones inked; whole pixels a tap, so that nothing blurs."""
    k, r, s = live.shape
    columns = max(1, math.ceil(math.sqrt(k * (r + 1) / (s + 1))))
    wider = range(columns, min(2 * columns, _SKELETON // (2 * (s + 1))) + 1)
    columns = next((n for n in wider if k % n == 0), columns)  # whole rows look better than a square
    rows = math.ceil(k / columns)
    width, height = columns * (s + 1) - 1, rows * (r + 1) - 1
    tiles = np.zeros((rows * columns, r + 1, s + 1), bool)
    tiles[:k, :r, :s] = live.numpy()
    mosaic = tiles.reshape(rows, columns, r + 1, s + 1).swapaxes(1, 2).reshape(rows * (r + 1), -1)
    ink = "".join(f"M{x} {y}.5h{n}" for y, line in enumerate(mosaic) for x, n in _stretches(line))
    last = k - (rows - 1) * columns  # tiles of the last row
    whole = f"M0 0h{width + 1}v{(rows - 1) * (r + 1)}h-{width + 1}z" if rows > 1 else ""
    ground = f"{whole}M0 {(rows - 1) * (r + 1)}h{last * (s + 1)}v{r + 1}h-{last * (s + 1)}z"
    scale = max(1, min(5, _SKELETON // width))
    name = f"tile-{r}-{s}"
    return (
        f"<svg class='skeleton' width='{width * scale}' height='{height * scale}' viewBox='0 0 {width} {height}' "
        f"role='img' aria-label='{int(live.sum())} of {live.numel()} stripes live'>"
        f"<defs><pattern id='{name}' width='{s + 1}' height='{r + 1}' patternUnits='userSpaceOnUse'>"
        f"<rect class='dead' width='{s}' height='{r}'/></pattern></defs>"
        f"<path d='{ground}' fill='url(#{name})'/><path class='live' d='{ink}'/></svg>"
    )


def _stretches(line: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, length) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(np.int8)))
    return ((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def taps(share: Sequence[Sequence[float]], size: int, numbers: bool = False) -> str:
    """[R][S] shares -> a square a tap that is filled to its share; with `numbers` the percentage below it."""
    step, line = size + 2, size + (16 if numbers else 2)
    parts = []
    for r, row in enumerate(share):
        for s, value in enumerate(row):
            x, y, side = s * step, r * line, size * math.sqrt(value)
            at = (size - side) / 2
            parts.append(
                f"<rect class='dead' x='{x}' y='{y}' width='{size}' height='{size}'/>"
                f"<rect class='live' x='{x + at:.2f}' y='{y + at:.2f}' width='{side:.2f}' height='{side:.2f}'>"
                f"<title>tap {r}, {s}: {value:.1%}</title></rect>"
            )
            if numbers:
                parts.append(f"<text x='{x + size / 2}' y='{y + size + 11}'>{100 * value:.0f}</text>")
    width, height = len(share[0]) * step - 2, len(share) * line
    label = f"{len(share)}x{len(share[0])} taps"
    return (
        f"<svg class='taps' width='{width}' height='{height}' viewBox='0 0 {width} {height}' role='img' "
        f"aria-label='{label}'>{''.join(parts)}</svg>"
    )


@dataclass(frozen=True)
class Axis:
    """A title, and how values along it are scaled and written."""

    title: str
    log: bool = False
    percent: bool = False

    def span(self, values: Sequence[float]) -> tuple[float, float]:
        """Limits with some air around the values."""
        low, high = min(values), max(values)
        if self.log:
            return low / 1.6, high * 1.6
        air = 0.12 * ((high - low) or abs(high) or 1.0)
        return max(0.0, low - air) if low >= 0 else low - air, high + air

    def ticks(self, low: float, high: float) -> list[float]:
        """Round numbers within the limits, about five."""
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found: list[float] = []
            for parts in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
                if len(found) < 3:
                    found = [p * 10.0**d for d in decades for p in parts if low <= p * 10.0**d <= high]
            return found
        rough = (high - low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first = math.ceil(low / step)
        return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]

    def text(self, value: float) -> str:
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"


@dataclass(frozen=True)
class Point:
    """kind is the class of its mark: "stripes", "dense" or "other"; spread a length along y to either side."""

    x: float
    y: float
    kind: str
    label: str = ""
    note: str = ""
    spread: float = 0.0


Line = tuple[Sequence[tuple[float, float]], str, str]  # its corners, its class, its label


def scatter(points: Sequence[Point], x: Axis, y: Axis, lines: Sequence[Line] = (), name: str = "") -> str:
    """Marks labelled where there is room, lines under them. Lines stretch the limits of y only."""
    low_x, high_x = x.span([p.x for p in points])
    corners = [c for line, _, _ in lines for c in line if low_x <= c[0] <= high_x]
    reach = [v for p in points for v in (p.y - p.spread, p.y + p.spread)] + [c[1] for c in corners]
    low_y, high_y = y.span(reach)

    def px(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _share(value, low_x, high_x, x.log)

    def py(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _share(value, low_y, high_y, y.log)

    out = [
        _frame(
            x, y, [(v, px(v)) for v in x.ticks(low_x, high_x)], [(v, py(v)) for v in y.ticks(low_y, high_y)]
        )
    ]
    taken = [(px(p.x) - 4, py(p.y) - 4, px(p.x) + 4, py(p.y) + 4) for p in points]
    drawn = [([(px(a), py(b)) for a, b in line], kind, text) for line, kind, text in lines]
    inked = [box for line, _, _ in drawn for box in _along(line)]
    for line, kind, _ in drawn:
        shown = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
        out.append(f"<polyline class='line {kind}' points='{shown}'/>")
    tags = [_name(text, line, taken, inked) for line, _, text in drawn if text]
    for p in points:
        at = f"cx='{px(p.x):.1f}' cy='{py(p.y):.1f}'"
        if p.spread:
            ends = f"y1='{py(p.y - p.spread):.1f}' y2='{py(p.y + p.spread):.1f}'"
            out.append(f"<line class='spread' x1='{px(p.x):.1f}' x2='{px(p.x):.1f}' {ends}/>")
        out.append(
            f"<circle class='mark {p.kind}' {at} r='3.4'><title>{escape(p.note or p.label)}</title></circle>"
        )
        tags += [_label(p, px(p.x), py(p.y), taken, inked)] if p.label else []
    out += tags  # above all marks and lines
    return (
        f"<svg class='plot' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(name)}'>"
        f"{''.join(out)}</svg>"
    )


def _share(value: float, low: float, high: float, log: bool) -> float:
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _frame(x: Axis, y: Axis, at_x: list[tuple[float, float]], at_y: list[tuple[float, float]]) -> str:
    """Faint lines at the ticks, their numbers, the titles."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f"<line class='grid' x1='{_LEFT}' x2='{right}' y1='{p:.1f}' y2='{p:.1f}'/>" for _, p in at_y]
    parts += [
        f"<text text-anchor='end' x='{_LEFT - 6}' y='{p + 3.5:.1f}'>{y.text(v)}</text>" for v, p in at_y
    ]
    parts += [f"<line class='grid' x1='{p:.1f}' x2='{p:.1f}' y1='{_TOP}' y2='{bottom}'/>" for _, p in at_x]
    parts += [f"<text text-anchor='middle' x='{p:.1f}' y='{bottom + 14}'>{x.text(v)}</text>" for v, p in at_x]
    parts.append(
        f"<text class='title' text-anchor='end' x='{right}' y='{_HEIGHT - 5}'>{escape(x.title)}</text>"
    )
    parts.append(f"<text class='title' x='{_LEFT + 4}' y='{_TOP + 10}'>{escape(y.title)}</text>")
    return "".join(parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _along(line: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """Small boxes that cover a polyline."""
    for (x, y), (u, v) in pairwise(line):
        steps = max(1, math.ceil(math.hypot(u - x, v - y) / 3))
        for i in range(steps + 1):
            a, b = x + (u - x) * i / steps, y + (v - y) * i / steps
            yield (a - 1, b - 1, a + 1, b + 1)


def _name(text: str, line: Sequence[tuple[float, float]], taken: list[Box], inked: list[Box]) -> str:
    """The name of a line along its level last segment, as far to the right as it stays free of marks and other lines;
    else to the left of what rises to there."""
    (start, _), (end, y) = line[-2:]
    width = _LETTER * len(text)
    places = [
        (end - 4 - back, y + dy) for back in range(0, max(1, int(end - start - width)), 12) for dy in (-5, 13)
    ]
    rising = [(right - 5, top + 3) for _, top, right, _ in [*_along(line[:-1])][::-4]]
    places += [(a, b) for a, b in rising if a - width >= _LEFT and b >= _TOP + 24]
    boxes = [(a - width, b - 9, a, b + 2) for a, b in places]
    return _first_free(text, [(a, b, "end") for a, b in places], boxes, taken, inked, always=True)


def _label(p: Point, x: float, y: float, taken: list[Box], inked: list[Box]) -> str:
    """The label beside, above or below its mark, at the first place that is free; nothing where none is."""
    width = _LETTER * len(p.label)
    places, boxes = [], []
    for dx, dy, anchor in ((7, 3.5, "start"), (-7, 3.5, "end"), (0, -8, "middle"), (0, 15, "middle")):
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + dy - 9, left + width, y + dy + 2)
        if box[0] >= _LEFT and box[2] <= _WIDTH - 2 and box[1] >= _TOP + 12 and box[3] <= _HEIGHT - _BOTTOM:
            places.append((x + dx, y + dy, anchor))
            boxes.append(box)
    others = [box for box in taken if box[:2] != (x - 4, y - 4)]
    return _first_free(p.label, places, boxes, taken, inked, others)


def _first_free(
    text: str,
    places: Sequence[tuple[float, float, str]],
    boxes: Sequence[Box],
    taken: list[Box],
    inked: list[Box],
    others: list[Box] | None = None,
    always: bool = False,
) -> str:
    """The text at the first place whose box meets no mark, label or line; else none of the first two; else nothing,
    or, with `always`, the first place. Its box is added to `taken`."""
    others = taken if others is None else others
    for obstacles in (others + inked, others, []) if always else (others + inked, others):
        for (x, y, anchor), box in zip(places, boxes, strict=True):
            if not any(_overlap(box, other) for other in obstacles):
                taken.append(box)
                return (
                    f"<text class='tag' text-anchor='{anchor}' x='{x:.1f}' y='{y:.1f}'>{escape(text)}</text>"
                )
    return ""


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
