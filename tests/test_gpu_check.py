"""bench/gpu_check without a GPU: a dry run of the whole program, its arithmetic, and the rule about quoted
records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import record, tools
from bench.gpu_check.checks import aligned
from bench.gpu_check.device import Device
from bench.gpu_check.probes import merge_over_math
from bench.gpu_check.report import probe_text
from bench.gpu_check.rows import crossovers, settings
from stripe_kernels.testing import CASES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "DESIGN.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("bench/**/*.md"),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_quoted_records_are_of_this_code(document: Path) -> None:
    assert record.stale_quotes(document.read_text()) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources the hash covers, and a record of them."""
    for pattern in record.SOURCES:
        for path in (p for p in ROOT.glob(pattern) if p.is_file()):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    folder = tmp_path / "bench/records"
    written = record.write(
        {"sources": record.source_hash(tmp_path), "dry_run": False, "complete": True}, folder, "some-gpu"
    )
    written.rename(folder / "some-gpu.json")
    return tmp_path


def test_a_stale_record_is_named(tree: Path) -> None:
    quote = "1.0 ms (bench/records/some-gpu.json)"
    assert record.source_hash(tree) == record.source_hash()
    assert record.stale_quotes(quote, tree) == []
    with (tree / "stripe_kernels/backends/triton/fprop.py").open("a") as file:
        file.write("\n")
    (problem,) = record.stale_quotes(quote, tree)
    assert "some-gpu.json measured sources" in problem


def test_a_missing_record_and_a_dry_run_are_named(tree: Path) -> None:
    assert "does not exist" in record.stale_quotes("bench/records/other.json", tree)[0]
    dry = {"sources": record.source_hash(tree), "dry_run": True, "complete": True}
    (tree / "bench/records/dry.json").write_text(json.dumps(dry))
    assert "dry run" in record.stale_quotes("see bench/records/dry.json", tree)[0]
    broken = {"sources": record.source_hash(tree), "dry_run": False, "complete": False}
    (tree / "bench/records/broken.json").write_text(json.dumps(broken))
    assert "did not finish" in record.stale_quotes("see bench/records/broken.json", tree)[0]


def test_a_record_of_another_kind_only_has_to_exist(tree: Path) -> None:
    (tree / "bench/records/cpu.json").write_text(json.dumps({"rows": []}))
    assert record.stale_quotes("bench/records/cpu.json", tree) == []


def test_the_hash_covers_every_gpu_kernel() -> None:
    covered = {p for pattern in record.SOURCES for p in ROOT.glob(pattern)}
    kernels = [*(ROOT / "stripe_kernels/backends/triton").glob("*.py"), *(ROOT / "csrc/cuda").rglob("*.cu*")]
    assert kernels
    assert set(kernels) <= covered


def row(density: float, ratio: float) -> dict[str, Any]:
    numbers = {"seconds": 1 / ratio, "over_cudnn": ratio}
    fields = {"which": "fprop", "dtype": "bfloat16", "layer": "64-64@56x56", "batch": 8, "density": density}
    return {
        **fields,
        "contestants": {
            "cudnn": {"seconds": 1.0},
            "triton[1]": numbers,
            "triton[2]": {**numbers, "seconds": 9.0},
        },
    }


def test_crossover_lies_where_the_ratio_passes_one() -> None:
    (found,) = crossovers([row(0.5, 0.5), row(0.1, 4.0), row(0.25, 2.0)])
    assert (found["kernel"], found["bound"]) == ("triton", "at")
    assert found["density"] == pytest.approx(0.375)


@pytest.mark.parametrize(("ratio", "bound", "density"), [(0.9, "below", 0.1), (1.5, "at least", 0.5)])
def test_crossover_outside_what_was_measured_is_a_bound(ratio: float, bound: str, density: float) -> None:
    (found,) = crossovers([row(0.1, ratio), row(0.5, ratio)])
    assert (found["bound"], found["density"]) == (bound, density)


def test_merge_hides_behind_the_products_of_enough_channels() -> None:
    """2048 multiply-adds and 16 merged values a cycle: a value costs as much as 128 channels of products."""
    found: dict[str, Any] = {
        "wgmma": [{"rows": 128, "n": 128, "one_group": 1900.0, "two_groups": 2048.0}],
        "merge": [{"rows": 128, "n": 128, "merge": 16.0, "wgmma_slowed": 1.1, "merge_slowed": 1.2}],
    }
    (ratio,) = merge_over_math(found)
    assert (ratio["C=64"], ratio["C=128"], ratio["C=512"]) == (2.0, 1.0, 0.25)
    text = probe_text({**found, "merge_over_math": [ratio]})
    assert "2048" in text
    assert "0.25" in text
    assert "written for 9.0" in probe_text({"left_out": "the probes are written for 9.0"})


