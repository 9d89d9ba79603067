"""diagnose: it tests every kernel that runs, tells why others do not, and finds what is broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stripe_kernels
from stripe_kernels import diagnosis, registry
from stripe_kernels.compile import cache


def only(monkeypatch: pytest.MonkeyPatch, **kernels: registry.Kernel) -> None:
    monkeypatch.setattr(registry, "_kernels", kernels)


def test_every_kernel_is_tested_or_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stripe_kernels.list_kernels()
    some = {n: k for n, k in registry.kernels().items() if "avx2" not in n and "generic" not in n}
    only(monkeypatch, **some)
    found = stripe_kernels.diagnose(0)
    assert json.loads(json.dumps(found)) == found
    assert set(found["kernels"]) == set(some)
    for name, kernel in found["kernels"].items():
        if kernel["state"] == "refuses":
            assert kernel["reason"]
            assert "float32" not in kernel["reason"], f"{name} takes other dtypes, which were not tried"
            assert kernel["checks"] == 0
        elif name != "reference":
            assert kernel["checks"] > 0, name
    assert found["kernels"]["dense"]["checks"] == 3 * 6  # passes; dtypes in two layouts
    assert found["self_test"]["failures"] == 0
    assert found["self_test"]["checks"] == sum(k["checks"] for k in found["kernels"].values())


def test_a_kernel_that_computes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stripe_kernels.list_kernels()
    dense = registry.find("dense")

    class Wrong:
        def __init__(self, runner: Any) -> None:
            self.runner, self.pack = runner, getattr(runner, "pack", None)

        def __call__(self, *arguments: Any) -> torch.Tensor:
            result: torch.Tensor = self.runner(*arguments).clone()
            result[-1, -1, -1, -1] += 1
            return result

    def build(problem: Any, which: Any, config: Any) -> Any:
        runner = dense.build(problem, which, config)
        return Wrong(runner) if which == "dgrad" else runner

    only(monkeypatch, dense=dense, wrong=replace(dense, name="wrong", build=build))
    found = stripe_kernels.diagnose(0)
    assert found["kernels"]["dense"]["failures"] == []
    failures = found["kernels"]["wrong"]["failures"]
    assert len(failures) == found["self_test"]["failures"] == 6
    assert all("dgrad" in failure and "is off by" in failure for failure in failures)


def test_the_cache_is_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    assert diagnosis._cache(folder) == {
        "folder": str(folder), "files": 0, "bytes": 0, "unreadable": 0, "writable": True,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "torn.json").write_text('{"candidates": [["de')
    (folder / "whole.json").write_text('{"candidates": [["dense", [], 1.0, 1.0]]}')
    found = diagnosis._cache(folder)
    assert (found["files"], found["unreadable"]) == (2, 1)
    assert found["bytes"] == sum(f.stat().st_size for f in folder.iterdir())
    assert cache.read(folder, "whole") is not None


def test_a_missing_compiler_is_none() -> None:
    assert diagnosis._version_of("no-such-compiler") is None
    assert "Python" in str(diagnosis._version_of("python3"))
