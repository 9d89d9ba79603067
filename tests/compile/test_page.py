"""The page of an explanation: what it draws, that it stands alone, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from stripe_kernels import Roof, StripeConv2d, explain, tune
from stripe_kernels.compile import drawing
from stripe_kernels.compile.explain import Explanation
from stripe_kernels.testing import live_stripes

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-browser"))), None
)
RUNS = [
    {"name": "<dense>", "accuracy": 0.98, "spread": 0.01, "macs_kept": 1.0, "ms": 9.0, "mine": False},
    {"name": "this one", "accuracy": 0.97, "spread": None, "macs_kept": 0.3, "ms": 3.0, "mine": True},
]
NETWORKS = [
    {"network": "dense", "batch": 2, "ms": 9.0, "ms_low": 8.9, "ms_high": 9.3},
    {"network": "frozen", "batch": 2, "ms": 3.0, "ms_low": 2.9, "ms_high": 3.3},
]


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    """A network of lopsided layers with one name that is long, tuned so that every section has something to say."""
    layers: dict[str, nn.Module] = {}
    c = 3
    for name, k, r, s in (
        ("stem", 24, 3, 3),
        ("a_layer_with_quite_a_long_name_of_its_own", 64, 3, 2),
        ("head", 130, 1, 1),
    ):
        layers[name] = StripeConv2d(c, k, (r, s), skeleton=live_stripes("random", (k, r, s), 0.4, seed=k))
        c = k
    layers["ordinary"] = nn.Conv2d(c, 4, 3)
    model, x = nn.Sequential(), torch.randn(2, 3, 9, 8)
    for name, layer in layers.items():
        model.add_module(name, layer)
    tune(model, x, seconds=0.01, folder=tmp_path_factory.mktemp("tune"))
    return explain(model, x, roof=Roof("float32", 1, 1e11, 1e10), seconds=0.01)


class Tags(HTMLParser):
    """Every tag and its attributes; text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_stands_alone_and_names_everything(explained: Explanation) -> None:
    page = explained.html("A & B", NETWORKS, RUNS)
    read = Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert not [a for _, a in read.tags for name in a if name in ("src", "href", "xlink:href")]
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert "A & B" in read.text
    for row in explained.rows:
        assert read.text.count(row["layer"]) >= 3
        assert row["reason"] in read.text
    assert "<dense>" in read.text
    assert "input 2×3×9×8" in read.text
    assert "3.00×as fast, whole network" in read.text  # of the fastest dense, not of the layers' sum
    assert "1 ordinary convolution" in read.text
    for section in ("Whole network", "Skeletons", "Layers", "Roofline", "Accuracy", "Decisions"):
        assert section in read.text


def test_a_peak_below_what_layers_reach_is_called_disturbed(explained: Explanation) -> None:
    remark = "the peak was measured while others computed"
    for share in (0.9, 1.5):
        rows = [{**row, "share_of_peak": share} for row in explained.rows]
        page = Explanation(rows, [], explained.skeletons, explained.roof).html()
        assert (remark in page) == (share > 1)


def test_bars_beyond_the_peak_are_longer_than_those_at_it(explained: Explanation) -> None:
    """The longest bar is the whole width, the line at 100 % stands where a bar of 100 % would end."""
    rows = [{**row, "share_of_peak": s} for row, s in zip(explained.rows, (0.5, 1.0, 1.25), strict=True)]
    page = Explanation(rows, [], explained.skeletons, explained.roof).html()
    peak = re.findall(
        r"class='peak' style='--peak:([\d.]+)'><div class='bar kept' style='--share:([\d.]+)", page
    )
    assert peak == [("0.8000", "0.4000"), ("0.8000", "0.8000"), ("0.8000", "1.0000")]


def test_sections_without_records_say_how_to_get_them_or_are_left_out(explained: Explanation) -> None:
    assert "iessp train" in explained.html(runs=())
    plain = Tags(Explanation(explained.rows, [], explained.skeletons).html()).text
    assert not {"Accuracy", "Roofline", "Whole network", "Rewritten"} & set(plain.split())
    empty = Explanation([], ["conv: an ordinary convolution"], [])
    assert "No stripe layer" in empty.html()
    assert str(empty).splitlines() == ["no stripe layer runs in this network", *empty.notes]


