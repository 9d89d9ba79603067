"""python -m bench.gpu_check: see bench/gpu_check/__init__.py."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

# Without an installation only the root is importable.
sys.path.insert(0, str(Path(__file__).parents[2] / "python"))

from bench.gpu_check import record
from bench.gpu_check.device import Device
from bench.gpu_check.journal import Journal
from bench.gpu_check.run import Check
from bench.gpu_check.schedule import SHARES, TOTAL, Schedule

# A dry run's time is there for a program that hangs, whatever else the machine does.
DRY_TOTAL = 600.0 * len(SHARES)

_START = time.perf_counter()


def child(options: argparse.Namespace) -> int:
    """One stage, in a process of its own."""
    import torch

    from bench.gpu_check import ahead, checks, networks, rows
    from stripe_kernels.testing import withdraw

    for lost in options.without:
        withdraw(lost)
    journal, end = Journal(options.journal), _START + options.seconds
    names = checks.names_of(options.dry_run)
    if options.stage == "compile":
        failed = ahead.compile_part(names, options.part, options.parts) if not options.dry_run else []
        for what in failed:
            journal.note("failed", what=what)
        return 0
    torch.backends.cudnn.benchmark = True
    device = Device.find(options.dry_run)
    rounds = 3 if options.dry_run else rows.ROUNDS
    if options.stage == "promises":
        checks.promises(device, end, journal)
    elif options.stage == "checks":
        tried = checks.kernels(device, checks.beside(options.dry_run))
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
    parser.add_argument(
        "--no-build", action="store_true", help="the extensions are built already, from these sources"
    )
    parser.add_argument(
        "--total", type=float, metavar="S",
        help=f"seconds in all, where not {TOTAL:.0f}: what is short is short for the last rows of layers",
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
    if options.no_build and not options.dry_run and (outdated := record.outdated_extensions()):
        sys.exit(f"gpu_check: built before its sources changed: {', '.join(map(str, outdated))}")
    # Told to end, as by timeout(1) or a terminal that closes, the record is written first; under nohup(1) it goes on.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit("gpu_check: told to end"))
    save = record.Writer(options.out, device.slug)
    total = options.total or (DRY_TOTAL if options.dry_run else TOTAL)
    with tempfile.TemporaryDirectory(prefix="gpu_check") as folder:
        check = Check(device, Schedule(total, _START), Path(folder), save, options.dry_run)
        found = check.run(build=not options.no_build)
    path = save(found)
    from bench.gpu_check.report import report

    print(report(found))
    print(f"record: {path}")
    return 0 if found["complete"] and not found["correctness"]["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
