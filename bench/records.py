"""Rows of results, as CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.machine import Machine
from bench.timing import Ratio, Sample
from stripe_kernels import Roof

OK = "ok"


@dataclass(frozen=True)
class Row:
    """One contestant of one job. Times are seconds a call; `speedup` is the time of `over`, the fastest dense
    contestant of the same job, divided by this one's, paired by round, with its 95 % interval.

    status: "ok", "refused: reason", or "wrong: what"; only "ok" has times. density: live stripes / all; of a
    network the share of its multiply-adds. macs: multiply-adds the contestant has to do, those inside the
    image (of a network all). share_of_copy: bytes that must move, over the time and the copy bandwidth; it
    can pass 1 in caches. others: cores that other processes kept busy meanwhile.
    """

    what: str
    which: str
    batch: int
    density: float
    source: str
    dead_filters: int
    dtype: str
    threads: int
    contestant: str
    kind: str
    status: str = OK
    seconds: float | None = None
    low_quartile: float | None = None
    high_quartile: float | None = None
    n: int | None = None
    calls: int | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    over: str | None = None
    macs: float | None = None
    gflops: float | None = None
    share_of_peak: float | None = None
    share_of_copy: float | None = None
    others: float | None = None

    @property
    def job(self) -> tuple[object, ...]:
        """What rows of one comparison share."""
        return self.what, self.which, self.batch, self.density, self.source, self.dtype, self.threads


def timing_fields(sample: Sample, ratio: Ratio, over: str, others: float | None) -> dict[str, object]:
    """The fields of a Row that come from a measurement."""
    low, high = sample.quartiles
    return {
        "seconds": sample.median,
        "low_quartile": low,
        "high_quartile": high,
        "n": sample.n,
        "calls": sample.repeats,
        "speedup": ratio.value,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "over": over,
        "others": others,
    }


class Writer:
    """Writes rows to PREFIX.csv as they come, so that a killed run keeps them; to PREFIX.json at the end."""

    def __init__(self, prefix: Path, machine: Machine, command: str) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.machine, self.command = prefix, machine, command
        self.rows: list[Row] = []
        self.roofs: list[Roof] = []
        self._file = prefix.with_suffix(".csv").open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(f.name for f in fields(Row))

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self._csv.writerows(asdict(row).values() for row in rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        record = {
            "machine": self.machine.as_dict(),
            "command": self.command,
            "roofs": [roof.as_dict() for roof in self.roofs],
            "rows": [{k: _short(v) for k, v in asdict(row).items() if v is not None} for row in self.rows],
        }
        self.prefix.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def _short(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path) -> tuple[dict[str, object], list[Row]]:
    """The machine and the rows of a JSON record."""
    record = json.loads(path.read_text())
    return record["machine"], [Row(**row) for row in record["rows"]]


def best(rows: Iterable[Row], kind: str) -> Row | None:
    """The fastest row of a kind."""
    timed = [row for row in rows if row.kind == kind and row.seconds is not None]
    return min(timed, key=lambda row: row.seconds or 0.0) if timed else None
