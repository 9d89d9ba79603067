"""What a CUDA kernel should cost, in seconds. Torch-free.

Arithmetic on nominal H100 figures, 3 to 6 times too fast on a real one. It orders the candidates of one
problem until tune() replaces it.
"""

from __future__ import annotations

from stripe_kernels.backends import (
    cuda_ffma,
    cuda_gather,
    cuda_mma,
    cuda_mma_grad,
    cuda_taps,
    cuda_wgmma,
    cuda_wgrad,
    cuda_whole,
)
from stripe_kernels.backends.cuda_columns import BANDS, STRIPES, WHOLE, column_tiles
from stripe_kernels.backends.cuda_tables import Layout
from stripe_kernels.registry import Config, Pass, Problem

MULTIPROCESSORS = cuda_wgmma.PROCESSORS
CLOCK = 1.7e9
RESIDENT = 2  # blocks a multiprocessor holds
LAUNCH = 4e-6  # seconds
BYTES = 2.5e12  # a second


def _seconds(problem: Problem, which: Pass, cycles: float, blocks: int, splits: int, size: int) -> float:
    """`cycles` of one multiprocessor over all blocks; too few blocks leave multiprocessors idle."""
    s = problem.shape
    maps = size * (s.N * s.C * s.H * s.W + s.N * s.K * s.P * s.Q)
    outputs = {
        "fprop": s.N * s.K * s.P * s.Q,
        "dgrad": s.N * s.C * s.H * s.W,
        "wgrad": problem.skeleton.stripes * s.group_c,
    }
    shares = 8 * splits * outputs[which] if splits > 1 else 0
    busy = min(MULTIPROCESSORS, max(1, blocks))
    return LAUNCH * (1 + (splits > 1)) + max(cycles / (busy * CLOCK), (maps + shares) / BYTES)


