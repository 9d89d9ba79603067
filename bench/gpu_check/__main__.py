"""python -m bench.gpu_check: see bench/gpu_check/__init__.py."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Without an installation only the root is importable.
sys.path.insert(0, str(Path(__file__).parents[2] / "python"))

from bench.gpu_check import record, tools
from bench.gpu_check.device import Device, driver
from bench.machine import commit

# Seconds after the start at which each stage has to be over; what is not done by then is listed.
DEADLINES = {
    "build": 120, "tries": 165, "checks": 225, "promises": 270, "sanitizer": 320, "layers": 510, "networks": 580,
}  # fmt: skip
DRY = {
    "build": 90, "tries": 90, "checks": 30, "promises": 60, "sanitizer": 60, "layers": 60, "networks": 90,
}  # fmt: skip
LEAST = 40.0  # of a program of its own, however late it is: what is cut short counts as lost
PROBES = 60.0  # seconds, most of them compilation


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return found | {"cudnn": str(cudnn) if cudnn else None}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _START:5.0f} s] {text}", flush=True)


_START = time.perf_counter()


def checks_only(device: Device, kernels: list[str]) -> int:
    """Few cases, for a process of its own: 0, WRONG, or 3 when the device is lost."""
    from bench.gpu_check import checks

    found = checks.correctness(
        device, checks.SMALL, float("inf"), kernels or checks.kernels(device, {"dense"})
    )
    for failure in found["failures"]:
        print(failure)
    if not checks.alive(device):
        return 3
    return tools.WRONG if found["failures"] else 0


def check(
    device: Device, dry_run: bool, with_build: bool, save: Callable[[dict[str, Any]], Path]
) -> dict[str, Any]:
    """Every stage in turn; the record, saved after each, so that a later failure loses no earlier result."""
    ends = {stage: _START + seconds for stage, seconds in (DRY if dry_run else DEADLINES).items()}
    found: dict[str, Any] = {
        "device": device.name,
        "dry_run": dry_run,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": record.source_hash(),
        "versions": _versions(),
        "driver": None if dry_run else driver(),
        "complete": False,
    }
    if with_build:
        found["build"] = tools.build(ends["build"] - time.perf_counter())
        say(f"build: {'ok' if found['build']['ok'] else found['build']['output']}")
    # Imported after the build, which may bring the CUDA extension.
    from bench.gpu_check import checks, networks, probes, rows
    from stripe_kernels.testing import CASES

    torch.backends.cudnn.benchmark = True
    names = checks.SMALL[:1] if dry_run else tuple(CASES)
    found["kernels"] = checks.kernels(device)
    # torch's own are no kernels of ours: they are timed, not checked.
    ours = checks.kernels(device, () if dry_run else {"dense"})
    native = [name for name in ours if name.startswith("cuda_")]
    lost = {} if dry_run else tools.first_tries(native, max(LEAST, ends["tries"] - time.perf_counter()))
    found["lost"] = lost
    say(f"first tries: {', '.join(lost) or 'every kernel'} {'lost' if lost else 'ran'}")
    ours = [name for name in ours if name not in lost]
    found["correctness"] = checks.correctness(device, names, ends["checks"], ours)
    say(f"correctness: {found['correctness']['done']} done, {len(found['correctness']['failures'])} failures")
    save(found)
    found["promises"] = checks.promises(device, ends["promises"], lost)
    say(f"promises: {sum(v == 'ok' for v in found['promises'].values())} of {len(found['promises'])} kept")
    if not dry_run:
        native = [name for name in native if name not in lost]
        found["sanitizer"] = tools.sanitize(native, max(LEAST, ends["sanitizer"] - time.perf_counter()))
        say(
            "sanitizer: "
            + ", ".join(f"{row['command'].split()[0]} {row['ok']}" for row in found["sanitizer"])
        )
    save(found)
    if not dry_run:
        found["probes"] = probes.probe(PROBES)
        say(f"probes: {found['probes'].get('left_out', 'done')}")
    rounds = 3 if dry_run else rows.ROUNDS
    ceilings = rows.Ceilings.probe(device)
    found["ceilings"] = {"copy_bytes_per_second": ceilings.copy, "gemm_flops": ceilings.gemm}
    found["layers"], found["layers_left_out"] = rows.layer_rows(
        device, ceilings, ends["layers"], dry_run, rounds, lost
    )
    found["crossovers"] = rows.crossovers(found["layers"])
    say(f"layers: {len(found['layers'])} rows, {len(found['layers_left_out'])} left out")
    save(found)
    made, left = networks.network_rows(device, ends["networks"], dry_run, rounds)
    found["networks"], found["networks_left_out"] = made, left
    say(f"networks: {len(made)} rows, {len(left)} left out")
    found["complete"] = True
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="the same code on the CPU with tiny layers")
    parser.add_argument(
        "--checks-only", action="store_true", help="a small correctness set, for compute-sanitizer"
    )
    parser.add_argument("--kernels", nargs="*", default=[], help="with --checks-only: these alone")
    parser.add_argument("--no-build", action="store_true", help="the extensions are built already")
    parser.add_argument("--out", type=Path, default=record.RECORDS, help="folder of the record")
    options = parser.parse_args()
    device = Device.find(options.dry_run)
    if options.checks_only:
        return checks_only(device, options.kernels)
    save = partial(record.write, folder=options.out, slug=device.slug)
    found = check(device, options.dry_run, not options.no_build, save)
    path = save(found)
    from bench.gpu_check.report import report

    print(report(found))
    print(f"record: {path}")
    return 0 if not found["correctness"]["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
