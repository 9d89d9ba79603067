"""The stages of one check in their order, and the record of them: saved after each, so that whatever ends this program
leaves what was found until then, and everything else by name as left out."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.gpu_check import record, stages, tools
from bench.gpu_check.device import Device, driver
from bench.gpu_check.journal import Journal
from bench.gpu_check.schedule import SHARES, Schedule
from bench.machine import commit

Record = dict[str, Any]
_NOT_REACHED = {"status": "not reached"}
_ON_THE_GPU = ("tries", "sanitizer", "probes")
_ROWS = ("layers", "networks")


def _versions() -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return found | {"cudnn": str(cudnn) if cudnn else None}


class Check:
    """One check of a device. `found` is its record."""

    def __init__(
        self,
        device: Device,
        schedule: Schedule,
        folder: Path,
        save: Callable[[Record], object],
        dry_run: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.schedule, self.folder = device, schedule, folder
        self.save, self.dry_run, self.clock = save, dry_run, clock
        self.options = ["--dry-run"] if dry_run else []
        self.found: Record = {
            "device": device.name,
            "dry_run": dry_run,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "sources": record.source_hash(),
            "versions": _versions(),
            "driver": None if dry_run else driver(),
            "complete": False,
            "seconds": schedule.total,
            "stages": {name: _NOT_REACHED for name in SHARES if not (dry_run and name in _ON_THE_GPU)},
            "kernels": [],
            "ceilings": None,
            "promises": {},
            "correctness": gathered_checks(Journal(None), {}),
            **{key: [] for name in _ROWS for key in (name, f"{name}_left_out")},
        }

    def run(self, build: bool) -> Record:
        """Every stage; SystemExit, or whatever else ends this program, finds the record saved."""
        with ExitStack() as stack:
            stack.callback(lambda: self.save(self.found))
            self._compile(build)
            self._list_everything()
            if not self.dry_run:
                self._try()
            for name in ("promises", "checks", "networks"):
                self._stage(name)
            if not self.dry_run:
                self._optional("sanitizer", self._sanitize)
                self._optional("probes", self._probe)
            self._stage("layers")
            self.found["complete"] = _complete(self.found)
        return self.found

    def _say(self, text: str) -> None:
        print(f"[{self.clock() - self.schedule.start:5.0f} s] {text}", flush=True)

    @contextmanager
    def _timed(self, name: str) -> Iterator[float]:
        """The end of a stage. It is under way until somebody says what became of it."""
        start = self.clock()
        self.found["stages"][name] = {"status": "ended with the whole check"}
        yield self.schedule.end(name, start)
        self.found["stages"][name].setdefault("seconds", round(self.clock() - start, 1))

    def _compile(self, build: bool) -> None:
        """Builds in place while Triton's kernels are compiled on the cores that it leaves idle: without the build there
        is little to check, without theirs a later stage waits for its own."""
        parts = 1 if self.dry_run else max(1, (os.cpu_count() or 2) - 2)
        with (
            self._timed("compile") as end,
            stages.parts_of("compile", self.folder, parts, self.options) as compilers,
        ):
            if build:
                self.found["build"] = tools.build(self.schedule.latest("compile") - self.clock())
                self._say(f"build: {'ok' if self.found['build']['ok'] else self.found['build']['output']}")
            self.found["stages"]["compile"] = stages.wait_for(compilers, end)
        self._say(f"compile: {self.found['stages']['compile']['status']}")

    def _list_everything(self) -> None:
        """What there is to do, all of it left out so far. Not before the build, which may bring the CUDA extension."""
        from bench.gpu_check import checks

        self.found["kernels"] = checks.kernels(self.device)
        for name in ("promises", "checks", *_ROWS):
            self.found |= gathered(name, Journal(None), self.device, self.dry_run)
        self.save(self.found)

    @property
    def _native(self) -> list[str]:
        """Passes of our own kernels that the first tries have not lost. Triton's come from a compiler that checks."""
        from bench.gpu_check.checks import PASSES

        own = [name for name in self.found["kernels"] if name.startswith("cuda_")]
        return [
            f"{name}:{which}"
            for name in own
            for which in PASSES
            if f"{name}:{which}" not in self.found.get("lost", {})
        ]

    def _try(self) -> None:
        with self._timed("tries") as end:
            now, latest = self.clock(), self.schedule.latest("tries")
            lost, unknown = tools.first_tries(self._native, end - now, latest - now)
            status = "stopped at its deadline" if unknown else "done"
            self.found["stages"]["tries"] = {"status": status, "not_tried": unknown}
        self.found["lost"] = lost
        if unknown:
            self._say(f"first tries: {status}: {', '.join(unknown)}")
        self._say(f"first tries: {', '.join(lost) or 'every kernel'} {'lost' if lost else 'ran'}")
        self.options += ["--without", *lost] if lost else []
        self.save(self.found)

    def _stage(self, name: str) -> None:
        """One in a process of its own."""
        journal = Journal(self.folder / name)
        try:
            with self._timed(name) as end:
                self.found["stages"][name] = stages.run_stage(name, journal, end, self.options)
        finally:
            self.found |= gathered(name, journal, self.device, self.dry_run)
            self._say(f"{name}: {self.found['stages'][name]['status']}, {_counts(name, self.found)}")
            self.save(self.found)

    def _optional(self, name: str, stage: Callable[[], None]) -> None:
        """A stage that the others can do without: what ends it is told, and the check goes on."""
        try:
            stage()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the layers are to be had
            status = f"ended by {type(error).__name__}: {str(error)[:300]}"
            self.found["stages"].setdefault(name, {})["status"] = status
            self._say(f"{name}: {status}")

    def _sanitize(self) -> None:
        beside = [name for name in tools.BESIDE_OWN if name in self.found["kernels"]]
        with self._timed("sanitizer") as end:
            ran = self.found["sanitizer"] = tools.sanitize((self._native, beside), end - self.clock())
            stopped = any(tool.get("code", 0) is None for tool in ran)
            self.found["stages"]["sanitizer"] = {"status": "stopped at its deadline" if stopped else "done"}
        self._say("sanitizer: " + ", ".join(f"{r['command'][:60]} {r['ok']}" for r in ran))
        self.save(self.found)

    def _probe(self) -> None:
        from bench.gpu_check import probes

        with self._timed("probes") as end:
            self.found["probes"] = probes.probe(end - self.clock())
            self.found["stages"]["probes"] = {"status": "done"}
        self._say(f"probes: {self.found['probes'].get('left_out', 'done')}")
        self.save(self.found)


