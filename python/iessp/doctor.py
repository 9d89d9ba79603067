"""`iessp doctor`: what stripe_kernels.diagnose found, for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console

import stripe_kernels
from iessp.report import table


def run(seconds: float, console: Console) -> dict[str, Any]:
    """Prints the diagnosis and returns it, with `failed`: whether a kernel computes wrong."""
    with console.status(f"testing every kernel against float64, {seconds:.0f} s"):
        found = stripe_kernels.diagnose(seconds)
    for title, line in _lines(found):
        console.print(f"[bold]{title:<12}[/]{line}", highlight=False, soft_wrap=True)
    rows = [
        [name, kernel["state"], f"{kernel['checks']}" if kernel["checks"] else "", _verdict(kernel)]
        for name, kernel in sorted(found["kernels"].items(), key=lambda item: (item[1]["state"], item[0]))
    ]
    shown = table("Kernels", ["name", "state", "checks", "verdict"], rows)
    for column in shown.columns[1:]:
        column.justify = "left"
    console.print(shown)
    failures = [f"{name}: {f}" for name, kernel in found["kernels"].items() for f in kernel["failures"]]
    for failure in failures[:10]:
        console.print(f"[bold red]wrong[/] {failure}", highlight=False, soft_wrap=True)
    test = found["self_test"]
    verdict = f"[bold red]{test['failures']} wrong[/]" if test["failures"] else "all right"
    console.print(
        f"self-test on {test['device']}: {test['checks']} results against float64, {verdict}", highlight=False
    )
    return {**found, "failed": bool(failures)}


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and text of everything but the kernels."""
    versions, processor, cache = found["versions"], found["processor"], found["cache"]
    gpus = [f"{g['name']}, {g['capability']}, {g['bytes'] / 2**30:.0f} GiB" for g in found["gpus"]]
    damaged = f", {cache['unreadable']} damaged (they count as absent)" if cache["unreadable"] else ""
    writable = "" if cache["writable"] else ", NOT WRITABLE: tuned choices last for one process"
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    compilers = "; ".join(f"{name}: {version or 'absent'}" for name, version in found["compilers"].items())
    return [
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("processor", f"{processor['name']}, {processor['cores']} cores, {threads}"),
        ("kernels for", ", ".join(processor["isas"]) or "no instruction set: the CPU extension is missing"),
        ("GPU", "; ".join(gpus) or "none that torch sees"),
        ("compilers", compilers),
        (
            "cache",
            f"{cache['folder']}: {cache['files']} files, {cache['bytes'] / 1e3:.0f} kB{damaged}{writable}",
        ),
        *(("missing", f"{backend}: {reason}") for backend, reason in found["missing"].items()),
    ]


def _verdict(kernel: dict[str, Any]) -> str:
    if kernel["failures"]:
        return f"{len(kernel['failures'])} WRONG"
    tested = "right" if kernel["checks"] else ""
    return ", ".join(part for part in (tested, kernel["reason"]) if part)
