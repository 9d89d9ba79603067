"""Tables in documents are those of the records; recipes try every method equally often."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iessp import pareto, records
from iessp.recipe import UNPRUNED, bundled, read
from iessp.records import differences, rewritten, table, trials
from iessp.reproduce import cell_of

LEARNING = Path(__file__).parents[2] / "docs/learning-results.md"
RECORDS = [
    path
    for path in sorted(LEARNING.parents[1].glob("bench/records/learning-*.json"))
    if "rows" in json.loads(path.read_text())
]


def test_the_document_says_what_the_records_say() -> None:
    text = LEARNING.read_text()
    assert "<!-- record: " in text
    assert rewritten(text, LEARNING.parent) == text, "run python -m iessp.records docs/learning-results.md"


SUMMARY = {  # rows of the table in docs/learning.md
    "VGG, a quarter of its width, few images (5 seeds)": "few",
    "VGG, half of its width (3)": "half",
    "ResNet-20 (3)": "resnet20",
    "VGG, a quarter, few images (3)": "few-6",
    "VGG, a quarter, nothing to spare, 200 steps (3)": "small",
}


@pytest.mark.parametrize("row", SUMMARY)
def test_the_summary_says_what_the_records_say(row: str) -> None:
    (line,) = [
        line for line in LEARNING.with_name("learning.md").read_text().splitlines() if f"| {row} |" in line
    ]
    record = json.loads(
        (LEARNING.parents[1] / f"bench/records/learning-cifar10-{SUMMARY[row]}.json").read_text()
    )
    found = {}
    for text in differences(record, "iem"):
        method, values = re.fullmatch(r"iem over (.*), \d seeds: test (\S+ ± \S+), .*", text).groups()  # type: ignore[union-attr]
        found[method] = re.sub(r"\b0\.", ".", values)
    follows = "filter-skeleton(exact=true)" if SUMMARY[row] == "small" else "filter-skeleton"
    names = ("dense", "magnitude", follows, "l1-filter", "slim", "random")
    shown = [re.sub(r" \(.*", "", cell.strip()) for cell in line.split("|")[3:9]]
    assert shown == [found[name] for name in names]


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


def test_differences_are_taken_seed_by_seed() -> None:
    found = (("a", 0, 0.5), ("a", 1, 0.6), ("a", 2, 0.9), ("b", 0, 0.52), ("b", 1, 0.54))
    rows = [{"method": m, "seed": s, "accuracy": a, "held_out_accuracy": a / 2} for m, s, a in found]
    assert differences({"rows": rows}, "a") == [
        "a over b, 2 seeds: test +2.00 ± 4.00, ahead in 1; held-out +1.00 ± 2.00, ahead in 1"
    ]
    with pytest.raises(ValueError, match="no c: a, b"):
        differences({"rows": rows}, "c")


@pytest.mark.parametrize(("main", "wrong"), [(records.main, "gone.json"), (pareto.main, "nonesuch")])
def test_a_wrong_name_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], object],
    wrong: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", wrong])
    with pytest.raises(SystemExit, match="2"):
        main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("program: error: ")
    assert wrong in last


def test_trials_are_listed_with_their_epochs() -> None:
    found = (({"lr": 0.1}, 40, 0.5), ({"lr": 0.1}, 40, 0.6), ({"options": {"alpha": 0.003}}, None, 0.25))
    record: dict[str, Any] = {"recipe": {"trial_epochs": 10}, "trials": []}
    for changes, epochs, accuracy in found:
        trial = {"method": "a", "changes": changes, "held_out_accuracy": accuracy}
        record["trials"].append(trial if epochs is None else {**trial, "epochs": epochs})
    record["trials"].append({**record["trials"][0], "seed": 3, "held_out_accuracy": 0.7})
    assert trials(record) == [
        "a lr=0.1, 40 epochs: 55.00 of 50.00, 60.00",
        "a alpha=0.003, 10 epochs: 25.00 of 25.00",
        "a lr=0.1, 40 epochs, only looked at, the table's seeds: 70.00 of 70.00",
    ]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_run_on_record_keeps_its_budget_to_a_tenth_of_a_point(path: Path) -> None:
    """By construction; but for `slim`, whose channels come in whole numbers, and which stays below."""
    record = json.loads(path.read_text())
    budget = record["recipe"]["budget"]
    for row in record["rows"]:
        method = re.split(r"[( ]", row["method"])[0]
        kept = row["macs_kept_after_compaction" if method == "l1-filter" else "macs_kept"]
        if method not in UNPRUNED:
            assert -0.001 < kept - budget <= 1e-12
        assert kept <= budget or method == "dense"


@pytest.mark.parametrize("name", bundled())
def test_every_method_has_the_same_number_of_trials(name: str) -> None:
    recipe = read(name)
    assert len({len(tried) for tried in recipe.trials.values()}) <= 1
    assert bool(recipe.trials) == bool(recipe.trial_epochs)
    for method, tried in recipe.trials.items():
        for changes in tried:
            assert cell_of(recipe, method, changes, seed=0).trials == {}
