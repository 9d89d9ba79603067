"""Tables in documents are those of the records; recipes try every method equally often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iessp.recipe import bundled, read
from iessp.records import rewritten, table

LEARNING = Path(__file__).parents[2] / "docs/learning.md"


def test_the_document_says_what_the_records_say() -> None:
    text = LEARNING.read_text()
    assert "<!-- record: " in text
    assert rewritten(text, LEARNING.parent) == text, "run python -m iessp.records docs/learning.md"


def test_a_block_is_written_anew_and_the_rest_is_left(tmp_path: Path) -> None:
    rows = [
        {"method": m, "accuracy": a, "macs_kept": 0.25, "macs_kept_after_compaction": 0.2}
        for m, a in (("a", 0.5), ("b", 0.8), ("b", 0.9))
    ]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    made = rewritten("before\n<!-- record: r.json -->\nold\n<!-- end -->\nafter", tmp_path)
    assert made.startswith("before\n<!-- record: r.json -->\n\n| method")
    assert made.endswith("\n<!-- end -->\nafter")
    assert "old" not in made
    assert table({"rows": rows}).splitlines()[2:] == [
        "| b | 2 | 85.00 ± 7.07 | 25.00 | 20.00 |",
        "| a | 1 | 50.00 ± 0.00 | 25.00 | 20.00 |",
    ]
    timed = [{**row, "dense_ms_32": 4.0, "frozen_ms_32": 2.0 - row["accuracy"]} for row in rows]
    assert table({"rows": timed}).splitlines()[0].endswith("| ms a batch of 32: dense, frozen |")
    assert table({"rows": timed}).splitlines()[3].endswith("| 20.00 | 4.00, 1.50, 2.67x |")


@pytest.mark.parametrize("name", bundled())
def test_every_method_has_the_same_number_of_trials(name: str) -> None:
    recipe = read(name)
    assert len({len(trials) for trials in recipe.trials.values()}) <= 1
    assert bool(recipe.trials) == bool(recipe.trial_epochs)
    for trials in recipe.trials.values():
        for changes in trials:
            recipe.changed(changes)
