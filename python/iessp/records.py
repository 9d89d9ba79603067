"""Tables of a document from the records of `iessp reproduce`:  python -m iessp.records docs/learning-results.md

A block between `<!-- record: PATH -->` and `<!-- end -->` is written anew from that record, PATH being relative
to the document's folder. --check changes nothing and fails where a block is not what its record says.

Differences between methods, seed by seed:  python -m iessp.records --against iem RECORD
What the methods' settings were chosen from, on held-out images:  python -m iessp.records --trials RECORD
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(<!-- record: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """Markdown: a line a method, best first; mean ± standard deviation over its seeds, in per cent. Latencies, where
    every row has them: medians over the seeds of the dense twin's, the frozen network's and their ratio."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["method"], []).append(row)

    def percent(method: str, key: str) -> tuple[float, float]:
        values = [100 * row[key] for row in rows[method]]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    titles = ["method", "seeds", "test accuracy, %", "MACs kept, %", "after compaction, %"]
    batches = [b for b in ("1", "32") if all(f"frozen_ms_{b}" in row for row in record["rows"])]
    titles += [f"ms a batch of {b}: dense, frozen" for b in batches]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]

    def times(method: str, batch: str) -> str:
        pairs = [(row[f"dense_ms_{batch}"], row[f"frozen_ms_{batch}"]) for row in rows[method]]
        dense, frozen = (statistics.median(values) for values in zip(*pairs, strict=True))
        return f"{dense:.2f}, {frozen:.2f}, {statistics.median(d / f for d, f in pairs):.2f}x | "

    for method in sorted(rows, key=lambda m: -percent(m, "accuracy")[0]):
        mean, spread = percent(method, "accuracy")
        kept, compacted = (percent(method, key)[0] for key in ("macs_kept", "macs_kept_after_compaction"))
        lines.append(
            f"| {method} | {len(rows[method])} | {mean:.2f} ± {spread:.2f} | {kept:.2f} | {compacted:.2f} | "
            + "".join(times(method, batch) for batch in batches)
        )
    return "\n".join([*(line.rstrip() for line in lines), ""])


def differences(record: dict[str, Any], against: str) -> list[str]:
    """A line a method: accuracy of `against` minus the method's, in points, on the seeds that both have: mean ± its
    standard error, and in how many seeds `against` is ahead; on the test images and on the held-out ones."""
    accuracies: dict[str, dict[int, dict[str, Any]]] = {}
    for row in record["rows"]:
        accuracies.setdefault(row["method"], {})[row["seed"]] = row
    if against not in accuracies:
        raise ValueError(f"the record has no {against}: {', '.join(accuracies)}")
    lines = []
    for method, mine in accuracies.items():
        seeds = sorted(mine.keys() & accuracies[against].keys())
        if method == against or not seeds:
            continue
        words = []
        for title, key in (("test", "accuracy"), ("held-out", "held_out_accuracy")):
            values = [100 * (accuracies[against][seed][key] - mine[seed][key]) for seed in seeds]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            ahead = sum(value > 0 for value in values)
            words.append(f"{title} {statistics.mean(values):+.2f} ± {error:.2f}, ahead in {ahead}")
        lines.append(f"{against} over {method}, {len(seeds)} seeds: {'; '.join(words)}")
    return lines


def trials(record: dict[str, Any]) -> list[str]:
    """A line for what was tried: method, changes, epochs, then the held-out accuracies, in per cent, of its runs.

    A run with a seed of the table (`seed`) was only looked at: it has a line of its own, as nothing is chosen by it.
    """
    found: dict[str, list[float]] = {}
    for trial in record["trials"]:
        changes = {**trial["changes"], **trial["changes"].get("options", {})}
        changes.pop("options", None)
        words = " ".join(f"{key}={value}" for key, value in changes.items())
        epochs = trial.get("epochs", record["recipe"]["trial_epochs"])
        looked_at = ", only looked at, the table's seeds" if "seed" in trial else ""
        found.setdefault(f"{trial['method']} {words}, {epochs} epochs{looked_at}", []).append(
            100 * trial["held_out_accuracy"]
        )
    return [
        f"{what}: {statistics.mean(values):.2f} of {', '.join(f'{v:.2f}' for v in values)}"
        for what, values in found.items()
    ]


def rewritten(text: str, folder: Path) -> str:
    """The document with every block as its record says."""
    return BLOCK.sub(
        lambda m: m[1] + "\n" + table(json.loads((folder / m[2]).read_text())) + "\n" + m[3], text
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path, help="or the record, with --against or --trials")
    parser.add_argument("--against", metavar="METHOD")
    parser.add_argument("--trials", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    try:
        text = given.document.read_text()
        if given.trials or given.against:
            record = json.loads(text)
            lines = trials(record) if given.trials else differences(record, given.against)
            print("\n".join(lines))
            return 0
        made = rewritten(text, given.document.parent)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if given.check:
        if made != text:
            print(
                f"{given.document} is not what its records say: run python -m iessp.records {given.document}"
            )
        return int(made != text)
    given.document.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
