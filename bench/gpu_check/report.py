"""The record as text, the tables last."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.gpu_check.record import not_quotable
from bench.gpu_check.rows import best, limit

SLOWER = 1.02  # times cuDNN's: what auto may take before it counts as slower


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(
        cell.ljust(w) if i == 0 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _layer(row: dict[str, Any]) -> list[str]:
    dense, chosen = row["contestants"].get("cudnn"), best(row)
    head = [f"{row['which']} {row['dtype']} {row['layer']}", str(row["batch"]), f"{row['density']:.2f}"]
    if chosen is None:
        return [*head, *["-"] * 8]
    name, numbers = chosen
    ratio = [f"{numbers[k]:.2f}" if k in numbers else "-" for k in ("over_cudnn", "low", "high")]
    return [
        *head,
        f"{dense['seconds'] * 1e6:.1f}" if dense else "wrong",
        f"{numbers['seconds'] * 1e6:.1f}",
        *ratio,
        f"{numbers['share_of_roof']:.0%} {row['roof']}",
        limit(row, numbers),
        name,
    ]


def layer_table(rows: list[dict[str, Any]]) -> str:
    head = ["layer", "N", "d", "cudnn us", "best us", "x", "low", "high", "of roof", "limit", "kernel"]
    return table([head, *(_layer(row) for row in rows)])


def network_table(rows: list[dict[str, Any]]) -> str:
    lines = [["network", "N", "contestant", "ms", "x dense", "low", "high"]]
    for row in rows:
        for name, numbers in row["contestants"].items():
            lines.append(
                [
                    f"{row['network']} {row['dtype']}",
                    str(row["batch"]),
                    name,
                    f"{numbers['seconds'] * 1e3:.3f}",
                    *(f"{numbers[k]:.2f}" for k in ("over_dense", "low", "high")),
                ]
            )
    return table(lines)


def probe_text(found: dict[str, Any]) -> str:
    """What decides about wgmma: multiply-adds a processor and cycle by columns."""
    if "wgmma" not in found:
        return f"probes: {found.get('left_out', 'none in a dry run')}"
    rates = [["wgmma rows x columns", "one group", "two groups"]]
    rates += [
        [f"{r['rows']} x {r['n']}", f"{r['one_group']:.0f}", f"{r['two_groups']:.0f}"] for r in found["wgmma"]
    ]
    return table(rates)


def _crossovers(found: list[dict[str, Any]]) -> str:
    lines = [["crossover density", "kernel", "d"]]
    for row in found:
        bound = "" if row["bound"] == "at" else row["bound"] + " "
        lines.append(
            [
                f"{row['which']} {row['dtype']} {row['layer']} N={row['batch']}",
                row["kernel"],
                f"{bound}{row['density']:.2f}",
            ]
        )
    return table(lines)


def _slow(row: dict[str, Any]) -> str:
    auto, setting = row["auto"], " ".join(_layer(row)[:3])
    ratio = f"{auto['over_cudnn']:.2f} [{auto['low']:.2f}, {auto['high']:.2f}]"
    return f"auto slower than cuDNN: {setting}: {auto['tuned']} {ratio}"


def _troubles(found: dict[str, Any]) -> list[str]:
    """Everything that did not go as it should, one line each."""
    checks = found["correctness"]
    lines = [
        f"PARTIAL {name}: {stage['status']}"
        for name, stage in found["stages"].items()
        if stage["status"] != "done"
    ]
    lines += [
        f"{name} crashed with {crash['status']}: {crash['output'][-300:]}"
        for name, stage in found["stages"].items()
        for crash in stage.get("crashes", ())
    ]
    lines += [f"not compiled: {text}" for text in found["stages"].get("compile", {}).get("failed", ())]
    if not found.get("build", {"ok": True})["ok"]:
        lines.append(f"not built: {found['build']['output'][-1500:]}")
    lines += [f"LOST {name}: {reason}" for name, reason in found.get("lost", {}).items()]
    if not found["dry_run"] and not any(name.startswith("cuda_") for name in found["kernels"]):
        lines.append(f"no CUDA kernel was built: {found.get('build', {}).get('output', 'not tried')[-1500:]}")
    lines += [f"WRONG {text}" for text in checks["failures"]]
    if checks["skipped_for_time"]:
        by_kernel = ", ".join(f"{n} of {name}" for name, n in checks.get("skipped", {}).items())
        lines.append(f"{checks['skipped_for_time']} correctness checks: no time: {by_kernel}")
    lines += [f"{what}: {result}" for what, result in found["promises"].items() if result != "ok"]
    lines += [
        f"{row['command'][:60]}: {row['output'][-300:]}"
        for row in found.get("sanitizer", [])
        if not row["ok"]
    ]
    lines += [
        f"WRONG {row['layer']} {name}: {text}"
        for row in found["layers"]
        for name, text in row["wrong"].items()
    ]
    lines += [
        f"WRONG {row['network']} {name}: {text}"
        for row in found["networks"]
        for name, text in row["wrong"].items()
    ]
    lines += [
        f"left out: {row['network']} N={row['batch']} {name}: {text}"
        for row in found["networks"]
        for name, text in row.get("left_out", {}).items()
    ]
    lines += [_slow(row) for row in found["layers"] if row["auto"].get("high", 1.0) < 1 / SLOWER]
    lines += [f"left out: {text}" for text in found["layers_left_out"] + found["networks_left_out"]]
    return lines


def predictions(rows: list[dict[str, Any]]) -> str:
    """How far the cost model is off: the median of measured over predicted seconds, by pass and kernel, and the
    quartiles. Where these are narrow the model sorts configurations well, whatever the median."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for name, numbers in row["contestants"].items():
            ratios.setdefault((row["which"], name.split("[")[0]), []).append(
                numbers["seconds"] / numbers["predicted"]
            )
    lines = [["measured / predicted", "n", "median", "quartiles"]]
    for (which, kernel), values in sorted(ratios.items()):
        low, middle, high = np.percentile(values, (25, 50, 75))
        lines.append([f"{which} {kernel}", str(len(values)), f"{middle:.2f}", f"{low:.2f}-{high:.2f}"])
    return table(lines)


def _ceilings(found: dict[str, Any]) -> str:
    if found["ceilings"] is None:
        return "ceilings: not measured"
    rates = found["ceilings"]["gemm_flops"].items()
    gemm = ", ".join(f"{name} {value / 1e12:.1f} TFLOP/s" for name, value in rates)
    return f"copy {found['ceilings']['copy_bytes_per_second'] / 1e9:.0f} GB/s, GEMM {gemm}"


def report(found: dict[str, Any]) -> str:
    """Troubles, ceilings, crossovers, and last the tables."""
    parts = [
        f"{found['device']}, sources {found['sources']}, commit {found['commit']}, {found['versions']}",
        "\n".join(_troubles(found)) or "no troubles",
        _ceilings(found),
        probe_text(found.get("probes", {})),
        predictions(found["layers"]),
        _crossovers(found.get("crossovers", [])),
        layer_table(found["layers"]),
        network_table(found["networks"]),
    ]
    if not found["complete"]:
        parts.append("A PARTIAL record: see the troubles above.")
    if reason := not_quotable(found):
        parts.append(f"Documents may not quote this record: it {reason}.")
    if found["dry_run"]:
        parts.append("A dry run on the CPU: it tests this program; no figure above means anything.")
    return "\n\n".join(parts)