def test_a_kernel_that_hangs_or_crashes_is_lost_and_a_wrong_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = {
        "right": "pass",
        "wrong": f"raise SystemExit({tools.WRONG})",
        "lost its device": "print('an illegal access'); raise SystemExit(3)",
        "crashes": "import os; os.abort()",
        "hangs": "import time; time.sleep(60)",
    }
    monkeypatch.setattr(tools, "_alone", lambda names: [sys.executable, "-c", programs[names[0]]])
    lost = tools.first_tries(list(programs), seconds=5.0)
    assert set(lost) == {"lost its device", "crashes", "hangs"}
    assert "an illegal access" in lost["lost its device"]
    assert lost["hangs"].startswith("hangs")


def test_the_stages_of_a_gpu_in_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a dry run leaves out: every stage in the order and with the deadlines of a GPU, programs replaced."""
    from bench.gpu_check import __main__ as program
    from bench.gpu_check import checks, networks, probes, report, rows

    few = {name: CASES[name] for name in checks.SMALL}
    monkeypatch.setattr("stripe_kernels.testing.CASES", few)
    monkeypatch.setattr(
        tools, "first_tries", lambda kernels, seconds: {"cuda_ffma": "hangs: "} if kernels else {}
    )
    monkeypatch.setattr(
        tools, "sanitize", lambda kernels, seconds: [{"command": "memcheck", "ok": True, "output": ""}]
    )
    monkeypatch.setattr(probes, "probe", lambda seconds: {"left_out": "no GPU"})
    tiny = rows.settings(dry_run=True)[:1]
    monkeypatch.setattr(rows, "settings", lambda dry_run: tiny)
    monkeypatch.setattr(rows, "ROUNDS", 3)
    monkeypatch.setattr(networks, "NETWORKS", ())
    for module in (checks, rows):  # Triton's interpreter would take minutes
        monkeypatch.setattr(
            module,
            "kernels",
            lambda device, without=(): [n for n in ("dense", "stripe_gemm") if n not in without],
        )
    monkeypatch.setattr(program, "_START", time.perf_counter())
    saved: list[int] = []
    found = program.check(
        Device("cpu", "a CPU in a GPU's place", 0),
        False,
        False,
        lambda record: saved.append(len(record)) or tmp_path,
    )
    assert found["complete"]
    assert len(saved) == 3
    assert found["correctness"]["failures"] == []
    assert found["correctness"]["skipped_for_time"] == 0
    assert "cuda_ffma" not in found["layers"][0]["refused"]
    assert "no GPU" in report.report(found)


def test_checks_only_tries_the_kernels_it_is_given() -> None:
    """What first_tries and compute-sanitizer start, on the CPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [*tools._alone(["stripe_gemm"]), "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_aligned_cases_have_channels_that_tensor_cores_take() -> None:
    for case in CASES.values():
        shape = aligned(case).shape
        assert shape.group_c % 8 == shape.group_k % 8 == 0
        assert (shape.R, shape.S, shape.stride, shape.groups) == (
            case.shape.R,
            case.shape.S,
            case.shape.stride,
            case.shape.groups,
        )


def test_settings_cover_passes_dtypes_and_densities() -> None:
    every = settings(dry_run=False)
    assert len(set(every)) == len(every)
    assert {s.which for s in every} == {"fprop", "dgrad", "wgrad"}
    assert {s.dtype for s in every} == {"bfloat16", "float16", "tf32", "float32"}
    assert {s.density for s in every} >= {0.1, 0.24, 0.5}


def test_dry_run(tmp_path: Path) -> None:
    """The whole program on the CPU: every stage runs, results are checked, a record is written, tables come
    last."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--no-build", f"--out={tmp_path}"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("dry-run-*.json")
    found = json.loads(path.read_text())
    assert found["dry_run"]
    assert found["complete"]
    assert found["sources"] == record.source_hash()
    assert found["correctness"]["done"] > 0
    assert found["correctness"]["failures"] == []
    assert set(found["promises"].values()) == {"ok"}
    assert {r["which"] for r in found["layers"]} == {"fprop", "dgrad", "wgrad"}
    for line in found["layers"]:
        assert {"cudnn", "stripe_gemm"} <= {name.split("[")[0] for name in line["contestants"]}
        assert line["wrong"] == {}
        assert "triton" in line["refused"]
        assert all(c["seconds"] > 0 and c["n"] > 1 for c in line["contestants"].values())
    assert found["networks"][0]["wrong"] == {}
    assert set(found["networks"][0]["contestants"]) == {"dense", "dense, BN folded", "frozen", "optimized"}
    assert "WRONG" not in result.stdout
    assert found["layers_left_out"] == found["networks_left_out"] == []
    assert "no figure above means anything" in result.stdout
