"""Layout, tables and runner of dgrad on Hopper's own instructions (csrc/cuda/dgrad_sm90.cu): channels last, 16-byte
pieces of channels and filters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from stripe_kernels.backends.cuda_mma import dense_channels_last, empty_channels_last
from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.backends.cuda_tiles import MOST_ROWS, PIXEL_BYTES, SIDE, TAPS, patches_of
from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.backends.cuda_wgmma import CHUNK, ROW, SHARED_BYTES
from stripe_kernels.geometry import ConvShape
from stripe_kernels.packed import Int32Array
from stripe_kernels.phases import Phase, phases
from stripe_kernels.registry import Config, Problem
from stripe_kernels.skeleton import FilterSkeleton

PIXELS = 128  # of a block
STRIPES = 64  # of a step
EIGHT = 8  # stripes of one tap
STEP_BYTES = 320
STAGES = (2, 4)  # of the ring of weights: least, and most
CONFIGS = ((256,), (128,), (64,))  # channels of a block


@dataclass(frozen=True, eq=False)
class Lists:
    """The stripes of one phase, tap by tap in eights: `filters` [eights, 8] in the order in which they are gathered,
    `rows` of the packed weight likewise (-1: none, and the filter is one that its tap reads anyway), and `taps`
    [eights], places in the phase's list of taps (-1: none)."""

    filters: Int32Array
    rows: Int32Array
    taps: Int32Array


