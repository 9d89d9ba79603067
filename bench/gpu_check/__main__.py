"""python -m bench.gpu_check: see bench/gpu_check/__init__.py."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

# Without an installation only the root is importable.
sys.path.insert(0, str(Path(__file__).parents[2] / "python"))

from bench.gpu_check import record, tools
from bench.gpu_check.device import Device, driver
from bench.gpu_check.journal import Journal
from bench.gpu_check.stages import run_stage, start_parts, wait_for
from bench.machine import commit

PASSES = ("fprop", "dgrad", "wgrad")  # torch is imported after the build

# Seconds after the start at which each stage has to be over; what is not done by then is listed.
DEADLINES = {
    "compile": 120, "tries": 160, "promises": 200, "checks": 240, "sanitizer": 290, "probes": 330, "layers": 515,
    "networks": 580,
}  # fmt: skip
# A dry run's are there for a program that hangs, whatever else the machine does.
DRY = {stage: 600 * (i + 1) for i, stage in enumerate(DEADLINES)}
LEAST = 40.0  # seconds of a program of its own, however late it is: what is cut short counts as lost


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


def deadlines(options: argparse.Namespace) -> dict[str, float]:
    """Seconds after the start, by stage."""
    if options.ends:
        return dict(zip(DEADLINES, options.ends, strict=True))
    return dict(DRY if options.dry_run else DEADLINES)


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _START:5.0f} s] {text}", flush=True)


_START = time.perf_counter()


def check(
    device: Device, options: argparse.Namespace, save: Callable[[dict[str, Any]], Path]
) -> dict[str, Any]:
    """Every stage in turn; the record, saved after each. A stage that hangs or crashes loses what it was at, and
    nothing else: `stages` says what became of each, and `complete` whether all are done."""
    dry = options.dry_run
    ends = {stage: _START + seconds for stage, seconds in deadlines(options).items()}
    given = ["--dry-run"] if dry else []
    if options.ends:
        given += ["--ends", *map(str, options.ends)]
    found: dict[str, Any] = {
        "device": device.name,
        "dry_run": dry,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": record.source_hash(),
        "versions": _versions(),
        "driver": None if dry else driver(),
        "complete": False,
        "stages": {},
        "correctness": {"done": 0, "failures": [], "refused": [], "skipped_for_time": 0},
        "promises": {},
        "ceilings": None,
        "layers": [],
        "layers_left_out": [],
        "networks": [],
        "networks_left_out": [],
    }
    save(found)
    with tempfile.TemporaryDirectory(prefix="gpu_check") as name:
        folder = Path(name)
        parts = 1 if dry else max(1, (os.cpu_count() or 2) - 2)
        compilers = start_parts("compile", folder, parts, given)
        if not options.no_build:
            found["build"] = tools.build(ends["compile"] - time.perf_counter())
            say(f"build: {'ok' if found['build']['ok'] else found['build']['output']}")
        found["stages"]["compile"] = wait_for(compilers, ends["compile"])
        say(f"compile: {found['stages']['compile']['status']}")
        save(found)
        # Imported after the build, which may bring the CUDA extension.
        from bench.gpu_check import checks, probes

        found["kernels"] = checks.kernels(device)
        if not dry:
            # Triton's come from a compiler that checks; those of our own are tried first.
            own = [name for name in found["kernels"] if name.startswith("cuda_")]
            native = [f"{name}:{which}" for name in own for which in PASSES]
            found["lost"] = tools.first_tries(native, max(LEAST, ends["tries"] - time.perf_counter()))
            lost = list(found["lost"])
            say(f"first tries: {', '.join(lost) or 'every kernel'} {'lost' if lost else 'ran'}")
            given += ["--without", *lost] if lost else []
            # Tries that took longer take of what comes last, not of the checks.
            ends["checks"] += max(0.0, time.perf_counter() - ends["tries"])

        journal = Journal(folder / "checks")
        found["stages"]["checks"] = run_stage("checks", journal, ends["checks"], given)
        found |= gathered_checks(journal)
        done, failures = found["correctness"]["done"], found["correctness"]["failures"]
        say(f"checks: {found['stages']['checks']['status']}, {done} done, {len(failures)} failures")
        say(
            f"promises: {sum(v == 'ok' for v in found['promises'].values())} of {len(found['promises'])} kept"
        )
        save(found)
        if not dry:
            native = [name for name in native if name not in lost]
            found["sanitizer"] = tools.sanitize(native, max(LEAST, ends["sanitizer"] - time.perf_counter()))
            say("sanitizer: " + ", ".join(f"{r['command'][:60]} {r['ok']}" for r in found["sanitizer"]))
            save(found)
            found["probes"] = probes.probe(ends["probes"] - time.perf_counter())
            say(f"probes: {found['probes'].get('left_out', 'done')}")
            save(found)
        for stage in ("layers", "networks"):
            journal = Journal(folder / stage)
            found["stages"][stage] = run_stage(stage, journal, ends[stage], given)
            found |= gathered_rows(journal, stage)
            made, left = len(found[stage]), len(found[f"{stage}_left_out"])
            say(f"{stage}: {found['stages'][stage]['status']}, {made} rows, {left} left out")
            save(found)
    # Kernels that were not compiled ahead are compiled when met: that costs time and nothing else.
    needed = [stage for name, stage in found["stages"].items() if name != "compile"]
    found["complete"] = all(stage["status"] == "done" for stage in needed)
    return found


def gathered_checks(journal: Journal) -> dict[str, Any]:
    """What the checks wrote: counts, failures, refusals; and the promises."""
    results = journal.lines("check")
    lost = [f"{what}: the process did not survive it" for what in journal.unfinished("begun", "check")]
    return {
        "correctness": {
            "done": sum(line["result"] == "ok" for line in results),
            "failures": [line["text"] for line in results if line["result"] == "wrong"] + lost,
            "refused": sorted({line["text"] for line in results if line["result"] == "refused"}),
            "skipped_for_time": sum(line["count"] for line in journal.lines("skipped")),
        },
        "promises": {line["what"]: line["result"] for line in journal.lines("promise")}
        | dict.fromkeys(journal.unfinished("promised", "promise"), "the process did not survive it"),
    }


def gathered_rows(journal: Journal, stage: str) -> dict[str, Any]:
    """What a stage of rows wrote, its losses among what is left out."""
    from bench.gpu_check.rows import crossovers

    rows = [line["row"] for line in journal.lines("row")]
    left = [line["what"] for line in journal.lines("left")]
    left += [f"{what}: the process did not survive it" for what in journal.unfinished("trying", "tried")]
    found: dict[str, Any] = {stage: rows, f"{stage}_left_out": left}
    ceilings = journal.lines("ceilings")
    if ceilings:
        found["ceilings"] = {k: v for k, v in ceilings[-1].items() if k != "kind"}
    return found | ({"crossovers": crossovers(rows)} if stage == "layers" else {})


def child(options: argparse.Namespace) -> int:
    """One stage, in a process of its own."""
    import torch

    from bench.gpu_check import ahead, checks, networks, rows
    from stripe_kernels.testing import CASES, withdraw

    for lost in options.without:
        withdraw(lost)
    journal, end = Journal(options.journal), _START + options.seconds
    ends = deadlines(options)
    names = checks.SMALL[:1] if options.dry_run else tuple(CASES)
    if options.stage == "compile":
        failed = ahead.compile_part(names, options.part, options.parts) if not options.dry_run else []
        for what in failed:
            journal.note("failed", what=what)
        return 0
    torch.backends.cudnn.benchmark = True
    device = Device.find(options.dry_run)
    rounds = 3 if options.dry_run else rows.ROUNDS
    if options.stage == "checks":
        # The promises first: they are few, and a GPU alone can break them.
        share = (ends["promises"] - ends["tries"]) / (ends["checks"] - ends["tries"])
        checks.promises(device, _START + share * options.seconds, journal)
        # torch's own are no kernels of ours: they are timed, not checked.
        tried = checks.kernels(device, () if options.dry_run else {"dense"})
        checks.correctness(device, names, end, tried, journal)
    elif options.stage == "layers":
        rows.layer_rows(device, end, options.dry_run, rounds, journal)
    else:
        networks.network_rows(device, end, options.dry_run, rounds, journal)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="the same code on the CPU with tiny layers")
    parser.add_argument(
        "--checks-only", action="store_true", help="a small correctness set, for compute-sanitizer"
    )
    parser.add_argument(
        "--kernels", nargs="*", default=[], help="with --checks-only: these alone; cuda_wgmma:wgrad is a pass"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], help="with --stage: what may not run, as in --kernels"
    )
    parser.add_argument("--no-build", action="store_true", help="the extensions are built already")
    parser.add_argument(
        "--ends", nargs=len(DEADLINES), type=float, metavar="S",
        help=f"seconds after the start at which {', '.join(DEADLINES)} have to be over, where less time is lent",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=record.RECORDS, help="folder of the record")
    parser.add_argument("--predict", action="store_true", help="what the cost models expect; needs no GPU")
    parser.add_argument("--stage", help="one stage alone, as this program calls itself")
    parser.add_argument("--journal", type=Path, help="where a stage writes what it finds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="a stage's time")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    if options.stage:
        return child(options)
    if options.predict:
        from bench.gpu_check import predict
        from bench.gpu_check.report import table

        print(table(list(predict.rows())))
        return 0
    device = Device.find(options.dry_run)
    if options.checks_only:
        from bench.gpu_check import checks

        return checks.small_set(device, options.kernels)
    save = partial(record.write, folder=options.out, slug=device.slug)
    found = check(device, options, save)
    path = save(found)
    from bench.gpu_check.report import report

    print(report(found))
    print(f"record: {path}")
    return 0 if found["complete"] and not found["correctness"]["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
