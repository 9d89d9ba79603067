"""What runs left behind, for the report: accuracy beside multiply-adds and milliseconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def accuracy_points(folders: Iterable[Path], own: Path | None, own_ms: float | None) -> list[dict[str, Any]]:
    """Points for `Explanation.html`: a method of a table, or a run, each.

    folders are searched: table.json of `iessp reproduce`, else results.json of runs, two levels deep. own: the
    folder of the network shown; without folders its neighbours are looked at. own_ms: its time where it was
    measured just now, batch 1.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    record = None if own is None else own.resolve() / "results.json"
    if record is not None and record.exists():
        mine = _run(record)
        mine["ms"] = own_ms or mine["ms"]
        found[f"{mine['name']}, this run"] = [{**mine, "mine": True}]
        folders = list(folders) or [record.parent.parent]
    for folder in folders:
        for run in _runs(folder):
            if record is None or run["folder"] != record.parent:
                found.setdefault(run["name"], []).append({**run, "mine": False})
    return [_point(name, same) for name, same in found.items()]


def _point(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of runs that share a name."""
    accuracies = [run["accuracy"] for run in runs]
    times = [run["ms"] for run in runs if run["ms"] is not None]
    return {
        "name": name,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "n": len(runs),
        "macs_kept": statistics.mean(run["macs_kept"] for run in runs),
        "ms": statistics.mean(times) if times else None,
        "mine": any(run["mine"] for run in runs),
    }


def _runs(folder: Path) -> list[dict[str, Any]]:
    """Every run recorded in a folder. Raises FileNotFoundError where there is none."""
    if (folder / "table.json").exists():
        rows = json.loads((folder / "table.json").read_text())["rows"]
        return [
            {
                "name": row["method"],
                "folder": None,
                "accuracy": row["accuracy"],
                "macs_kept": row["macs_kept"],
                "ms": row.get("frozen_ms_1"),
            }
            for row in rows
        ]
    paths = sorted(path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}results.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no records: expected table.json or results.json of runs")
    return [_run(path) for path in paths]


def _run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return {
            "name": found["recipe"]["method"],
            "folder": path.parent.resolve(),
            "accuracy": 1 - found["test_errors"] / found["images"]["test"],
            "macs_kept": found["macs_kept"],
            "ms": found.get("latency", {}).get("1", {}).get("frozen"),
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of a run: {type(error).__name__} {error}") from error
