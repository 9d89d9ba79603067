"""Every code block of the documents runs, a document's blocks in order and in one place, or says why not; links hold.

python blocks share their names, sh blocks are run line by line, text blocks are no code. An indented block stands
under a comment `<!-- not run: REASON -->`. `<!-- needs: PACKAGE, ... -->` skips a document where one is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

import iessp
import stripe_kernels
from tools import docs

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md"]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|(?<=\n)\n)((?:    [^\n]*\n)+)")
_EXCUSED = re.compile(r"<!-- not run: [^>]{10,} -->\n\n$")
_NEEDS = re.compile(r"<!-- needs: (.*?) -->")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")

RUNNER = """
import atexit, subprocess, sys

names = {"__name__": "__main__"}
for language, line, code in BLOCKS:
    place = f"{DOCUMENT}:{line}"
    if language == "python":
        exec(compile("\\n" * line + code, DOCUMENT, "exec"), names)
    else:
        for command in code.splitlines():
            print("$", command, flush=True)
            if command.endswith(" &"):  # a server: up when it has said something, ended with the document
                server = subprocess.Popen(["bash", "-c", "exec " + command[:-2]], stdout=subprocess.PIPE)
                atexit.register(server.kill)
                if not server.stdout.readline():
                    sys.exit(f"{place}: {command} said nothing")
            elif subprocess.run(["bash", "-c", command]).returncode:
                sys.exit(f"{place}: {command} failed")
"""


def blocks(document: Path) -> list[tuple[str, int, str]]:
    """(language, line of the fence, code) of what is to be run"""
    text = document.read_text()
    fences = [(f[1], text[: f.start()].count("\n") + 1, f[2]) for f in _FENCE.finditer(text)]
    return [fence for fence in fences if fence[0] != "text"]


def unexcused(text: str) -> list[str]:
    """First lines of the indented blocks that neither run nor say why."""
    text = _FENCE.sub("", text)
    return [b[1].splitlines()[0] for b in _INDENTED.finditer(text) if not _EXCUSED.search(text[: b.start(1)])]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not(document: Path) -> None:
    for language, line, _ in blocks(document):
        assert language in ("python", "sh"), f"{document.name}:{line}: language {language!r} is not run"
    assert not unexcused(document.read_text())


def test_a_block_without_an_excuse_is_noticed() -> None:
    assert unexcused("words:\n\n    make test\n    make lint\n\nmore\n") == ["    make test"]
    assert unexcused("<!-- not run: takes too long -->\n\n    make test\n") == []
    assert unexcused("<!-- not run: why -->\n\n    make test\n") == ["    make test"]
    assert unexcused("<!-- not run: half an hour -->\n\nwords:\n\n    make test\n") == ["    make test"]
    assert unexcused("```python\nif x:\n\n    y()\n```\n") == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.stem)
def test_every_block_runs(document: Path, tmp_path: Path) -> None:
    for names in _NEEDS.findall(document.read_text()):
        for name in names.split(", "):
            pytest.importorskip(name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tools = tmp_path / ".bin"
    tools.mkdir()
    for name, command in {"iessp": "-m iessp", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "XDG_CACHE_HOME": str(tmp_path / ".cache"),
        "COLUMNS": "120",
    }
    script = tmp_path / ".blocks.py"
    script.write_text(f"DOCUMENT = {document.name!r}\nBLOCKS = {blocks(document)!r}\n{RUNNER}")
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in _LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_pages_of_the_site_are_all_in_its_navigation() -> None:
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in PAGES}


def test_generated_parts() -> None:
    help_of_all = docs.on_page_markdown("<!-- generated: iessp -->")
    assert "## iessp prune" in help_of_all
    assert "--budget" in help_of_all
    tables = docs.on_page_markdown("<!-- generated: records -->")
    for path in (ROOT / "bench/records").glob("*.json"):
        assert f"## {path.stem}" in tables
    with pytest.raises(KeyError):
        docs.on_page_markdown("<!-- generated: nothing -->")


def test_records_become_tables() -> None:
    common = {
        "what": "vgg16",
        "which": "net",
        "batch": 1,
        "density": 0.24,
        "source": "iid",
        "dtype": "float32",
        "threads": 1,
    }
    rows = [
        {**common, "contestant": "auto", "kind": "stripe", "seconds": 2e-3, "speedup": 2.5, "speedup_low": 2.25,
         "speedup_high": 2.75},
        {**common, "contestant": "eager", "kind": "dense", "seconds": 6e-3},
        {**common, "contestant": "onnxruntime", "kind": "dense", "seconds": 5e-3},
        {**common, "contestant": "openvino", "kind": "dense", "status": "wrong: y"},
    ]  # fmt: skip
    (line,) = docs.timings(rows).splitlines()[4:]
    assert line == "| **2.50** (2.25-2.75) | 5 (onnxruntime) | 2 (auto) |  |"
    both = docs.timings(
        [*rows, {**common, "batch": 32, "contestant": "auto", "kind": "stripe", "status": "refused"}]
    )
    assert both.startswith(
        "what vgg16, pass net, density 0.24, skeletons iid, dtype float32, threads 1\n\n| batch |"
    )
    assert both.splitlines()[-1] == "| 32 |  |  |  |  |"
    runs = [
        {"method": m, "seed": s, "accuracy": a} for m, s, a in (("a", 0, 0.5), ("a", 1, 0.6), ("b", 0, 0.75))
    ]
    first, second = docs.learning(runs).splitlines()[2:]
    assert first.startswith("| b | 75.00 |")
    assert second.startswith("| a | 55.00 ± 7.07 |")


def public_names() -> set[str]:
    return {*stripe_kernels.__all__, *iessp.__all__} - {"__version__"}


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert public_names() <= set(listed)


@pytest.mark.skipif(
    util.find_spec("mkdocstrings") is None, reason="mkdocs is not installed: the extra `docs`"
)
def test_the_site_builds(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    page = (tmp_path / "site/api/index.html").read_text()
    missing = [name for name in public_names() if f">{name}<" not in page]
    assert not missing, f"docs/api.md lacks {missing}"
    assert "&gt;&gt;&gt;" in page.replace('<span class="gp">', "")
