"""The record of one check, and the rule that nobody quotes one that is not the code's."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "bench/records"
# What decides a GPU kernel's speed and result; the CPU kernels do not.
SOURCES = (
    "csrc/core/*",
    "csrc/cuda/**/*",
    "csrc/bindings/cuda.cpp",
    "stripe_kernels/backends/triton/*.py",
    "stripe_kernels/backends/cuda*.py",
    "stripe_kernels/backends/dense.py",
    "stripe_kernels/backends/gemm.py",
    "stripe_kernels/phases.py",
    "stripe_kernels/packed.py",
)
# Hashes of later sources in which nothing that a GPU executes differs from those of a record, with the difference.
# Only a comment, a branch for the CPU, or what no timed problem meets may stand here: everything else has to be
# measured again.
SAME_ON_A_GPU: dict[str, tuple[str, str]] = {
    "473feec11836acbe": (
        "7d37e7d2af760de6",
        "refusals: taps beyond 16 bits and chips before sm_80 in the native gather, a table without stripes; "
        "Triton's pool and epilogue where Triton does not run; wgrad on wgmma of many groups, which it had refused: "
        "nothing that a row has met; what runners and tables said twice said once: the same tables and launches; the "
        "native sum says in which type it reads a bias: rows have none; patches of tiles are computed without a walk "
        "over all pixels: the same tables; the CUDA sources cut into smaller files: `python -m tests.cuda.same_code "
        "14c0bbd` found the machine code of all kernels the same to the last instruction for sm_80, sm_90a and sm_100 "
        "(nvcc 13.0), the launchers, which it does not compare, give the emulation's tests the same results",
    ),
}
# Stages without which a record says too little to be quoted; rows there was no time for are named in it.
NEEDED = ("checks", "layers")
_QUOTED = re.compile(r"bench/records/([\w.+-]+\.json)|(?<![\w/])(nvidia-[\w.+-]+\.json)")
_SENTENCES = re.compile(r"\n\s*\n|\n(?=- |\|)|(?<=\.)\s+(?=[A-Z`*\[(])")


def source_hash(root: Path = ROOT) -> str:
    """Sixteen hex digits over names and contents of the GPU kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in root.glob(pattern) if p.is_file()}):
        digest.update(f"{path.relative_to(root)}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Writer:
    """Writes one check's record, as often as it changes, to folder/<device>-<date>.json, by the date on which it
    began; -2, -3 and so on follow where another check has that name. A reader finds one state of it or another."""

    def __init__(self, folder: Path, slug: str) -> None:
        self._folder, self._slug = folder, slug
        self._path: Path | None = None

    def __call__(self, record: dict[str, Any]) -> Path:
        if self._path is None:
            self._path = self._claimed(record["date"][:10])
        aside = self._path.with_name(f"{self._path.name}.part")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(aside, self._path)
        return self._path

    def _claimed(self, day: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            suffix = f"-{number}" if number > 1 else ""
            path = self._folder / f"{self._slug}-{day}{suffix}.json"
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        raise AssertionError


def outdated_extensions(root: Path = ROOT) -> list[Path]:
    """CUDA extensions older than a source of theirs: what would run is not what `source_hash` says."""
    sources = [p for pattern in SOURCES if pattern.startswith("csrc/") for p in root.glob(pattern)]
    newest = max((p.stat().st_mtime for p in sources if p.is_file()), default=0.0)
    return [p for p in root.glob("stripe_kernels/_cuda*.so") if p.stat().st_mtime < newest]


def not_quotable(record: dict[str, Any]) -> str:
    """Why no document may quote a record's figures, or nothing."""
    if record["dry_run"]:
        return "is a dry run"
    # What ran then was an extension built earlier, from other sources than the record names, or none.
    if not record.get("build", {"ok": True})["ok"]:
        return "did not build"
    stages = record.get("stages", {})
    if not record["complete"] and any(stages.get(name, {}).get("status") != "done" for name in NEEDED):
        return "did not finish"
    # What compute-sanitizer ran gives another status where a result is wrong.
    small = record.get("sanitizer") or [{"ok": False}]
    if record.get("correctness", {}).get("done") == 0 and not all(tool["ok"] for tool in small):
        return "checked nothing"
    return ""


def stale_quotes(text: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the records a text quotes, with their folder or without; empty when each is of this code or
    the sentence that quotes it says "older kernels". Records of CPU times and of learning name a commit instead of
    a hash, and only have to exist."""
    problems = []
    for sentence in _SENTENCES.split(text):
        for name in dict.fromkeys(filter(None, sum(_QUOTED.findall(sentence), ()))):
            path = root / "bench/records" / name
            if not path.exists():
                problems.append(f"bench/records/{name} does not exist")
                continue
            record = json.loads(path.read_text())
            if "sources" not in record:
                continue
            now = source_hash(root)
            same = now in (record["sources"], SAME_ON_A_GPU.get(record["sources"], ("",))[0])
            if not same and "older kernels" not in " ".join(sentence.split()).lower():
                problems.append(
                    f"bench/records/{name} measured sources {record['sources']}, the code is {now}"
                )
            if "complete" in record and (reason := not_quotable(record)):
                problems.append(f"bench/records/{name} {reason}")
    return problems
