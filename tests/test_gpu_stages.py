"""The stages of bench/gpu_check: who has how long, what is stopped, and what the record says. No GPU, no real time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import checks, networks, probes, programs, report, rows, stages, tools
from bench.gpu_check.device import Device
from bench.gpu_check.journal import Journal
from bench.gpu_check.rows import DTYPES, layer_rows, settings
from bench.gpu_check.run import Check, gathered_checks, gathered_promises, gathered_rows
from bench.gpu_check.schedule import SHARES, Schedule
from bench.gpu_check.stages import run_stage
from stripe_kernels.testing import CASES
from tests.tree import ROOT


def test_a_program_that_is_stopped_takes_along_what_it_began(tmp_path: Path) -> None:
    began = tmp_path / "began"
    lasting = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("so far", flush=True)
open({str(tmp_path / "written")!r}, "w").write(str(child.pid))
open({str(tmp_path / "written")!r}).close()
import os; os.rename({str(tmp_path / "written")!r}, {str(began)!r})
time.sleep(600)
"""
    with programs.together([[sys.executable, "-c", lasting]]) as (program,):
        while not began.exists():
            time.sleep(0.01)
        ended = program.wait(time.perf_counter())
    assert (ended.code, ended.stdout) == (None, "so far\n")
    state = Path(f"/proc/{began.read_text()}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(0.01)


def test_a_program_that_stays_though_killed_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with programs.together([[sys.executable, "-c", ""]]) as (program,):
        process, waits = program._process, list[float]()
        kept = process.wait

        def stays(timeout: float) -> int:
            waits.append(timeout)
            raise subprocess.TimeoutExpired("held", timeout)

        process.wait = stays  # type: ignore[method-assign, assignment]
        ended = program.wait(time.perf_counter())
        kept()
    assert waits == [0.0, 10.0]
    assert ended.code is None
    assert f"process {process.pid} stays" in ended.stderr
    assert ended.stderr in capfd.readouterr().out


def test_what_one_set_of_kernels_does_under_the_sanitizer_says_nothing_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\ncase "$*" in *stripe_gemm*) exit 9;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = tools.sanitize((["cuda_ffma:dgrad"], ["stripe_gemm", "triton_stem"], []), 60.0)
    wanted = [
        (tool, kernels, code)
        for kernels, code in (("cuda_ffma:dgrad", 0), ("stripe_gemm triton_stem", 9))
        for tool in ("memcheck", "racecheck")
    ]
    assert [
        (r["command"].split()[2], r["command"].partition("--kernels ")[2], r["code"]) for r in found
    ] == wanted
    assert not any("/" in r["command"] for r in found), "a record names tools, not where they lie"