@pytest.mark.parametrize(
    ("size", "pattern"), [((7, 3, 2), "random"), ((64, 1, 1), "random"), ((1, 5, 4), "full")]
)
def test_a_skeleton_is_drawn_stripe_by_stripe(size: tuple[int, int, int], pattern: str) -> None:
    """Reads the ink back: every stretch of the path, as filters and taps."""
    _, r, s = size
    live = torch.from_numpy(live_stripes(pattern, size, 0.5, seed=1).live.copy())
    svg = drawing.skeleton(live)
    width = int(re.search(r"viewBox='0 0 (\d+) ", svg)[1])  # type: ignore[index]
    columns = (width + 1) // (s + 1)
    ink = re.search(r"class='live' d='([^']*)'", svg)[1]  # type: ignore[index]
    seen = torch.zeros_like(live)
    for x, y, n in re.findall(r"M(\d+) (\d+)\.5h(\d+)", ink):
        for column in range(int(x), int(x) + int(n)):
            seen[int(y) // (r + 1) * columns + column // (s + 1), int(y) % (r + 1), column % (s + 1)] = True
    assert torch.equal(seen, live)


def test_measured_and_predicted_times_are_not_added_up() -> None:
    def row(measured: float | None) -> dict[str, float | None]:
        return {"macs": 1, "dense_macs": 2, "predicted_ms": 1.0, "measured_ms": measured, "dense_ms": 3.0}

    totals = {
        len(times): Explanation([row(t) for t in times], [], []).total
        for times in ([2.0, 2.5, None], [2.0, 2.5])
    }
    assert (totals[2]["measured_ms"], totals[2]["dense_ms"]) == (4.5, 6.0)
    assert (totals[3]["measured_ms"], totals[3]["dense_ms"], totals[3]["predicted_ms"]) == (None, None, 3.0)


def test_notes_that_say_the_same_are_one_line() -> None:
    notes = [f"bn{i}: folded into the filter before it" for i in range(9)] + ["maps are channels_last inside"]
    summary = Explanation([], notes, []).summary
    assert summary == [
        "bn0, bn1, bn2, bn3, bn4, bn5 and 3 more: folded into the filter before it",
        "maps are channels_last inside",
    ]


@pytest.mark.parametrize("intensity", [20.0, 50.0, 90.0, 150.0])
@pytest.mark.parametrize("rate", [40.0, 52.0, 60.0, 70.0])
@pytest.mark.parametrize("crowd", [[], [16.0, 22.0, 31.0, 43.0, 59.0, 81.0, 110.0, 150.0, 205.0]])
def test_labels_keep_off_each_other(crowd: list[float], intensity: float, rate: float) -> None:
    """A mark about the end of a line that has a name, wherever it is, and a line full of marks."""
    marks = [
        drawing.Point(intensity, rate, "stripes", "highest 112%"),
        drawing.Point(5.0, 19.0, "stripes", "lowest"),
    ]
    marks += [drawing.Point(x, y, "dense") for x in crowd for y in (50.0, 58.0)]
    line = (
        [(3.0, 12.0), (13.0, 54.0), (240.0, 54.0)] if crowd else [(3.0, 40.0), (4.0, 54.0), (240.0, 54.0)],
        "roof",
        "roof 54 GFLOP/s",
    )
    axes = drawing.Axis("x", log=True), drawing.Axis("y", log=True)
    svg = drawing.scatter(marks, *axes, [line])
    boxes = []
    for anchor, x, y, text in re.findall(
        r"class='tag' text-anchor='(\w+)' x='([\d.]+)' y='([\d.]+)'>([^<]*)<", svg
    ):
        width = drawing._LETTER * len(text)
        left = float(x) - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 8, left + width, float(y)))
    assert len(boxes) >= 2
    assert not any(drawing._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    dots = [
        (float(x) - 3.4, float(y) - 3.4, float(x) + 3.4, float(y) + 3.4)
        for x, y in re.findall(r"cx='([\d.]+)' cy='([\d.]+)'", svg)
    ]
    assert not any(drawing._overlap(box, dot) for box in boxes for dot in dots)


@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_round_and_inside(log: bool) -> None:
    for low, high in ((0.3, 1.0), (2.0, 900.0), (0.94, 0.95), (1e-3, 7.0)):
        axis = drawing.Axis("x", log=log)
        bottom, top = axis.span([low, high])
        ticks = axis.ticks(bottom, top)
        assert bottom < low
        assert top > high
        assert all(bottom <= t <= top for t in ticks)
        assert len(ticks) >= 2
        assert len(ticks) == len({axis.text(t) for t in ticks}) <= 11


def browse(page: Path, *arguments: str) -> str:
    """Runs the browser once, without its network services."""
    assert BROWSER is not None
    quiet = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
    )
    home = f"--user-data-dir={page.parent / 'browser'}"
    ran = subprocess.run(
        [BROWSER, *quiet, home, *arguments, page.as_uri()], capture_output=True, text=True, check=True
    )
    return ran.stdout


