"""The command line as a test calls it, and a user's module."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from iessp import cli

FACTORIES = """
import torch
from torch import nn
from torch.nn import Sequential

def make():
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def with_example():
    return make(), torch.zeros(5, 3, 20, 14)

def broken():
    raise KeyError("weights")

def number():
    return 3

def linear():
    return nn.Linear(3, 3)

def script():
    raise SystemExit(2)
"""


def factories() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(FACTORIES, namespace)
    return namespace


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["iessp", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def words(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.out + captured.err)
    return " ".join(plain.split())


def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What --json prints; text for people must be on stderr, or reading it fails."""
    assert call(monkeypatch, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)
