"""The soak's judgement: a leak is noticed at its rate, however short the run; noise alone is not."""

from __future__ import annotations

import random

import pytest

from tests.soak import A_ROUND, SAMPLE, STORE, judge

BASE = {"MiB from malloc": 125.0, "thousand Python blocks": 1200.0, "MiB resident": 418.0}
NOISE = {"MiB from malloc": 0.03, "thousand Python blocks": 0.01, "MiB resident": 0.5}


def run(rounds: int, leak: dict[str, float]) -> bool:
    """Whether a run of so many rounds is judged flat where each round keeps `leak`."""
    rng = random.Random(0)
    at = list(range(0, rounds, SAMPLE))
    samples = [{k: v + leak.get(k, 0) * r + rng.gauss(0, NOISE[k]) for k, v in BASE.items()} for r in at]
    return judge(at, samples)[1]


@pytest.mark.parametrize("rounds", [4000, 20000, 200000])
def test_noise_is_flat_and_leaks_are_not(rounds: int) -> None:
    assert run(rounds, {})
    assert run(rounds, {name: limit / 20 for name, limit in A_ROUND.items()})
    assert not run(rounds, {"thousand Python blocks": 2 / 1000 / STORE})  # two blocks a network
    assert not run(rounds, {"MiB from malloc": 64 / 2**20})  # 64 bytes a round


def test_one_percent_in_the_run_is_never_flat() -> None:
    for name, size in BASE.items():
        assert not run(20000, {name: 0.012 * size / 20000})


def test_too_few_samples_say_so() -> None:
    with pytest.raises(ValueError, match="soak longer"):
        run(100, {})
