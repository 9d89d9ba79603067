"""pytest bench --benchmark-only: single rows under pytest-benchmark, every contestant on a few layers.

For comparisons use `python -m bench`: it interleaves the contestants, these rows run one after another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.contestants import contestants, kernel_names
from bench.job import PASSES, Job, Refused
from bench.layers import select
from bench.skeletons import iid

LAYERS = ("vgg16/128-128@16x16", "vgg16/512-512@2x2", "resnet56/32-32@16x16")
DENSITY = 0.24
CONTESTANTS = contestants(kernel_names("all"), compile_=False)


@pytest.mark.parametrize("batch", [1, 32], ids="N{}".format)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("layer", select(LAYERS), ids=lambda layer: layer.name)
def test_layer(benchmark: Any, layer: Any, name: str, which: Any, batch: int) -> None:
    live = iid(layer.filter_size, DENSITY, f"{layer.name} {DENSITY}")
    job = Job(layer, batch, live, "iid", which, torch.float32, torch.get_num_threads())
    try:
        entrant = CONTESTANTS[name](job)
    except Refused as reason:
        pytest.skip(f"{name}: {reason}")
    assert entrant.check() is None
    benchmark.group = f"{layer.name} {which} N={batch}"
    benchmark.extra_info |= {"macs": entrant.macs, "density": live.density}
    benchmark(entrant.call)
