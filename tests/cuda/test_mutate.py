"""The record of planted faults; python -m tests.cuda.mutate plants them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cuda import mutate
from tests.tree import needs_sources

pytestmark = needs_sources
RECORD = mutate.ROOT / "tests/records/cuda-mutations.json"


def test_every_fault_is_on_record_and_was_noticed() -> None:
    record = json.loads(RECORD.read_text())
    assert list(record) == list(mutate.FAULTS)
    assert [name for name, entry in record.items() if not entry["noticed by"]] == []


def test_every_fault_can_be_planted() -> None:
    for name, fault in mutate.FAULTS.items():
        assert (mutate.ROOT / fault.file).read_text().count(fault.right) == 1, name


def test_a_run_of_some_faults_leaves_the_others(tmp_path: Path) -> None:
    first, second, third = list(mutate.FAULTS)[:3]
    path = tmp_path / "record.json"
    mutate.merge(path, {third: "a wait", first: None}, "older")
    mutate.merge(path, {second: "a wrong y", first: "two runs differ"}, "newer")
    assert json.loads(path.read_text()) == {
        first: {"noticed by": "two runs differ", "sources": "newer"},
        second: {"noticed by": "a wrong y", "sources": "newer"},
        third: {"noticed by": "a wait", "sources": "older"},
    }
    path.write_text(json.dumps({"a fault that is planted no more": {"noticed by": "", "sources": None}}))
    mutate.merge(path, {first: "a wait"}, "newer")
    assert list(json.loads(path.read_text())) == [first]