class Times:
    """A clock, and programs that take as long as `wanted` says of their stage, or as they may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, float]) -> None:
        self.now, self.had = 0.0, dict[str, tuple[float, float]]()
        self.wanted = {"build": 0.0} | wanted
        monkeypatch.setattr(stages, "parts_of", lambda *arguments: nullcontext([]))
        monkeypatch.setattr(
            stages, "wait_for", lambda parts, end: self.stage("compile", max(0.0, end - self.now))
        )
        monkeypatch.setattr(tools, "build", self.build)
        monkeypatch.setattr(tools, "first_tries", self.first_tries)
        monkeypatch.setattr(tools, "sanitize", lambda sets, seconds: [self.stage("sanitizer", seconds)])
        monkeypatch.setattr(probes, "probe", lambda seconds: self.stage("probes", seconds))
        monkeypatch.setattr(stages, "run_stage", self.run_stage)
        self.promise, self.lost = "ok", dict[str, str]()

    def clock(self) -> float:
        return self.now

    def stage(self, name: str, seconds: float) -> dict[str, Any]:
        """`had`: what it may take, and when it began."""
        self.had[name] = seconds, self.now
        over = self.wanted.get(name, 1.0) > seconds
        self.now += min(self.wanted.get(name, 1.0), seconds)
        code = None if over else 0
        return {
            "status": "stopped" if over else "done",
            "command": name,
            "ok": not over,
            "code": code,
            "output": "",
        }

    def build(self, seconds: float) -> dict[str, Any]:
        built = self.stage("build", seconds)
        self.build_had, _ = self.had.pop("build", (0.0, 0.0))
        return built

    def run_stage(self, name: str, journal: Journal, end: float, options: list[str]) -> dict[str, Any]:
        ended = self.stage(name, end - self.now)
        if name == "promises":
            for what in checks.promised(GPU):
                journal.note("promise", what=what, result=self.promise)
        return ended

    def first_tries(
        self, kernels: list[str], seconds: float, most: float
    ) -> tuple[dict[str, str], list[str]]:
        over = self.stage("tries", seconds).get("code", 0) is None
        return self.lost, ["cuda_ffma:fprop"] if over else []


GPU = Device("cpu", "a CPU in a GPU's place", 0)


@pytest.mark.parametrize(
    "late", [[], ["compile"], ["tries"], ["compile", "tries", "sanitizer", "probes"], [*SHARES]]
)
@pytest.mark.parametrize("total", [480.0, 580.0, 240.0])
def test_no_stage_takes_the_time_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: list[str], total: float
) -> None:
    times = Times(monkeypatch, dict.fromkeys(late, 1e6))
    check = Check(GPU, Schedule(total, 0.0), tmp_path, lambda record: None, clock=times.clock)
    found = check.run(build=True)
    assert list(times.had) == list(SHARES)
    own = {name: check.schedule.own(name) for name in SHARES}
    for name in ("promises", "checks", "networks", "layers"):
        assert times.had[name][0] >= own[name] - 1e-9, name
    assert times.now <= total
    if late != [*SHARES]:
        took = sum(own[name] if name in late else 1.0 for name in SHARES if name != "layers")
        assert times.had["layers"][0] == pytest.approx(total - took), "layers have all that is left"
    assert found["complete"] is not bool(set(late) - {"compile", "probes"})


@pytest.mark.parametrize(("took", "built"), [(60.0, True), (124.0, True), (1e6, False)])
def test_a_build_takes_the_layers_time_before_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, took: float, built: bool
) -> None:
    times = Times(monkeypatch, {"build": took} | dict.fromkeys(SHARES, 1e6))
    check = Check(GPU, Schedule(480.0, 0.0), tmp_path, lambda record: None, clock=times.clock)
    found = check.run(build=True)
    assert times.build_had == 70 + 55, "its own, and the layers'"
    assert found["build"]["ok"] is built
    assert times.had["compile"][0] == max(0.0, 70 - min(took, 125.0)), (
        "Triton's compilers end with their share"
    )
    for name in ("tries", "promises", "checks", "networks", "sanitizer", "probes"):
        assert times.had[name][0] >= check.schedule.own(name) - 1e-9, name
    assert times.had["layers"][0] == pytest.approx(min(55.0, 125 - took) if built else 0.0)
    assert times.now <= 480


def test_compilers_of_triton_give_way_to_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report_niceness = [sys.executable, "-c", "import os; print(os.nice(0))"]
    monkeypatch.setattr(stages, "_command", lambda *arguments: report_niceness)
    with stages.parts_of("compile", tmp_path, 1, []) as ((compiler, _),):
        assert compiler.wait(float("inf")).stdout == "19\n"


@pytest.mark.parametrize(
    ("trouble", "complete"),
    [("none", True), ("build", False), ("lost", False), ("promise", False), ("sanitizer", False),
     ("no sanitizer", True)],
)  # fmt: skip
def test_a_record_is_complete_where_nothing_went_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trouble: str, complete: bool
) -> None:
    times = Times(monkeypatch, {})
    if trouble == "build":
        monkeypatch.setattr(tools, "build", lambda seconds: {"ok": False, "output": "no such file"})
    if trouble in ("sanitizer", "no sanitizer"):
        ran = {"command": "memcheck", "ok": False if trouble == "sanitizer" else None, "output": ""}
        monkeypatch.setattr(tools, "sanitize", lambda sets, seconds: [ran])
    times.lost = {"cuda_ffma:dgrad": "hangs: "} if trouble == "lost" else {}
    times.promise = "y differs" if trouble == "promise" else "ok"
    check = Check(GPU, Schedule(480.0, 0.0), tmp_path, lambda record: None, clock=times.clock)
    found = check.run(build=True)
    assert found["complete"] is complete
    assert ("PARTIAL" in report.report(found)) is not complete


@pytest.mark.parametrize(
    ("module", "function", "stage"), [(tools, "sanitize", "sanitizer"), (probes, "probe", "probes")]
)
def test_what_ends_a_stage_beside_the_checks_is_told_and_the_layers_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, function: str, stage: str
) -> None:
    times = Times(monkeypatch, {})

    def end(*arguments: object) -> None:
        raise ValueError("not what it prints")

    monkeypatch.setattr(module, function, end)
    check = Check(GPU, Schedule(480.0, 0.0), tmp_path, lambda record: None, clock=times.clock)
    found = check.run(build=True)
    assert found["stages"][stage]["status"] == "ended by ValueError: not what it prints"
    assert found["stages"]["layers"]["status"] == "done"
    assert not found["complete"]


def test_shares_are_of_eight_minutes() -> None:
    assert sum(share.own for share in SHARES.values()) == 480
    assert list(SHARES)[-1] == "layers", "what is short is short for its last rows"


@pytest.mark.parametrize("where", ["compile", "tries", "checks", "layers"])
def test_a_check_that_is_told_to_end_leaves_a_record_that_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    times = Times(monkeypatch, {})

    def stage(name: str, seconds: float) -> dict[str, Any]:
        if name == where:
            raise SystemExit
        return {"status": "done", "command": name, "ok": True, "output": ""}

    times.stage, times.promise = stage, "no time"  # type: ignore[method-assign]
    monkeypatch.setattr(checks, "kernels", lambda device, without=(): ["cuda_ffma", "stripe_gemm"])
    records: list[str] = []
    check = Check(
        GPU, Schedule(480.0, 0.0), tmp_path, lambda r: records.append(json.dumps(r)), clock=times.clock
    )
    with pytest.raises(SystemExit):
        check.run(build=True)
    found = json.loads(records[-1])
    assert not found["complete"]
    names = list(SHARES)
    assert [stage["status"] for stage in found["stages"].values()] == [
        *["done"] * names.index(where), "ended with the whole check", *["not reached"] * (7 - names.index(where))
    ]  # fmt: skip
    text = report.report(found)
    assert f"PARTIAL {where}: ended with the whole check" in text
    if where != "compile":  # from then on it knows what there is to do
        assert found["layers_left_out"] == [f"{s.what}: no time" for s in settings(dry_run=False)]
        assert found["networks_left_out"] == [f"{what}: no time" for what in networks.settings(dry_run=False)]
        assert set(found["promises"].values()) == {"no time"}
        each = 2 * 3 * 3 * len(CASES)
        assert found["correctness"]["skipped"] == {"cuda_ffma": each, "stripe_gemm": each}
        assert f"{2 * each} correctness checks: no time" in text


def test_a_signal_ends_a_check_with_its_record(tmp_path: Path) -> None:
    """As timeout(1) sends it, in the middle of a stage."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--no-build", f"--out={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as check:
        assert check.stdout is not None
        for line in check.stdout:
            if "promises: done" in line:
                check.terminate()
        assert check.wait() == 1
    (path,) = tmp_path.glob("dry-run-*.json")
    found = json.loads(path.read_text())
    statuses = [stage["status"] for stage in found["stages"].values()]
    assert statuses[:2] == ["done", "done"]
    assert statuses[2] in ("ended with the whole check", "not reached"), (
        "the signal may come between two stages"
    )
    assert statuses[3:] == ["not reached"] * 2
    assert set(found["promises"].values()) == {"ok"}
    assert found["correctness"]["skipped_for_time"] > 0
    assert found["layers_left_out"] == [f"{s.what}: no time" for s in settings(dry_run=True)]