def _splits(blocks: int, most: int) -> tuple[int, ...]:
    """None, and as many as give every multiprocessor something."""
    fill = min(most, RESIDENT * MULTIPROCESSORS // max(1, blocks))
    return (1, fill) if fill > 1 else (1,)


def _blocks(layout: Layout) -> int:
    return layout.walk.blocks * layout.walk.classes * layout.groups * layout.tiles_out


def _modes(problem: Problem, which: Pass, pixels: int) -> list[int]:
    """Position by position where maps are small and images many."""
    s = problem.shape
    positions = which == "fprop" and s.P * s.Q <= 64 and pixels <= 4 * s.N
    return [cuda_ffma.PATCH, cuda_ffma.POSITION] if positions else [cuda_ffma.PATCH]


def ffma(problem: Problem, which: Pass) -> dict[Config, float]:
    """128 multiply-adds a cycle, half of them useful."""
    s = problem.shape
    found: dict[Config, float] = {}
    for mode in _modes(problem, which, cuda_ffma.PIXELS):
        walk, classes = cuda_ffma.walked(problem, which, mode)
        layout = cuda_ffma.layout_of(problem, which, (mode, 1))
        share = sum(len(load.taps) for c in classes for load in c.loads) / max(1, len(classes) * s.taps)
        if which == "wgrad":
            slots = cuda_ffma.WARPS * cuda_ffma.STRIPES
            blocks, most = max(1, -(-problem.skeleton.stripes // slots) * -(-s.group_c // 64)), walk.blocks
            share = 1.0
        else:
            blocks, most = _blocks(layout), -(-layout.group_in // layout.chunk)
        pixels = (
            walk.blocks * walk.classes * (cuda_ffma.WGRAD_PIXELS if which == "wgrad" else cuda_ffma.PIXELS)
        )
        cycles = pixels * problem.skeleton.stripes * s.group_c * share / 64
        for splits in _splits(blocks, most):
            found[mode, splits] = _seconds(problem, which, cycles, blocks * splits, splits, 4)
    return found


def mma(problem: Problem, which: Pass) -> dict[Config, float]:
    if which == "fprop":
        return _mma_fprop(problem)
    s, size = problem.shape, cuda_mma.SIZES[problem.dtype]
    if which == "dgrad":
        layout = cuda_mma_grad.dgrad_layout(problem, (1,))
        # A unit of stripes in a block: 256 cycles of the tensor cores, about 320 of shared memory to gather.
        units = problem.skeleton.stripes * size / 32 / (s.stride[0] * s.stride[1])
        blocks, most = _blocks(layout), -(-layout.group_in // layout.chunk)
        cycles = 320.0 * units / s.groups * blocks
    else:
        columns = cuda_mma_grad.wgrad_blocks(problem)
        layout = cuda_mma_grad.wgrad_layout(problem, (1,), len(columns))
        blocks, most = max(1, len(columns)) * -(-s.group_c // layout.chunk), layout.walk.blocks
        executed = sum(len(c) for *_, c in columns) * -(-s.group_c // layout.chunk)
        # A column of eight stripes, 64 pixels: four tensor-core steps (tf32: eight), 2 cycles a tile.
        cycles = 4.0 * size * layout.width * executed * layout.walk.blocks
    return {(n,): _seconds(problem, which, cycles, blocks * n, n, size) for n in _splits(blocks, most)}


def _mma_fprop(problem: Problem) -> dict[Config, float]:
    s, size = problem.shape, cuda_mma.SIZES[problem.dtype]
    found: dict[Config, float] = {}
    units = -(-s.group_c * size // cuda_mma.UNIT)
    for mode in _modes(problem, "fprop", cuda_mma.PIXELS):
        (walk, classes), per_chunk = cuda_mma.fprop_walked(problem, mode)
        share = sum(len(load.taps) for c in classes for load in c.loads) / max(1, len(classes) * s.taps)
        for how in (WHOLE, BANDS, STRIPES) if s.R * s.S > 1 else (WHOLE,):
            tiles = column_tiles(problem.skeleton, s.groups, how)
            layout = cuda_mma.fprop_layout(problem, (mode, how, 1))
            # Loading a patch: about 28 bytes a cycle from the second-level cache.
            patch = walk.rows * cuda_mma.UNIT / 28 * max((len(c.loads) for c in classes), default=1)
            work = sum(max(t.cycles * share, patch) for g in tiles for t in g) * units
            blocks, most = _blocks(layout), -(-units // per_chunk)
            for splits in _splits(blocks, most):
                cycles = work * walk.blocks * walk.classes
                found[mode, how, splits] = _seconds(problem, "fprop", cycles, blocks * splits, splits, size)
    return found


def wgmma(problem: Problem, which: Pass) -> dict[Config, float]:
    if which == "fprop":
        return _wgmma_whole(problem) | _wgmma_taps(problem) | _wgmma_fprop(problem)
    return _wgmma_dgrad(problem) if which == "dgrad" else _wgmma_wgrad(problem)


def _wgmma_whole(problem: Problem) -> dict[Config, float]:
    found: dict[Config, float] = {}
    for config in cuda_whole.CONFIGS:
        tiling = cuda_whole.tiling_of(problem, config)
        if tiling is None or config[0] >= 2 * max(64, problem.shape.group_k):
            continue
        found[config] = _seconds(problem, "fprop", tiling.cycles * MULTIPROCESSORS, MULTIPROCESSORS, 1, 2)
    return found


def _wgmma_taps(problem: Problem) -> dict[Config, float]:
    """Fitted to three warpgroups on an H200: 12 products a 64 channels and step, the step's second ones and what a warp
    does beside them, the epilogue."""
    found: dict[Config, float] = {}
    for config in cuda_taps.CONFIGS:
        layout = cuda_taps.layout_of(problem, config)
        if layout is None or config[0] >= 2 * max(64, problem.shape.group_k):
            continue
        filters, serve, _ = config
        columns = cuda_taps.SIXTEEN * (filters // serve + 1)
        chunks = -(-layout.group_in // cuda_wgmma.CHUNK)
        step = 0.86 * (12 * chunks * (11 + 0.75 * columns) + 280 + 3.75 * filters)
        patch = chunks * layout.chunk * cuda_wgmma.ROW / 40 if layout.walk.load[0] == 1 else 0
        items = layout.walk.tiles[0] * layout.tiles_out
        cycles = layout.walk.patch[1] * step + 21 * filters + patch
        waves = -(-items // MULTIPROCESSORS)
        found[config] = _seconds(problem, "fprop", cycles * waves * MULTIPROCESSORS, MULTIPROCESSORS, 1, 2)
    return found


def _wgmma_dgrad(problem: Problem) -> dict[Config, float]:
    """A step of 64 stripes takes what is longest: 2048 multiply-adds a cycle, shared memory (128 bytes a cycle:
    operands, and some 420 reads to gather), or its weights from the second-level cache (24 bytes a cycle)."""
    s = problem.shape
    steps = -(-problem.skeleton.stripes // (s.groups * cuda_gather.STRIPES * s.stride[0] * s.stride[1]))
    found: dict[Config, float] = {}
    for config in cuda_gather.CONFIGS:
        layout = cuda_gather.layout_of(problem, config)
        if layout is None or config[0] >= 2 * max(64, s.group_c):
            continue
        (width,) = config
        step = max(cuda_gather.PIXELS * width / 32, 2 * width + 420, 64 * width * 2 / 24)
        blocks = layout.walk.tiles[0] * layout.tiles_out
        cycles = steps * step + layout.chunk * s.group_k * 2 / 24 + 2500
        waves = -(-blocks // MULTIPROCESSORS)
        found[config] = _seconds(problem, "dgrad", cycles * waves * MULTIPROCESSORS, MULTIPROCESSORS, 1, 2)
    return found


def _wgmma_wgrad(problem: Problem) -> dict[Config, float]:
    """64 pixels take what is longest: 2048 multiply-adds a cycle, shared memory (128 bytes a cycle: x, and some 40
    reads of a warpgroup to gather 16 pixels), or x and dy from the second-level cache (40 bytes a cycle)."""
    s = problem.shape
    found: dict[Config, float] = {}
    for shape in cuda_wgrad.SHAPES:
        width, filters, pixels = shape
        layout = cuda_wgrad.layout_of(problem, (*shape, 1))
        if layout is None or width >= 2 * max(64, s.group_c) or filters >= 2 * max(64, s.group_k):
            continue
        blocks = cuda_wgrad.blocks_of(problem.skeleton, s, filters)
        columns, tiles = -(-s.group_c // width), layout.walk.tiles[0]
        groups = -(-max((len(b.rows) for b in blocks), default=0) // 64)
        patch = filters // cuda_wgmma.CHUNK * layout.chunk * cuda_wgmma.ROW * 64 / pixels
        step = max(2 * width * groups, 4 * groups * (40 + width / 4), (128 * width + patch) / 40)
        by_splits = {}
        for splits in cuda_wgrad.splits_of(len(blocks) * columns, tiles):
            cycles = -(-tiles // splits) * pixels / 64 * step + 5000
            waves = -(-len(blocks) * columns * splits // MULTIPROCESSORS)
            alone = _seconds(problem, "wgrad", cycles * waves * MULTIPROCESSORS, MULTIPROCESSORS, 1, 2)
            shares = 8 * splits * problem.skeleton.stripes * s.group_c
            by_splits[splits] = alone + (LAUNCH + shares / BYTES if splits > 1 else 0)
        best = min(by_splits, key=by_splits.__getitem__)
        found[(*shape, best)] = by_splits[best]
    return found


def _wgmma_fprop(problem: Problem) -> dict[Config, float]:
    """A block of columns takes what is longest: two products at 2048 multiply-adds a cycle, their operands through
    shared memory (128 bytes a cycle), or weights from the second-level cache (28 bytes a cycle). An H200 takes
    1.6 times as long (median), for what a warp does between products."""
    found: dict[Config, float] = {}
    for config in cuda_wgmma.CONFIGS:
        if cuda_wgmma.room(problem, config) is None:
            continue
        width, rows = config
        patch, tiles, layout = cuda_wgmma.tiles_of(problem, config)
        channels = cuda_wgmma.chunks_of(problem) * cuda_wgmma.CHUNK
        products = rows * width * (channels + 64) / 2048
        first, second = rows / 64 * channels / 16 * (2048 + 32 * width), rows / 64 * width / 16 * 4096
        shared = (first + second + 4 * rows * width) / 128
        block = max(products, shared, width * (channels + 64) * 2 / 28) + 150
        load = patch.rows * channels * 2 / 56 / layout.chunk**2
        cycles = 1.6 * max(t.blocks * block + load + 600 for t in tiles)
        waves = -(-len(tiles) * patch.walk.blocks // MULTIPROCESSORS)
        found[config] = _seconds(problem, "fprop", cycles * waves * MULTIPROCESSORS, MULTIPROCESSORS, 1, 2)
    return found
