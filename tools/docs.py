"""What mkdocs puts into pages when they are built: the command line's own help, and tables of benchmark records.

A line `<!-- generated: NAME -->` is replaced by what GENERATORS[NAME] returns.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- generated: (\w+) -->")
Row = dict[str, Any]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page before it is rendered."""
    return _MARK.sub(lambda found: GENERATORS[found[1]](), markdown)


def verbs() -> str:
    """A section for every verb of `iessp`: what its --help prints on a terminal of 84 columns."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from iessp.cli import app

    group: Any = get_command(app)
    run = CliRunner(env={"COLUMNS": "84", "TERMINAL_WIDTH": "84", "TERM": "dumb"})
    shown = {
        name: run.invoke(app, [name, "--help"], catch_exceptions=False).stdout for name in group.commands
    }
    return "\n\n".join(f"## iessp {name}\n\n```text\n{text.strip()}\n```" for name, text in shown.items())


def _cell(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").split())


def records() -> str:
    """A section for every record under bench/records; kinds of records are told apart by what their rows hold."""
    sections = [record(path) for path in sorted((ROOT / "bench/records").glob("*.json"))]
    return "\n\n".join(sections) or "There is no record yet."


def record(path: Path) -> str:
    held = json.loads(path.read_text())
    rows: Sequence[Row] = held.get("rows", [])
    table = (
        timings(rows)
        if rows and "contestant" in rows[0]
        else learning(rows)
        if rows and "seed" in rows[0]
        else gpu_tables(held)
        if held.get("layers")
        else ""
    )
    about = [f"## {path.stem}", str(held.get("what", ""))]
    facts = {**_flat(held.get("machine")), **{k: held[k] for k in ("torch", "threads") if k in held}}
    about.append(", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, "", [])))
    if "command" in held:
        about.append(f"    {held['command']}")
    return "\n\n".join(part for part in (*about, table or f"See `bench/records/{path.name}`.") if part)


def gpu_tables(held: Row) -> str:
    """The tables that bench.gpu_check prints."""
    sys.path.insert(0, str(ROOT))  # bench is no installed package
    from bench.gpu_check.report import layer_table, network_table

    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    about = f"{held['device']}, {held['date'][:10]}, kernel sources {held['sources']}; {versions}"
    return f"{about}\n\n```text\n{layer_table(held['layers'])}\n\n{network_table(held['networks'])}\n```"


def _flat(machine: Any) -> Row:
    if not isinstance(machine, dict):
        return {"machine": machine}
    facts = {**machine, **machine.get("versions", {})}
    return {k: v for k, v in facts.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)}


def timings(rows: Sequence[Row]) -> str:
    """The fastest of each kind in every comparison of bench's rows; what all comparisons share stands above them."""
    keys = ("what", "which", "batch", "density", "source", "dtype", "threads")
    titles = dict(
        zip(keys, ("what", "pass", "batch", "density", "skeletons", "dtype", "threads"), strict=True)
    )
    shared = [key for key in keys if len({row[key] for row in rows}) == 1]
    told = [key for key in keys if key not in shared]
    lines = []
    for _, found in groupby(rows, key=lambda row: [row[key] for key in keys]):
        timed: dict[str, Row] = {}
        for row in found:
            best = timed.setdefault(row["kind"], row)
            if row.get("seconds") and not best.get("seconds", 1e99) <= row["seconds"]:
                timed[row["kind"]] = row
        job, kinds = row, {kind: row for kind, row in timed.items() if row.get("seconds")}
        stripe, dense = kinds.pop("stripe", None), kinds.pop("dense", None)
        gain = "" if stripe is None or not stripe.get("speedup") else (
            f"**{stripe['speedup']:.2f}** ({stripe['speedup_low']:.2f}-{stripe['speedup_high']:.2f})"
        )  # fmt: skip
        others = ", ".join(f"{kind} {_ms(row)}" for kind, row in kinds.items())
        lines.append([*(_value(job[key]) for key in told), gain, _ms(dense), _ms(stripe), others])
    columns = [*(titles[key] for key in told), "speedup", "dense, ms", "stripes, ms", "others, ms"]
    about = ", ".join(f"{titles[key]} {_value(rows[0][key])}" for key in shared)
    return f"{about}\n\n{_table(columns, lines)}" if about else _table(columns, lines)


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _ms(row: Row | None) -> str:
    return "" if row is None else f"{row['seconds'] * 1e3:.3g} ({row['contestant']})"


def learning(rows: Iterable[Row]) -> str:
    """Mean and standard deviation over seeds of `iessp reproduce`'s rows, best first."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)

    def spread(name: str, values: Sequence[Row]) -> str:
        found = [100 * row[name] for row in values if row.get(name) is not None]
        if not found:
            return ""
        return f"{statistics.mean(found):.2f}" + (
            f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        )

    order = sorted(methods, key=lambda m: -statistics.mean(row["accuracy"] for row in methods[m]))
    columns = ("accuracy", "macs_kept", "macs_kept_after_compaction")
    lines = [[m, *(spread(c, methods[m]) for c in columns), len(methods[m])] for m in order]
    return _table(["method", "test accuracy, %", "MACs kept, %", "after compaction, %", "runs"], lines)


def _table(titles: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    body = ["| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *body])


GENERATORS = {"iessp": verbs, "records": records}