def _complete(found: Record) -> bool:
    """Whether everything ran, and nothing but figures and `correctness` is left to look at."""
    # What was not compiled ahead is compiled when met: that costs time and nothing else.
    needed = [stage for name, stage in found["stages"].items() if name != "compile"]
    return (
        found.get("build", {"ok": True})["ok"]
        and not found.get("lost")
        and all(stage["status"] == "done" for stage in needed)
        and all(result == "ok" for result in found["promises"].values())
        and not any(tool["ok"] is False for tool in found.get("sanitizer", ()))  # None: not installed
    )


def _counts(stage: str, found: Record) -> str:
    if stage == "promises":
        kept = sum(result == "ok" for result in found["promises"].values())
        return f"{kept} of {len(found['promises'])} kept"
    if stage == "checks":
        checks = found["correctness"]
        return (
            f"{checks['done']} done, {len(checks['failures'])} failures, {checks['skipped_for_time']} skipped"
        )
    return f"{len(found[stage])} rows, {len(found[f'{stage}_left_out'])} left out"


def gathered(stage: str, journal: Journal, device: Device, dry_run: bool) -> Record:
    """What a stage wrote, as the record has it, and what of its work it did not reach."""
    from bench.gpu_check import checks, networks, rows

    if stage == "promises":
        return {"promises": gathered_promises(journal, list(checks.promised(device)))}
    if stage == "checks":
        names = checks.names_of(dry_run)
        planned = {
            what: kernel
            for what, kernel, *_ in checks.planned(names, checks.kernels(device, checks.beside(dry_run)))
        }
        return {"correctness": gathered_checks(journal, planned)}
    planned_rows = (
        [setting.what for setting in rows.settings(dry_run)]
        if stage == "layers"
        else list(networks.settings(dry_run))
    )
    return gathered_rows(journal, stage, planned_rows)


_LOST, _NO_TIME = "the process did not survive it", "no time"


def gathered_promises(journal: Journal, planned: list[str]) -> dict[str, str]:
    """By what is promised "ok", or why not."""
    return (
        dict.fromkeys(planned, _NO_TIME)
        | dict.fromkeys(journal.unfinished("promised", "promise"), _LOST)
        | {line["what"]: line["result"] for line in journal.lines("promise")}
    )


def gathered_checks(journal: Journal, planned: dict[str, str]) -> Record:
    """Counts, failures, refusals; of what was not begun how many checks, by kernel. planned: what -> kernel."""
    results = journal.lines("check")
    begun = {line["what"] for line in (*results, *journal.lines("begun"))}
    skipped = Counter(kernel for what, kernel in planned.items() if what not in begun)
    lost = [f"{what}: {_LOST}" for what in journal.unfinished("begun", "check")]
    return {
        "done": sum(line["result"] == "ok" for line in results),
        "failures": [line["text"] for line in results if line["result"] == "wrong"] + lost,
        "refused": sorted({line["text"] for line in results if line["result"] == "refused"}),
        "skipped_for_time": skipped.total(),
        "skipped": dict(skipped),
    }


def gathered_rows(journal: Journal, stage: str, planned: list[str]) -> Record:
    """The rows, and what is left out: contestants that a process died of, rows that came to nothing, those that were
    under way when the stage was stopped, and those that there was no time for."""
    from bench.gpu_check.rows import crossovers

    begun, ended = ("started", "finished") if stage == "layers" else ("trying", "tried")
    rows = [line["row"] for line in journal.lines("row")]
    lost = journal.unfinished("trying", "tried")
    left = {line["what"]: line["reason"] for line in journal.lines("left")} | dict.fromkeys(lost, _LOST)
    open_ = journal.unfinished(begun, ended)
    left |= {what: "stopped under way" for what in open_ if not any(what in one for one in left)}
    reached = {line["what"] for line in (*journal.lines(begun), *journal.lines(ended))} | set(left)
    left |= {what: _NO_TIME for what in planned if what not in reached}
    found: Record = {stage: rows, f"{stage}_left_out": [f"{what}: {why}" for what, why in left.items()]}
    ceilings = journal.lines("ceilings")
    if ceilings:
        found["ceilings"] = {k: v for k, v in ceilings[-1].items() if k != "kind"}
    return found | ({"crossovers": crossovers(rows)} if stage == "layers" else {})