def _eights(filters: Int32Array, rows: Int32Array) -> tuple[Int32Array, Int32Array]:
    """[eights, 8] of both. Four threads gather places 0, 2, 4, 6 of an eight at once, then 1, 3, 5, 7: those should lie
    in different banks, that is filters in different pairs modulo 4."""
    waiting = [list(np.flatnonzero(filters // 2 % 4 == bank)) for bank in range(4)]
    places = np.array((0, 2, 4, 6, 1, 3, 5, 7))
    count = -(-len(filters) // EIGHT)
    found = np.full((2, count, EIGHT), -1, np.int32)
    found[0] = filters[0]
    for eight in range(count):
        order: list[int] = []
        while len(order) < EIGHT and any(waiting):
            turn = [w.pop() for w in waiting if w]
            while len(turn) < 4 and any(waiting):
                turn.append(max(waiting, key=len).pop())
            order += turn
        found[0, eight, places[: len(order)]] = filters[order]
        found[1, eight, places[: len(order)]] = rows[order]
    return found[0], found[1]


@lru_cache(maxsize=4096)
def lists_of(phase: Phase) -> Lists:
    """Filled up to whole steps, at least one."""
    filters, rows, taps = [], [], []
    for number, tap in enumerate(phase.taps):
        f, r = _eights(tap.filters, tap.row)
        filters.append(f)
        rows.append(r)
        taps.append(np.full(len(f), number, np.int32))
    count = sum(map(len, taps))
    missing = max(1, -(-count // (STRIPES // EIGHT))) * (STRIPES // EIGHT) - count
    none = np.full((missing, EIGHT), -1, np.int32)
    return Lists(
        np.concatenate([*filters, np.zeros_like(none)]), np.concatenate([*rows, none]),
        np.concatenate([*taps, none[:, 0]]),
    )  # fmt: skip


@lru_cache(maxsize=128)
def _patches(skeleton: FilterSkeleton, s: ConvShape) -> tuple[tuple[Phase, np.ndarray, np.ndarray], ...]:
    return tuple(
        (p, *patches_of(tuple((t.i, t.j) for t in p.taps), (s.N, p.rows, p.columns), (s.P, s.Q), PIXELS))
        for p in phases(skeleton, s)
        if p.pixels
    )


@lru_cache(maxsize=512)
def layout_of(problem: Problem, config: Config) -> Layout | None:
    """None where a block of sm_90 has too little shared memory, or a phase too many taps or pixels."""
    s, (width,) = problem.shape, config
    chunks = -(-s.group_k // CHUNK)
    for phase in phases(problem.skeleton, s):
        # What a tile in the middle of a map spans, before anything is counted pixel by pixel.
        away = [tap.i * s.Q + tap.j for tap in phase.taps]
        if (
            away
            and phase.rows > s.R
            and chunks * ROW * min(max(away) - min(away), s.N * s.P * s.Q) > SHARED_BYTES
        ):
            return None
    found = _patches(problem.skeleton, s)
    most = max((int(count.max(initial=0)) for _, _, count in found), default=0)
    boxes = -(-max(1, most) // MOST_ROWS)
    box = max(1, most) if boxes == 1 else -(-most // boxes // 8) * 8  # each begins where the swizzle does
    pitch = -(-(-(-max(1, most) // box) * box + 1) // 8) * 8 * ROW
    taps = max((len(p.taps) for p, *_ in found), default=0)
    steps = max((len(lists_of(p).taps) * EIGHT // STRIPES for p, *_ in found), default=1)
    patch = -(-max(chunks * pitch, PIXELS * (2 * width + 16)) // 1024) * 1024
    tile = patch + steps * STEP_BYTES + PIXELS * PIXEL_BYTES + 8
    tiles = sum(len(count) for *_, count in found)
    if taps > TAPS or max((max(p.rows, p.columns) for p, *_ in found), default=0) > SIDE:
        return None
    for buffers in (2, 1):
        stages = min(STAGES[1], (SHARED_BYTES - buffers * tile - 32 - 1024) // (STRIPES * width * 2 + 16))
        if stages >= STAGES[0]:
            break
    else:
        return None
    walk = Walk(
        s.N, (PIXELS, 1, 1), (tiles, 1, 1), (s.H, s.W), s.stride, (s.P, s.Q), (1, 1),
        (1, steps), (buffers, box), (1, 1), max(1, len(found)),
    )  # fmt: skip
    return Layout(
        walk,
        s.groups,
        s.group_k,
        s.group_c,
        width,
        -(-s.group_c // width),
        max(1, most),
        pitch,
        stages,
        1,
        width,
    )


class WgmmaDgrad(CudaRunner):
    """Items are tiles of pixels, steps the phases of the stride, entries the steps of 64 stripes, lists the taps."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, layout_of(problem, config)
        assert layout is not None
        found = _patches(problem.skeleton, s)
        tables = Tables(classes=[v for p, *_ in found for v in (p.h0, p.w0)] or [0, 0])
        rows: list[Int32Array] = []
        steps = 0
        for number, (phase, low, count) in enumerate(found):
            lists = lists_of(phase)
            first = np.arange(len(low)) * PIXELS
            place = np.unravel_index(first, (max(1, s.N), phase.rows, phase.columns))
            tile = [np.full(len(low), number), first, low, count, *place, np.zeros_like(first)]
            tables.items += np.stack(tile, 1).ravel().tolist()
            mine = len(lists.taps) * EIGHT // STRIPES
            tables.steps += [phase.group, phase.h0, phase.w0, phase.rows, phase.columns]
            tables.steps += [len(tables.lists), len(phase.taps), steps, steps + mine, 0, 0, 0]
            tables.lists += [v for tap in phase.taps for v in (tap.i, tap.j)]
            # [step, product, eight, thread, two] -> [step, product, thread, eight, two]
            at = lists.filters // CHUNK * layout.pitch + lists.filters % CHUNK * 2
            words = at.reshape(mine, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(mine, 64)
            taps = np.zeros(
                (len(lists.taps), 2), np.int64
            )  # of each eight: its bit, 0 without a stripe, and offset
            live = np.flatnonzero(lists.taps >= 0)
            away = np.array([-(tap.i * s.Q + tap.j) * ROW for tap in phase.taps] or [0])
            taps[live] = np.stack([1 << lists.taps[live].astype(np.int64), away[lists.taps[live]]], 1)
            all_ = np.concatenate([words, taps.reshape(mine, 16)], 1)
            tables.entries += (all_ & 0xFFFFFFFF).astype(np.uint32).view(np.int32).ravel().tolist()
            rows.append(lists.rows.ravel())
            steps += mine
        super().__init__(
            native, "dgrad_sm90", problem, layout, tables, rows=np.concatenate([np.empty(0, np.int32), *rows])
        )

    def pack(
        self, weight: Tensor
    ) -> Tensor:  # [A, C/groups] -> [64 a step, C/groups], zeros without a stripe
        return self.copy_rows(weight.detach(), self.arrays.on(weight.device)["rows"])

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        return self.launch(dense_channels_last(dy), packed, empty_channels_last(self.shape.input_size, dy))
