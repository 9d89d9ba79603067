"""The cut meets its budget, whatever the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iessp.budget import compacted_macs_kept, cut, macs_kept, out_of_reach
from iessp.network import Network, Site

SITES = (
    Site("a", 1024, (16, 3, 3), 3, ()),
    Site("b", 256, (32, 3, 3), 16, ("a",)),
    Site("c", 64, (64, 1, 1), 32, ("b",)),
    Site("d", 64, (24, 5, 2), 64, ("c",)),
)
NETWORK = Network(SITES)


def scores(seed: int, levels: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {s.name: torch.randn(s.stripe_shape, generator=generator) for s in SITES}
    return {n: (v * levels).round() for n, v in values.items()} if levels else values


@given(st.integers(0, 10**6), st.floats(0.08, 1.0), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_budget_is_met_to_the_cheapest_stripe(seed: int, budget: float, levels: int) -> None:
    skeletons = cut(NETWORK, scores(seed, levels), budget)
    kept = macs_kept(NETWORK, skeletons)
    dead_costs = [s.stripe_macs for s in SITES if not skeletons[s.name].all()]
    assert kept <= budget + 1e-12
    if dead_costs:
        assert budget - kept < min(dead_costs) / NETWORK.macs + 1e-12
    assert all(s.any() for s in skeletons.values()), "every layer keeps something"


@given(st.integers(0, 10**6), st.floats(0.2, 1.0))
@settings(max_examples=20, deadline=None)
def test_better_stripes_of_a_layer_are_kept_first(seed: int, budget: float) -> None:
    values = scores(seed)
    for name, skeleton in cut(NETWORK, values, budget).items():
        if not skeleton.all():
            assert values[name][skeleton].min() >= values[name][~skeleton].max()


def test_whole_filters_live_or_die_together() -> None:
    for skeleton in cut(NETWORK, scores(1), 0.3, whole_filters=True).values():
        per_filter = skeleton.flatten(1).float().mean(1)
        assert set(per_filter.tolist()) == {0.0, 1.0}


def test_layers_without_scores_count_in_full() -> None:
    values = scores(2)
    del values["d"]
    fixed = NETWORK["d"].macs / NETWORK.macs
    skeletons = cut(NETWORK, values, fixed + 0.1)
    assert "d" not in skeletons
    assert macs_kept(NETWORK, skeletons) == pytest.approx(fixed + 0.1, abs=0.01)
    with pytest.raises(ValueError, match="out of reach: this network keeps at least"):
        cut(NETWORK, values, fixed)


def test_a_budget_out_of_reach_names_the_pointwise_convolutions() -> None:
    """c, the 1x1, has no gate."""
    least = (NETWORK["c"].macs + sum(NETWORK[name].stripe_macs for name in "abd")) / NETWORK.macs
    share = NETWORK["c"].macs / NETWORK.macs
    assert out_of_reach(NETWORK, "abd", least + 1e-9) is None
    reason = out_of_reach(NETWORK, "abd", least - 1e-9)
    assert f"at least {least:.4f}" in reason
    assert (
        f"1 are 1x1 ({share:.4f}), which attach(..., pointwise=True), iessp prune --pointwise and iessp train "
        "--set pointwise=true gate too" in reason
    )
    assert "pointwise" not in out_of_reach(NETWORK, "abc", 1e-3)


def test_compaction_counts_channels_nobody_makes() -> None:
    skeletons = {s.name: torch.ones(s.stripe_shape, dtype=torch.bool) for s in SITES}
    skeletons["a"][:8] = False
    without = macs_kept(NETWORK, skeletons) - compacted_macs_kept(NETWORK, skeletons)
    assert without == pytest.approx(NETWORK["b"].macs / 2 / NETWORK.macs)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ValueError, match=r"share of MACs in \(0, 1\]"):
        cut(NETWORK, scores(0), budget)


def test_diverged_scores_are_named() -> None:
    values = scores(0)
    values["b"][3, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"shape \(32, 3, 3\) are not all finite"):
        cut(NETWORK, values, 0.5)
