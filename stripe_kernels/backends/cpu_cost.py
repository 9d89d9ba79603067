"""What a tiling of a CPU kernel should cost: the model's multiply-adds, moves and waits, in seconds. Torch-free."""

from __future__ import annotations

from math import sqrt

from stripe_kernels.backends.cpu_cycles import BLOCK_BYTES, Cycles
from stripe_kernels.backends.cpu_tiling import (
    BATCH,
    CHUNK_BYTES,
    GATHER,
    PIXELS,
    SHORT_BYTES,
    Sides,
    wgrad_pixels,
)
from stripe_kernels.registry import Config, Pass, Problem
from stripe_kernels.roofline import item_size

CLOCK = 3.5e9
SPILL = 1.06  # of the multiply-adds' time, for blocks of more than 2 * SHORT_BYTES
# What is not cut is slower beyond so many bytes: panel or im2col and outputs, both maps along filters.
UNCUT_BYTES, IMAGE_BYTES = 4_000_000, BLOCK_BYTES
MATRIX_FILTERS = 9  # of a tap: fewer take as long
COLD_CHANNELS = 4  # of x: see Cycles.cold


def predict(problem: Problem, which: Pass, config: Config, cost: Cycles, step: float = 1.0) -> float:
    """Seconds: multiply-adds of live stripes over the lanes actually run, plus moving activations in and out.

    Pixels move in rows, into an im2col plane for every tap; images move in transposes. step: instructions a
    multiply-add; one half where a pair of bfloat16 channels takes one.
    """
    if len(config) == 1:
        return _predict_taps(problem, config, cost) + _cold(problem, cost)
    if len(config) == 2:
        return _predict_filters(problem, config, cost)
    s, lanes, threads = problem.shape, cost.lanes, problem.threads
    mode, images, rows, parts, _ = config
    sides = Sides.of(s, which, mode, cost.matrix)
    width = sides.pitch if mode == PIXELS else sides.cols * images
    rows_in, planes = (sides.rows, s.taps) if mode == GATHER else (rows + sides.halo, sides.planes)
    rows_out = min(rows, sides.rows)
    vectors_in = -(-rows_in * width // lanes) * planes
    vectors_out = -(-rows_out * width // lanes)
    move_in, move_out = _moves(problem, which, mode, sides, planes, cost)
    sums = _sums(problem, which, mode, sides, vectors_out, cost, step)
    if lanes != 16 and mode == PIXELS and sides.block_bytes(rows_out, 1) > 2 * SHORT_BYTES:
        sums *= SPILL
    block = sums + move_in * vectors_in * sides.channels_in + move_out * vectors_out * sides.channels_out
    if mode != BATCH:
        block += cost.row * images * (rows_in * planes * sides.channels_in + rows_out * sides.channels_out)
        # Gather, and whole maps of whose filters every core takes a share.
        if 4 * lanes * (vectors_in * sides.channels_in + vectors_out * sides.channels_out) > UNCUT_BYTES:
            block *= cost.uncut
    blocks = -(-s.N // images) * -(-sides.rows // rows) * s.groups * sides.phases
    rounds = blocks * (1.0 / min(parts, threads)) * 1.03 if parts > 1 else -(-blocks // threads)
    seconds = 3e-6 + (1e-6 if threads > 1 else 0.0) + rounds * block / CLOCK
    return seconds + _cold(problem, cost) if which == "fprop" else seconds


def _sums(
    problem: Problem, which: Pass, mode: int, sides: Sides, vectors: int, cost: Cycles, step: float
) -> float:
    """Cycles of a block's multiply-adds and, in fprop, of adding them to its `vectors` of y."""
    s = problem.shape
    share = s.taps_inside() / s.taps if mode == BATCH else 1.0
    stripes = problem.skeleton.stripes / s.groups
    if which == "dgrad":
        return cost.gradient * step * stripes * share * vectors * s.group_c / sides.phases
    if cost.matrix:
        stripes = max(stripes, float(MATRIX_FILTERS * problem.skeleton.live.any(0).sum()))
    products = cost.fma * step * stripes * share * vectors * s.group_c
    return products + (cost.update * stripes * share * vectors + sides.channels_out * vectors)


def _moves(
    problem: Problem, which: Pass, mode: int, sides: Sides, planes: int, cost: Cycles
) -> tuple[float, float]:
    """Cycles of moving a vector of one channel into a block, and out of it."""
    s, last, into, out = problem.shape, problem.channels_last, sides.channels_in, sides.channels_out
    if mode == BATCH:
        move = cost.transpose if last else cost.transpose + cost.turn
        if last and s.groups > 1:
            line = cost.lanes * cost.line
            return move + line / into, move + line / out
        if last:
            return move * _squares(into, cost.lanes), move * _squares(out, cost.lanes)
        # Pixels that lie apart are moved once more before they are turned.
        of_x = move if s.stride == (1, 1) else 3 * move
    else:
        move = cost.vector
        if last:
            return move + _apart(cost, into, planes), move + _apart(cost, out, 1)
        of_x = move + cost.strided if s.stride[1] > 1 else move
    return (of_x, move) if which == "fprop" else (move, of_x)


def _squares(channels: int, lanes: int) -> float:
    """Values of the squares in which images of channels_last are turned, over the channels they hold.

    Of 1 to 24 channels batches of 32 images took 1.2 to 1.7 times what counting channels alone predicts.
    """
    return -(-channels // lanes) * lanes / channels


def _cold(problem: Problem, cost: Cycles) -> float:
    """Seconds a large y takes to write in channels_last beside a few channels' work.

    torch.empty hands it out in two places by turns (docs/measured.md), so that it is in no cache.
    """
    s = problem.shape
    written = s.N * s.K * s.P * s.Q * item_size(problem.dtype)
    per_byte, beyond = cost.cold
    if not problem.channels_last or s.C > COLD_CHANNELS or written <= beyond:
        return 0.0
    return per_byte * written / problem.threads / CLOCK


def _apart(cost: Cycles, channels: int, planes: int) -> float:
    """Cycles a vector of pixels costs more in channels_last: squares of 8 pixels by 8 channels are turned in
    registers, fewer channels move value by value, a strided row from as many places as it has phases."""
    return cost.apart if channels >= 8 else cost.apart * 8 / channels * planes


def _predict_filters(problem: Problem, config: Config, cost: Cycles) -> float:
    s, lanes = problem.shape, cost.lanes
    _, parts = config
    pixels = s.N * s.taps_inside() / s.taps * s.P * s.Q
    counts = problem.skeleton.live.reshape(s.groups, s.group_k, s.taps).sum(1)  # filters of every tap
    vectors = float((-(-counts // (lanes * parts)) * parts).sum())  # of a tap, the last one partly empty
    # One tap with all filters runs at 60 % of what several taps with a share each do (measured, not explained).
    fma = cost.filters_fma * (1.0 if s.taps > 1 else 1.6)
    tile = vectors * pixels * (fma * s.group_c + cost.scatter)
    if 4 * (s.C * s.H * s.W + s.K * s.P * s.Q) > IMAGE_BYTES:
        tile *= cost.uncut
    weights = vectors * s.group_c * cost.weights * -(-s.N // config[0])
    out = cost.out * s.N * s.K * s.P * s.Q / lanes
    return 4e-6 + (max(tile, weights) + out) / min(problem.threads, parts * max(s.N, 1)) / CLOCK


def _predict_taps(problem: Problem, config: Config, cost: Cycles) -> float:
    """Pairs of filters: multiply-adds, the ends of their tiles, an im2col along the width."""
    s, lanes = problem.shape, cost.lanes
    (rows,) = config
    blocks = -(-s.P // rows)
    halo, phases = s.dilation[0] * (s.R - 1) // s.stride[0], min(s.stride[0], s.R)
    vectors = -(-rows * s.Q // lanes)  # of a block
    window = max(4, min(6 if lanes == 8 else 12, 30_000 // (4 * lanes * s.taps * s.group_c)))
    sums = max(1, -(-problem.skeleton.stripes * s.group_c // (48 * s.K)))  # of a pair
    work = cost.pair_fma * problem.skeleton.stripes / s.groups * s.group_c * vectors
    work += cost.pair_end * -(-s.group_k // 2) * sums * -(-vectors // window)
    if s.group_c > 4:  # where panel and output no longer fit L2; other kernels win from 8 channels on
        work *= 1.5
    copied = s.group_c * s.S * phases * (rows + halo)
    copy = copied * (cost.pair_row + cost.pair_copy * s.Q / lanes)
    if s.stride[1] > 1 and not problem.channels_last:
        copy += cost.strided * copied * s.Q / lanes
    if problem.channels_last:
        copy += _apart(cost, s.group_c, phases) * copied * s.Q / lanes / s.S
    if problem.channels_last or problem.dtype != "float32":  # y leaves through a buffer
        work += cost.vector * s.group_k * vectors
    tasks = blocks * s.N * s.groups
    return 6e-6 + -(-tasks // problem.threads) * (work + copy) / CLOCK


def predict_wgrad(problem: Problem, cost: Cycles) -> float:
    """Seconds of wgrad: live multiply-adds inside the image, lanes along C, their tiles' ends, two copies."""
    s, lanes, chunk_pixels = problem.shape, cost.lanes, wgrad_pixels(problem, cost)
    vectors, stripes = -(-s.group_c // lanes), problem.skeleton.stripes
    share = s.taps_inside() / s.taps
    work = cost.wgrad * stripes * vectors * s.N * s.P * s.Q * share
    if 4 * chunk_pixels * (s.C + s.K) > CHUNK_BYTES:
        work *= cost.beyond
    many = vectors >= 4  # tiles of 4 filters by 3 vectors, else of 6 by 2
    tiles = max(stripes / (4 if many else 6), s.taps * s.groups) * -(-vectors // (3 if many else 2))
    pixels = s.P * s.Q
    if chunk_pixels <= pixels:
        rows = -(-s.P // max(1, (pixels + chunk_pixels // 2) // chunk_pixels))  # of a chunk
        chunks = s.N * -(-s.P // rows)
    else:
        chunks = -(-s.N * pixels // chunk_pixels)
    row, join = cost.ends
    ends = tiles * row * s.N * s.P * sqrt(share) + join * stripes * vectors * chunks

    # A group's few channels go value by value; dy stays filter by filter.
    channels = s.C if s.group_c < lanes else s.C / lanes
    read, written = cost.copy
    copies = s.N * (read * s.H * s.W * channels + written * s.P * s.Q * s.K / lanes)
    return 4e-6 + (work + ends + copies) / problem.threads / CLOCK
