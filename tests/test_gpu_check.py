"""bench/gpu_check without a GPU: a dry run of the whole program, its arithmetic, and the rule about quoted
records."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bench.gpu_check import __main__ as program
from bench.gpu_check import ahead, checks, networks, record, tools
from bench.gpu_check.checks import aligned
from bench.gpu_check.device import Device
from bench.gpu_check.report import layer_table, probe_text
from bench.gpu_check.rows import Ceilings, Setting, _auto, crossovers, settings
from bench.timing import Sample
from stripe_kernels import backends, registry
from stripe_kernels.backends import cuda_stripe_gemm
from stripe_kernels.registry import Problem
from stripe_kernels.testing import CASES, Prepared
from tests.tree import ROOT, needs_sources

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "DESIGN.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("bench/**/*.md"),
]


@needs_sources
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
    folder.mkdir(parents=True)
    found = {"sources": record.source_hash(tmp_path), "dry_run": False, "complete": True}
    (folder / "some-gpu.json").write_text(json.dumps(found))
    return tmp_path


def test_a_record_has_one_name_and_takes_nobodys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = (record.Writer(tmp_path / "records", "some-gpu") for _ in range(2))
    began = {"date": "2026-11-27T23:59:59+00:00", "run": 1}
    path = first(began)
    assert path.name == "some-gpu-2026-11-27.json"
    assert second(began | {"run": 2}).name == "some-gpu-2026-11-27-2.json"
    assert first(began | {"complete": True}) == path
    assert json.loads(path.read_text()) == began | {"complete": True}
    assert len(list(path.parent.iterdir())) == 2, "nothing is left aside"

    def full(self: Path, text: str) -> None:
        self.write_bytes(text[:5].encode())
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        first(began)
    assert json.loads(path.read_text())["complete"], "what was whole stays whole"


@needs_sources
def test_a_stale_record_is_named(tree: Path) -> None:
    quote = "1.0 ms (bench/records/some-gpu.json)"
    assert record.source_hash(tree) == record.source_hash()
    assert record.stale_quotes(quote, tree) == []
    with (tree / "stripe_kernels/backends/triton/fprop.py").open("a") as file:
        file.write("\n")
    (problem,) = record.stale_quotes(quote, tree)
    assert "some-gpu.json measured sources" in problem


@needs_sources
def test_a_missing_record_and_a_dry_run_are_named(tree: Path) -> None:
    assert "does not exist" in record.stale_quotes("bench/records/other.json", tree)[0]
    dry = {"sources": record.source_hash(tree), "dry_run": True, "complete": True}
    (tree / "bench/records/dry.json").write_text(json.dumps(dry))
    assert "dry run" in record.stale_quotes("see bench/records/dry.json", tree)[0]
    broken = {"sources": record.source_hash(tree), "dry_run": False, "complete": False}
    (tree / "bench/records/broken.json").write_text(json.dumps(broken))
    assert "did not finish" in record.stale_quotes("see bench/records/broken.json", tree)[0]
    stages = {"checks": {"status": "done"}, "layers": {"status": "stopped at its deadline"}}
    (tree / "bench/records/broken.json").write_text(json.dumps({**broken, "stages": stages}))
    assert "did not finish" in record.stale_quotes("see bench/records/broken.json", tree)[0]
    stages["layers"]["status"] = "done"
    (tree / "bench/records/broken.json").write_text(json.dumps({**broken, "stages": stages}))
    assert record.stale_quotes("see bench/records/broken.json", tree) == []
    broken |= {"stages": stages, "correctness": {"done": 0}}
    (tree / "bench/records/broken.json").write_text(json.dumps(broken))
    assert "checked nothing" in record.stale_quotes("see bench/records/broken.json", tree)[0]
    (tree / "bench/records/broken.json").write_text(json.dumps({**broken, "sanitizer": [{"ok": True}] * 2}))
    assert record.stale_quotes("see bench/records/broken.json", tree) == []


@needs_sources
def test_a_record_whose_build_failed_is_not_quoted(tree: Path) -> None:
    unbuilt = {
        "sources": record.source_hash(tree),
        "dry_run": False,
        "complete": True,
        "build": {"ok": False},
    }
    (tree / "bench/records/unbuilt.json").write_text(json.dumps(unbuilt))
    assert record.stale_quotes("bench/records/unbuilt.json", tree) == [
        "bench/records/unbuilt.json did not build"
    ]


@needs_sources
def test_an_extension_older_than_its_sources_is_named(tree: Path) -> None:
    extension = tree / "stripe_kernels/_cuda.some-abi.so"
    extension.touch()
    sources = [p for p in (tree / "csrc").rglob("*") if p.is_file()]
    for path in (extension, *sources, *(tree / "stripe_kernels").rglob("*.py")):
        os.utime(path, (1000, 1000))
    assert record.outdated_extensions(tree) == []
    os.utime(tree / "stripe_kernels/phases.py", (2000, 2000))
    assert record.outdated_extensions(tree) == [], "Python has no build"
    os.utime(tree / "csrc/bindings/cuda.cpp", (1001, 1001))
    assert record.outdated_extensions(tree) == [extension]


@pytest.mark.parametrize("option", ["--no-build", "--total=480"])
def test_what_is_not_built_is_checked_where_it_is_of_these_sources(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    class Begun(Exception):
        pass

    def begin(*arguments: object) -> None:
        raise Begun

    monkeypatch.setattr(program, "Check", begin)
    monkeypatch.setattr(program.Device, "find", lambda dry_run: Device("cpu", "a CPU in a GPU's place", 0))
    monkeypatch.setattr(record, "outdated_extensions", lambda: [Path("_cuda.so")])
    handled: list[int] = []
    monkeypatch.setattr(program.signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(program.signal, "signal", lambda number, handler: handled.append(number))
    monkeypatch.setattr(sys, "argv", ["gpu_check", option])
    ends = pytest.raises(SystemExit, match=r"built before its sources changed: _cuda\.so")
    with ends if option == "--no-build" else pytest.raises(Begun):
        program.main()
    assert handled == ([] if option == "--no-build" else [signal.SIGTERM, signal.SIGHUP])


@needs_sources
def test_older_kernels_may_be_quoted_where_the_sentence_says_so(tree: Path) -> None:
    with (tree / "stripe_kernels/backends/triton/fprop.py").open("a") as file:
        file.write("\n")
    (tree / "bench/records/some-gpu.json").rename(tree / "bench/records/nvidia-x.json")
    assert record.stale_quotes("1.3 times (nvidia-x.json), with older\nkernels", tree) == []
    assert len(record.stale_quotes("- 1.3 times, nvidia-x.json\n- with older kernels", tree)) == 1
    assert len(record.stale_quotes("1.3 times (nvidia-x.json)\n\nolder kernels", tree)) == 1
    assert len(record.stale_quotes("1.3 times (nvidia-x.json). With older kernels 1.2", tree)) == 1
    assert "does not exist" in record.stale_quotes("older kernels: nvidia-y.json", tree)[0]


@needs_sources
def test_a_record_of_another_kind_only_has_to_exist(tree: Path) -> None:
    (tree / "bench/records/cpu.json").write_text(json.dumps({"rows": []}))
    assert record.stale_quotes("bench/records/cpu.json", tree) == []


@needs_sources
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


def test_a_row_states_both_roofs_and_what_holds_a_kernel() -> None:
    ceilings = Ceilings(copy=1e9, gemm={"float32": 1e12})
    setting = Setting(16, 5, 2, 0.24, "float32", "fprop")
    case = setting.case()
    values = 2 * 2 * 16 * 25 + case.skeleton.stripes * 16
    roofs = ceilings.roofs(setting, case)
    assert roofs["memory"] == pytest.approx(4 * values / 1e9)
    assert roofs["math"] == pytest.approx(2 * case.shape.macs(case.skeleton.stripes) / 1e12)
    assert max(roofs, key=roofs.__getitem__) == "memory"
    line = {**row(0.24, 2.0), "roof": "memory"}
    for share, held in ((0.8, "memory"), (0.5, "own work")):
        line["contestants"]["triton[1]"] |= {"low": 1.9, "high": 2.1, "share_of_roof": share}
        assert layer_table([line]).splitlines()[1].split("  ")[-2].strip() == held


def test_crossover_lies_where_the_ratio_passes_one() -> None:
    (found,) = crossovers([row(0.5, 0.5), row(0.1, 4.0), row(0.25, 2.0)])
    assert (found["kernel"], found["bound"]) == ("triton", "at")
    assert found["density"] == pytest.approx(0.375)


@pytest.mark.parametrize(("ratio", "bound", "density"), [(0.9, "below", 0.1), (1.5, "at least", 0.5)])
def test_crossover_outside_what_was_measured_is_a_bound(ratio: float, bound: str, density: float) -> None:
    (found,) = crossovers([row(0.1, ratio), row(0.5, ratio)])
    assert (found["bound"], found["density"]) == (bound, density)


def test_rates_of_wgmma_are_shown_or_why_there_are_none() -> None:
    found = {"wgmma": [{"rows": 128, "n": 128, "one_group": 1900.0, "two_groups": 2048.0}]}
    assert "2048" in probe_text(found)
    assert "written for 9.0" in probe_text({"left_out": "the probes are written for 9.0"})


def test_a_kernel_that_crashes_is_lost_and_a_wrong_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = {
        "right": "pass",
        "wrong": f"raise SystemExit({tools.WRONG})",
        "lost its device": "print('an illegal access'); raise SystemExit(3)",
        "crashes": "import os; os.abort()",
    }
    monkeypatch.setattr(tools, "_alone", lambda names: [sys.executable, "-c", programs[names[0]]])
    lost, unknown = tools.first_tries(list(programs), seconds=1e4, most=1e4)
    assert set(lost) == {"lost its device", "crashes"}
    assert unknown == []
    assert "an illegal access" in lost["lost its device"]


@pytest.mark.parametrize(
    ("most", "hanging", "unknown"),
    [(90.0, ["hangs"], []), (70.0, [], ["hangs"]), (50.0, [], ["slow", "hangs"])],
)
def test_a_kernel_hangs_where_its_own_time_is_over_and_not_where_all_are_slow(
    monkeypatch: pytest.MonkeyPatch, most: float, hanging: list[str], unknown: list[str]
) -> None:
    now = 0.0

    def took(seconds: float, code: int | None) -> dict[str, Any]:
        nonlocal now
        now += seconds
        return {"code": code, "output": "so far"}

    def all_at_once(commands: list[list[str]], seconds: float, keep: bool) -> list[dict[str, Any]]:
        took(seconds, None)
        return [took(0.0, 0 if command == ["fast"] else None) for command in commands]

    monkeypatch.setattr(tools, "_alone", list)
    monkeypatch.setattr(tools, "run_together", all_at_once)
    monkeypatch.setattr(tools, "run", lambda c, s, keep: took(s, None) if c == ["hangs"] else took(8.0, 0))
    lost, left = tools.first_tries(["fast", "slow", "hangs"], 50.0, most, lambda: now)
    assert [name for name, reason in lost.items() if reason == "hangs: so far"] == hanging == list(lost)
    assert left == unknown


def test_the_small_set_runs_both_gathers_and_the_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compute-sanitizer runs of kernels that refuse most problems: every launch of the native gather."""
    native = {"native gather": object, "native gather's refusal": cuda_stripe_gemm.refuse, "gather": object}
    backends.load()
    monkeypatch.setattr(registry, "_parts", native)
    reached = set()
    for case, dtype, layout in checks.cases(checks.SMALL):
        for which in registry.PASSES:
            problem = Problem(case.shape, case.skeleton, str(dtype)[6:], "cuda", layout == "channels_last", 1)
            candidates = registry.find("stripe_gemm").candidates(problem, which)
            best = sorted(candidates, key=candidates.__getitem__)[: checks.CONFIGS]
            reached |= {(which, config[1]) for config in best}
    assert reached == {(which, gather) for which in registry.PASSES for gather in (1, 2)}
    assert all(checks.aligned(CASES[name]).shape.group_c <= 15 for name in checks.SMALL), "triton_stem's most"


