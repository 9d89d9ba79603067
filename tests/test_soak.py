"""The soak's judgement: a leak is noticed at its rate, however short the run; noise alone is not."""

from __future__ import annotations

import random

import pytest

from tests.soak import A_ROUND, JUDGED, SAMPLE, STORE, judge

BASE = {
    "MiB from malloc": 134.0,
    "thousand Python blocks": 1200.0,
    "MiB anonymous beyond malloc's free": 307.0,
    "mappings": 504.0,
    "MiB free in malloc": 28.0,
    "threads": 4.0,
    "MiB resident": 490.0,
}
NOISE = {
    "MiB from malloc": 0.03,
    "thousand Python blocks": 0.01,
    "MiB anonymous beyond malloc's free": 0.05,
    "mappings": 0.3,
    "MiB free in malloc": 0.03,
    "MiB resident": 0.5,
}


def run(rounds: int, leak: dict[str, float], step: dict[str, float] | None = None) -> bool:
    """Whether a run is judged flat where each round keeps `leak`, and `step` comes after a third of them."""
    rng = random.Random(0)
    at = [float(r) for r in range(0, rounds, SAMPLE)]
    samples = [
        {
            name: size
            + leak.get(name, 0) * r
            + (step or {}).get(name, 0) * (3 * r > rounds)
            + (rng.gauss(0, NOISE[name]) if name in NOISE else 0)
            for name, size in BASE.items()
        }
        for r in at
    ]
    return judge(at, samples)[1]


@pytest.mark.parametrize("rounds", [4000, 20000, 200000])
def test_noise_is_flat_and_leaks_are_not(rounds: int) -> None:
    assert run(rounds, {})
    assert run(rounds, {name: limit / 20 for name, limit in A_ROUND.items()})
    assert not run(rounds, {"thousand Python blocks": 2 / 1000 / STORE})  # two blocks a network
    assert not run(rounds, {"MiB from malloc": 64 / 2**20})  # 64 bytes a round


@pytest.mark.parametrize("name", JUDGED)
def test_one_percent_in_the_run_is_never_flat(name: str) -> None:
    assert not run(20000, {name: 0.012 * BASE[name] / 20000})


def test_malloc_may_keep_a_bounded_rest() -> None:
    kept = ("MiB free in malloc", "MiB resident")
    assert run(20000, {}, dict.fromkeys(kept, 15.0))
    assert not run(20000, {}, dict.fromkeys(kept, 45.0))


def test_mappings_and_threads_that_stay_are_noticed() -> None:
    assert not run(20000, {"mappings": 1 / STORE / 5})  # one for every fifth network
    assert not run(20000, {"threads": 1 / 20000})
    assert run(20000, {}, {"threads": 1.0})  # within the first half


def test_too_few_samples_say_so() -> None:
    with pytest.raises(ValueError, match="soak longer"):
        run(100, {})