def test_what_a_stage_did_not_reach_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.note("promised", what="stream, auto")
    journal.note("promise", what="stream, auto", result="ok")
    journal.note("promised", what="stream, triton")
    assert gathered_promises(journal, ["stream, auto", "stream, triton", "torch.compile, auto"]) == {
        "stream, auto": "ok", "stream, triton": "the process did not survive it", "torch.compile, auto": "no time",
    }  # fmt: skip
    for what, result in (("a", "ok"), ("b", "wrong"), ("c", "refused"), ("d", None)):
        journal.note("begun", what=what)
        if result:
            journal.note("check", what=what, result=result, text=f"of {what}")
    assert gathered_checks(journal, dict.fromkeys("abcdefg", "triton")) == {
        "done": 1, "failures": ["of b", "d: the process did not survive it"], "refused": ["of c"],
        "skipped_for_time": 3, "skipped": {"triton": 3},
    }  # fmt: skip
    for what in ("first", "second", "third"):
        journal.note("started", what=what)
    journal.note("finished", what="first")
    journal.note("left", what="second", reason="out of memory")
    journal.note("finished", what="second")
    left = gathered_rows(journal, "layers", ["first", "second", "third", "fourth"])["layers_left_out"]
    assert left == ["second: out of memory", "third: stopped under way", "fourth: no time"]