@pytest.mark.parametrize(
    ("measured", "headed", "said"),
    [
        ((1.0, 2.0, 3.0), True, "stripes, measured."),
        ((None, 2.0, None), True, "stripes, predicted where no kernel was measured."),
        ((None, None, None), False, "stripes, predicted."),
    ],
)
def test_no_heading_stands_over_nothing(
    explained: Explanation, measured: tuple[float | None, ...], headed: bool, said: str
) -> None:
    """A column of times is there when a layer has one; in it, a layer without a time has a dash."""
    rows = [
        {**row, "measured_ms": ms, "share_of_peak": None}
        for row, ms in zip(explained.rows, measured, strict=True)
    ]
    page = Explanation(rows, [], explained.skeletons).html()
    heads = re.findall(r"<th [^>]*>([^<]*)", page)
    assert ("measured, ms" in heads) == headed
    cells = re.findall(r"<td[^>]* data-head='([^']*)'>([^<]*)", page)
    assert [head for head, _ in cells] == heads * len(rows)
    texts = [text for head, text in cells if head == "measured, ms"]
    assert texts == (["–" if ms is None else f"{ms:.2f}" for ms in measured] if headed else [])
    assert all(text for head, text in cells if head.endswith(", ms"))
    assert said in Tags(page).text


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH: apt-get install chromium")
@pytest.mark.parametrize("measured", [True, False])
def test_a_browser_shows_it_without_overflow(explained: Explanation, tmp_path: Path, measured: bool) -> None:
    """Asks the browser itself, in frames of both widths, whether anything is wider than the window or too close."""
    # Labels at the end of their longest bars, and as long as they get.
    rows = [{**row, "density": 1.0, "dense_ms": 0.01234} for row in explained.rows]
    if not measured:
        rows = [{**row, "measured_ms": None, "predicted_ms": 0.01234, "share_of_peak": None} for row in rows]
    everything = Explanation(rows, explained.notes, explained.skeletons, explained.roof, explained.ordinary)
    page = everything.html("Report", NETWORKS, RUNS)
    frames = "".join(
        f"<iframe width='{w}' height='600' srcdoc='{escape(page)}'></iframe>" for w in (1200, 400)
    )
    measure = (
        "onload=()=>{const found=[...document.querySelectorAll('iframe')].map(f=>{const d=f.contentDocument,"
        "e=d.documentElement;return{window:f.contentWindow.innerWidth,content:e.scrollWidth,height:e.scrollHeight,"
        "outside:[...d.querySelectorAll('main *')].filter(n=>n.getBoundingClientRect().right>e.clientWidth+1)"
        ".map(n=>n.tagName+'.'+n.getAttribute('class')),touching:[...d.querySelectorAll('.layer:not(.head,.sum)')]"
        ".filter(n=>{const a=n.querySelector('.kept span').getBoundingClientRect(),"
        "b=n.querySelector('.taps').getBoundingClientRect();return a.right>b.left&&a.bottom>b.top}).length,"
        "gaps:[...d.querySelectorAll('.layer:not(.head,.sum)')].flatMap(n=>{const t=n.querySelector('.taps')"
        ".getBoundingClientRect(),p=n.lastChild.getBoundingClientRect();return[...n.querySelectorAll('.times span')]"
        ".map(l=>{const b=l.getBoundingClientRect();return(b.left<t.left?t:p).left-b.right})}),"
        "apart:[...d.querySelectorAll('.skeleton')].map(n=>n.getBoundingClientRect()).flatMap((a,i,all)=>"
        "i&&a.left>all[i-1].left&&a.top<all[i-1].bottom&&a.bottom>all[i-1].top?[a.left-all[i-1].right]:[])}});"
        "document.body.textContent=JSON.stringify(found)}"
    )
    framed = tmp_path / "framed.html"
    framed.write_text(f"<!doctype html><body>{frames}<script>{measure}</script></body>")
    body = re.search(r"<body>(.*)</body>", browse(framed, "--dump-dom"), re.DOTALL)
    assert body is not None
    wide, narrow = json.loads(body[1])
    assert (wide["window"], narrow["window"]) == (1200, 400)
    assert wide["content"] <= 1200
    assert narrow["content"] <= 400
    assert narrow["height"] > wide["height"] > 600
    assert wide["outside"] == narrow["outside"] == []
    assert wide["touching"] == narrow["touching"] == 0
    for window in (wide, narrow):
        assert len(window["gaps"]) == 2 * len(rows)
        assert min(window["gaps"]) >= 8
        assert min(window["apart"]) >= 15  # two filters of one layer lie up to 5 apart


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_paints_both_themes(explained: Explanation, tmp_path: Path, width: int) -> None:
    """Light paper and dark paper, in both the ink of the stripes, spread over the page."""
    image = pytest.importorskip("PIL.Image")
    page = tmp_path / "report.html"
    page.write_text(explained.html("Report", NETWORKS, RUNS))
    paper = {"light": (255, 255, 255), "dark": (0x14, 0x17, 0x1B)}
    stripes = {"light": (0x0B, 0x62, 0xA8), "dark": (0x63, 0xB3, 0xF1)}
    for theme, setting in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{theme}.png"
        size = f"--window-size={width},1600"
        browse(page, size, f"--blink-settings=preferredColorScheme={setting}", f"--screenshot={shot}")
        painted = image.open(shot).convert("RGB")
        assert painted.size == (width, 1600)
        counts = {colour: n for n, colour in painted.getcolors(painted.width * painted.height)}
        assert painted.getpixel((1, 1)) == paper[theme]
        assert 0.5 < counts[paper[theme]] / (width * 1600) < 0.98
        assert counts[stripes[theme]] > 500
        rows = [
            y for y in range(1600) if stripes[theme] in {painted.getpixel((x, y)) for x in range(0, width, 2)}
        ]
        assert max(rows) - min(rows) > 500