def test_what_a_gpu_promises_of_training() -> None:
    """Of every kernel that has all passes, in a graph and on a stream; torch.compile by the operators alone."""
    names = ["cuda_wgmma", "cuda_mma_tf32", "triton_stem"]
    with (
        patch.object(checks, "kernels", lambda device, without: names),
        patch.object(torch.cuda, "device_count", lambda: 1),
    ):
        promised = list(checks.promised(Device("cuda", "", 0)))
    assert len(promised) == len(set(promised))
    for name in ("CUDA graph of training", "stream of training"):
        assert [p.rpartition(", ")[2] for p in promised if p.startswith(f"{name}, ")] == [
            "auto",
            "cuda_wgmma",
        ]
    assert {p.rpartition(", ")[2] for p in promised if "compile" in p} == {"auto", "triton_stem"}
    assert {"CUDA graph, cuda_wgmma", "two streams, triton_stem"} <= set(promised)


def test_checks_only_tries_the_kernels_it_is_given() -> None:
    """What first_tries and compute-sanitizer start, on the CPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [*tools._alone(["stripe_gemm"]), "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_checks_launch_is_compiled_before_what_rows_launch() -> None:
    whats = [what for _, what, _ in ahead.calls(checks.SMALL)]
    first = min(whats.index(setting.what) for setting in settings(dry_run=False))
    assert first == 2 * 2 * 3 * 3 + 1, "all checks, and the first layer of a network"


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
    assert {name: stage["status"] for name, stage in found["stages"].items()} == dict.fromkeys(
        ("compile", "promises", "checks", "networks", "layers"), "done"
    )
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
    assert found["networks"][0]["left_out"] == {}
    compiled = "dense, BN folded, torch.compile eager"
    everybody = {"dense", "dense, BN folded", compiled, "frozen", "optimized"}
    assert set(found["networks"][0]["contestants"]) == everybody
    assert "WRONG" not in result.stdout
    assert "PARTIAL" not in result.stdout
    assert "measured / predicted" in result.stdout
    assert found["layers_left_out"] == found["networks_left_out"] == []
    assert "no figure above means anything" in result.stdout


def test_auto_stays_with_cudnn_where_the_gain_is_within_luck() -> None:
    def chosen(gain: float) -> str:
        samples = {
            name: Sample(np.full(8, seconds), 1)
            for name, seconds in (("cudnn", 1.0), ("triton[1]", 1 / gain))
        }
        return _auto(samples, {name: Prepared(lambda o: o.x, 1.0) for name in samples})["tuned"]

    assert [chosen(g) for g in (0.5, 1.01, 1.05)] == ["cudnn", "cudnn", "triton[1]"]


def test_a_compiler_that_hangs_or_fails_loses_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(module: torch.nn.Module, **how: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        tries.append(how)
        if len(tries) == 2:
            raise RuntimeError("no compiler")
        while True:
            try:
                time.sleep(10)
            except TimeoutError:
                if len(caught) == 1:
                    raise
                caught.append("the first")

    tries: list[Any] = []
    caught: list[str] = []
    monkeypatch.setattr(networks, "_MODES", dict(networks._MODES))
    monkeypatch.setattr(networks, "_COMPILE_SECONDS", 0.1)
    monkeypatch.setattr(torch, "compile", compile_)
    left: dict[str, str] = {}
    device = Device("cuda", "", 0)
    assert networks._compiled(device, torch.nn.ReLU(), torch.ones(1), left) == {}
    assert [reason.split(":")[0] for reason in left.values()] == ["TimeoutError", "RuntimeError"]
    assert networks._compiled(device, torch.nn.ReLU(), torch.ones(1), left) == {}
    assert len(tries) == 2
