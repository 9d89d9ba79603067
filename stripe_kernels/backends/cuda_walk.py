"""How the CUDA kernels walk pixels: tiles, patches and the row of every tap in them. Torch-free;
csrc/cuda/params.h has the equations and the same fields.

Three walks of fprop, one of dgrad:

    patch       a tile's input with its halo is loaded once; a tap is a row offset in it
    tap         every tap loads its own pixels: no halo, any stride and dilation
    position    a class for each output position, images as the tile's pixels; taps outside the image
                are dropped exactly
    dgrad       as patch or tap, a class for each phase of the stride
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

from stripe_kernels.geometry import ConvShape, IntPair


@dataclass(frozen=True)
class Walk:
    """The integers of sk::cuda::Walk, in its order."""

    images: int
    tile: tuple[int, int, int]  # images, rows, columns of output pixels
    tiles: tuple[int, int, int]
    out: IntPair
    out_step: IntPair
    inp: IntPair
    in_step: IntPair
    patch: IntPair
    load: IntPair
    row: IntPair
    classes: int

    def integers(self) -> list[int]:
        flat: list[int] = []
        for field in astuple(self):
            flat += field if isinstance(field, tuple) else [field]
        return flat

    @property
    def rows(self) -> int:
        """Rows of the patch."""
        return self.tile[0] * self.patch[0] * self.patch[1]

    @property
    def blocks(self) -> int:
        return self.tiles[0] * self.tiles[1] * self.tiles[2]


@dataclass(frozen=True)
class Load:
    """One patch: its origin, and (tap, row offset) of the taps it serves."""

    origin: IntPair
    taps: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PixelClass:
    """Output pixels that share their taps."""

    offset: IntPair
    loads: tuple[Load, ...]


Walked = tuple[Walk, tuple[PixelClass, ...]]


@dataclass(frozen=True)
class _Axis:
    """One direction of one class: `taps` maps a filter row to the input offset it reads, pixel i reading i
    * step + offset."""

    offset: int
    taps: dict[int, int]


def _fprop_axis(taps: int, dilation: int, pad: int) -> list[_Axis]:
    return [_Axis(0, {t: t * dilation - pad for t in range(taps)})]


def _position_axis(size: int, out: int, taps: int, stride: int, dilation: int, pad: int) -> list[_Axis]:
    found = []
    for p in range(out):
        reads = {t: p * stride + t * dilation - pad for t in range(taps)}
        found.append(_Axis(p, {t: h for t, h in reads.items() if 0 <= h < size}))
    return found


def _dgrad_axis(taps: int, stride: int, dilation: int, pad: int) -> list[_Axis]:
    """Phase f of the stride: dx[f + stride * i] reads dy[i + (f + pad - t * dilation) / stride] where that
    divides."""
    found = []
    for phase in range(stride):
        reads = {t: phase + pad - t * dilation for t in range(taps)}
        found.append(_Axis(phase, {t: v // stride for t, v in reads.items() if v % stride == 0}))
    return found


def _tilings(rows: int, columns: int, images: int, pixels: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of at most `pixels` pixels, whole maps of several images where they fit."""
    for h in range(1, min(rows, pixels) + 1):
        w = min(columns, pixels // h)
        w = -(-columns // -(-columns // w))
        whole = h == rows and w == columns
        yield max(1, min(images, pixels // (h * w))) if whole else 1, h, w


def _spread(axes: list[_Axis]) -> int:
    return max((max(a.taps.values()) - min(a.taps.values()) for a in axes if a.taps), default=0)


def _classes(
    vertical: list[_Axis], horizontal: list[_Axis], columns: int, patch_w: int, per_tap: bool
) -> Iterator[PixelClass]:
    for v in vertical:
        for h in horizontal:
            top, left = min(v.taps.values(), default=0), min(h.taps.values(), default=0)
            pairs = [(r, s) for r in v.taps for s in h.taps]
            if per_tap:
                loads = [Load((v.taps[r], h.taps[s]), ((r * columns + s, 0),)) for r, s in pairs]
            else:
                rows = [(r * columns + s, (v.taps[r] - top) * patch_w + h.taps[s] - left) for r, s in pairs]
                loads = [Load((top, left), tuple(rows))] if rows else []
            yield PixelClass((v.offset, h.offset), tuple(loads))


def _walk(
    s: ConvShape,
    out: IntPair,
    out_step: IntPair,
    inp: IntPair,
    in_step: IntPair,
    axes: tuple[list[_Axis], list[_Axis]],
    pixels: int,
    max_rows: int,
) -> Walked:
    """The cheapest tile in the cheaper of the two ways of loading: rows moved, and pixels computed that do
    not exist."""
    rows, columns = -(-out[0] // out_step[0]), -(-out[1] // out_step[1])
    taps = max(len(v.taps) * len(h.taps) for v in axes[0] for h in axes[1])
    best: tuple[float, tuple[int, int, int], IntPair, bool] | None = None
    for tile in _tilings(rows, columns, s.N, pixels):
        blocks = -(-s.N // tile[0]) * -(-rows // tile[1]) * -(-columns // tile[2])
        halo = tuple((t - 1) * k + _spread(a) + 1 for t, k, a in zip(tile[1:], in_step, axes, strict=True))
        for per_tap, patch, loads in ((False, halo, 1), (True, tile[1:], taps)):
            moved = tile[0] * patch[0] * patch[1]
            cost = blocks * (pixels + moved * loads)
            if moved <= max_rows and (best is None or cost < best[0]):
                best = (cost, tile, (patch[0], patch[1]), per_tap)
    assert best is not None, "a tile of one pixel loaded tap by tap always fits"
    _, tile, patch, per_tap = best
    walk = Walk(
        s.N, tile, (-(-s.N // tile[0]), -(-rows // tile[1]), -(-columns // tile[2])), out, out_step,
        inp, in_step, patch, in_step if per_tap else (1, 1), (1, 1) if per_tap else in_step,
        len(axes[0]) * len(axes[1]),
    )  # fmt: skip
    return walk, tuple(_classes(*axes, s.S, patch[1], per_tap))


def fprop_walk(s: ConvShape, pixels: int, max_rows: int) -> Walked:
    """Blocks of at most `pixels` output pixels whose patch has at most `max_rows` rows."""
    axes = (_fprop_axis(s.R, s.dilation[0], s.padding[0]), _fprop_axis(s.S, s.dilation[1], s.padding[1]))
    return _walk(s, (s.P, s.Q), (1, 1), (s.H, s.W), s.stride, axes, pixels, max_rows)


def position_walk(s: ConvShape, pixels: int) -> Walked:
    """One output position of up to `pixels` images a block."""
    axes = (
        _position_axis(s.H, s.P, s.R, s.stride[0], s.dilation[0], s.padding[0]),
        _position_axis(s.W, s.Q, s.S, s.stride[1], s.dilation[1], s.padding[1]),
    )
    images = max(1, min(s.N, pixels))
    walk = Walk(
        s.N, (images, 1, 1), (-(-s.N // images), 1, 1), (s.P, s.Q), (1, 1), (s.H, s.W), (1, 1),
        (1, 1), (1, 1), (1, 1), s.P * s.Q,
    )  # fmt: skip
    return walk, tuple(_classes(*axes, s.S, 1, True))


def dgrad_walk(s: ConvShape, pixels: int, max_rows: int) -> Walked:
    """Blocks of at most `pixels` pixels of dx, all of one phase of the stride."""
    axes = (
        _dgrad_axis(s.R, s.stride[0], s.dilation[0], s.padding[0]),
        _dgrad_axis(s.S, s.stride[1], s.dilation[1], s.padding[1]),
    )
    return _walk(s, (s.H, s.W), s.stride, (s.P, s.Q), (1, 1), axes, pixels, max_rows)