def test_the_stages_of_a_gpu_in_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a dry run leaves out: every stage in the order and with the shares of a GPU, programs replaced."""
    from bench.gpu_check import __main__ as program

    few = {name: CASES[name] for name in checks.SMALL}
    withdrawn: list[str] = []
    monkeypatch.setattr(checks, "CASES", few)
    monkeypatch.setattr(
        tools,
        "first_tries",
        lambda kernels, seconds, most: ({"cuda_ffma:dgrad": "hangs: "} if kernels else {}, []),
    )
    sanitized: list[list[str]] = []
    monkeypatch.setattr(
        tools,
        "sanitize",
        lambda sets, seconds: sanitized.extend(sets) or [{"command": "memcheck", "ok": True, "output": ""}],
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
            lambda device, without=(): [n for n in ("dense", "stripe_gemm", "cuda_ffma") if n not in without],
        )
    monkeypatch.setattr(program, "_START", time.perf_counter())
    monkeypatch.setattr(program.Device, "find", lambda dry_run: GPU)
    monkeypatch.setattr(stages, "parts_of", lambda *arguments: nullcontext([]))
    monkeypatch.setattr("stripe_kernels.testing.withdraw", withdrawn.append)

    def in_this_process(name: str, journal: Journal, end: float, options: list[str]) -> dict[str, Any]:
        given = argparse.Namespace(
            stage=name, journal=journal.path, seconds=600.0, dry_run=False, without=options[1:]
        )
        assert program.child(given) == 0
        return {"status": "done", "seconds": 0.0, "crashes": []}

    monkeypatch.setattr(stages, "run_stage", in_this_process)
    saved: list[Any] = []
    check = Check(GPU, Schedule(580.0, time.perf_counter()), tmp_path, saved.append)
    found = check.run(build=False)
    assert [stage["status"] for stage in found["stages"].values()] == ["done"] * len(SHARES)
    assert not found["complete"], "a pass was lost"
    assert len(saved) == len(SHARES) + 1, "the record is saved after every stage"
    assert saved[-1] is found
    assert found["correctness"]["failures"] == []
    assert found["correctness"]["skipped"] == {}
    assert found["correctness"]["done"] > 0
    assert found["layers_left_out"] == []
    assert "no time" not in found["promises"].values()
    assert withdrawn == ["cuda_ffma:dgrad"] * 4, "a lost pass is not there for later stages"
    assert sanitized == [["cuda_ffma:fprop", "cuda_ffma:wgrad"], ["stripe_gemm"]]
    assert "no GPU" in report.report(found)


class Launches:
    """Stands for programs.run: each call plays the next part, on a clock of its own."""

    def __init__(self, *parts: Any) -> None:
        self.parts, self.now, self.commands = list(parts), 0.0, []  # type: ignore[var-annotated]

    def clock(self) -> float:
        return self.now

    def __call__(self, command: Sequence[str], seconds: float) -> programs.Ended:
        self.commands.append(command)
        wanted, status = self.parts.pop(0)
        taken = min(wanted, seconds)
        self.now += taken
        return programs.Ended(status if wanted <= seconds else None, "", "an illegal memory access", taken)


def staged(launches: Launches, path: Path, end: float = 100.0) -> dict[str, Any]:
    return run_stage("layers", Journal(path), end, ["--dry-run"], launches, launches.clock)


def test_a_stage_that_crashes_starts_again(tmp_path: Path) -> None:
    launches = Launches((10, 70), (20, 0))
    stage = staged(launches, tmp_path / "journal")
    assert (stage["status"], len(stage["crashes"])) == ("done", 1)
    assert "illegal" in stage["crashes"][0]["output"]
    seconds = [command[command.index("--seconds") + 1] for command in launches.commands]
    assert seconds == ["85.0", "75.0"], (
        "the second start has what the first left; what it began last ends in it"
    )


def test_a_stage_that_hangs_or_always_crashes_ends(tmp_path: Path) -> None:
    launches = Launches((1e9, 0))
    assert staged(launches, tmp_path / "a")["status"] == "stopped at its deadline"
    assert launches.now == 100.0
    assert staged(Launches(*[(1, -11)] * 9), tmp_path / "b")["status"] == "given up after crashes"
    assert staged(Launches(), tmp_path / "c", end=0.5)["status"] == "no time"


def test_what_a_process_died_of_is_told_and_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.note("trying", what="fprop, triton[1]")
    journal.note("tried", what="fprop, triton[1]")
    journal.note("trying", what="fprop, triton[2]")
    with journal.path.open("a") as file:  # type: ignore[union-attr]
        file.write('{"kind": "tri')  # killed while writing
    assert journal.unfinished("trying", "tried") == ["fprop, triton[2]"]
    found = gathered_rows(journal, "layers", [])
    assert found["layers_left_out"] == ["fprop, triton[2]: the process did not survive it"]


def test_a_restarted_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    """The first contestant is lost to a crash, the first setting is there already, the second is timed."""
    device, journal = Device("cpu", "dry run", 0), Journal(tmp_path / "journal")
    first, second, third = settings(dry_run=True)
    journal.note("ceilings", copy_bytes_per_second=1e9, gemm_flops=dict.fromkeys(DTYPES, 1e9))
    journal.note("finished", what=first.what)
    journal.note("started", what=second.what)
    journal.note("trying", what=f"{second.what}, cudnn")
    journal.note("started", what=third.what)
    layer_rows(device, float("inf"), True, 3, journal)
    (row,) = [line["row"] for line in journal.lines("row")]
    assert row["which"] == second.which
    assert "cudnn" not in row["contestants"]
    assert "did not survive" in row["wrong"]["cudnn"]
    (left,) = journal.lines("left")
    assert (left["what"], left["reason"]) == (third.what, "a process did not survive its timing")


def test_no_time_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.note("ceilings", copy_bytes_per_second=1e9, gemm_flops=dict.fromkeys(DTYPES, 1e9))
    layer_rows(Device("cpu", "dry run", 0), 0.0, True, 3, journal)
    wanted = [s.what for s in settings(dry_run=True)]
    left = gathered_rows(journal, "layers", wanted)["layers_left_out"]
    assert left == [f"{what}: no time" for what in wanted]
