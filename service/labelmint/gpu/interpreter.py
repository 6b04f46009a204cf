"""The Style Interpreter for GPUs, in the Triton language: labels and JS uncertainty from a generator's feature maps.

Rules of this file:
- The mathematics is that of `labelmint.models.interpreter`; only the order of the computation differs.
- It imports only the standard library, numpy, torch and triton, because an exported model carries a copy of it.
- One sample at a time, every sum in one fixed order, no atomic operations, and one committed tile for each kind of GPU:
  the bytes of a sample depend neither on its batch nor on what ran before.
- Operands of the tensor cores have the type that `precision` names; sums and statistics are float32.
- A number that is not finite, or that the operands' type cannot hold, becomes NaN, and NaN passes through everything to
  the JS divergence and the mean entropy. So every gate rejects such a sample; its label means nothing.

Names: R is the output resolution; C_r the channels of level r; N the number of heads; h1, h2 their hidden widths; K the
number of classes or keypoints. `base` is the level up to which levels are projected at their own resolution.

How a sample is labelled:
1. `_project` projects each level r <= base to the N*h1 hidden units at its own resolution, as one matrix product.
2. The sum of the levels below `base` is a piecewise bilinear function whose knots are the edges between the pixels of
   level `base`. `_widen` computes its values at the edges, from one level to the next; this is exact (see
   `labelmint/kernel/interpreter.c`).
3. `_interpret` labels one tile of pixels. It keeps the tile's features of the levels above `base` on the chip. For each
   head in turn it multiplies them by the head's projections, adds the bilinear interpolation of the few edges and
   pixels of level `base` that the tile touches, as one more matrix product, and runs ReLU and both small layers. Only
   sums over the heads remain.
4. The score, and the keypoints from the hottest pixel of each tile, are computed from these results in a fixed order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
_TYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MIN_RESOLUTION = 16
# Level R/2 is interpolated inside the kernel if it has at most this many channels, else it is projected before.
MAX_HALF_CHANNELS = 128


# ---- what is compiled ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The dimensions of an interpreter. `channels` maps each level r = 4, 8, ..., R to C_r."""

    channels: Mapping[int, int]
    heads: int
    hidden: tuple[int, int]
    classes: int
    keypoints: bool = False

    @property
    def resolution(self) -> int:
        return max(self.channels)

    @property
    def half(self) -> bool:
        """Whether level R/2 is interpolated inside the kernel."""
        return self.resolution >= 16 and self.channels[self.resolution // 2] <= MAX_HALF_CHANNELS

    @property
    def base(self) -> int:
        """The highest level that is projected at its own resolution."""
        return self.resolution // (4 if self.half else 2)


@dataclass(frozen=True)
class Tile:
    """How `_interpret` is cut: pixels of a tile, hidden units computed at a time, and the compiler's options.

    Features stay on the chip in slices of `slice` channels. `unroll` is the number of blocks in one pass of the loop.
    Beyond `depth` channels and points, the compiler spills registers, or finds no room in the tensor memory of sm_100.
    """

    rows: int
    columns: int
    block: int
    warps: int
    stages: int
    slice: int
    unroll: int = 1
    depth: int = 384

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


# The tiles by the GPUs' generation, precision, and width (h2 > 32), the best one first. They are fixed, because a tile
# that a race decides would decide the last bits of a sample, too. `tests/gpu/test_compiled.py` compiles them.
_TINY = (Tile(4, 4, 16, 8, 1, 16, depth=1 << 20),)
_SMALL = (Tile(8, 8, 32, 8, 1, 16), Tile(4, 8, 32, 8, 1, 16), *_TINY)
TILES: dict[tuple[int, str, bool], tuple[Tile, ...]] = {
    (80, "half", False): (Tile(8, 16, 64, 8, 2, 16, depth=256), Tile(8, 8, 64, 8, 2, 16), *_SMALL),
    (80, "half", True): (Tile(8, 8, 64, 8, 2, 16), *_SMALL),
    (80, "tf32", False): _SMALL,
    (80, "tf32", True): _SMALL[1:],
    (80, "float32", False): _SMALL,
    (80, "float32", True): _TINY,
    (90, "half", False): (Tile(8, 16, 64, 8, 2, 32, 2, depth=256), Tile(8, 16, 64, 8, 2, 32), *_SMALL),
    (90, "half", True): (Tile(8, 16, 32, 8, 2, 16), *_SMALL),
    (90, "tf32", False): (Tile(8, 16, 32, 8, 1, 16), *_SMALL),
    (90, "tf32", True): _SMALL,
    (90, "float32", False): (Tile(8, 8, 16, 4, 1, 16), *_TINY),
    (90, "float32", True): _TINY,
    (100, "half", False): (Tile(8, 16, 64, 8, 3, 64, depth=256), Tile(8, 8, 64, 8, 1, 64), *_TINY),
    (100, "half", True): (Tile(8, 8, 64, 8, 1, 64), *_TINY),
    (100, "tf32", False): (Tile(8, 16, 32, 8, 1, 32), *_TINY),
    (100, "tf32", True): (Tile(8, 8, 32, 8, 1, 32), *_TINY),
    (100, "float32", False): (Tile(8, 8, 32, 8, 1, 32, depth=256), Tile(4, 4, 32, 4, 1, 64), *_TINY),
    (100, "float32", True): _TINY,
}
# Shared memory that one program may use, in bytes, by compute capability; other GPUs have at least the least.
SHARED_BYTES = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
LEAST_SHARED_BYTES = 99 << 10


def tile_of(shape: Shape, precision: str, capability: int) -> Tile:
    """Return the committed tile for a GPU of this compute capability, for example 90 for 9.0.

    Raises ValueError if the interpreter has too many channels for every tile.
    """
    generation = 90 if 90 <= capability < 100 else 100 if 100 <= capability < 120 else 80
    kind = "half" if precision in ("float16", "bfloat16") else precision
    room = SHARED_BYTES.get(capability, LEAST_SHARED_BYTES)
    for tile in TILES[generation, kind, shape.hidden[1] > 32]:
        fits = depth_of(shape, precision, tile) <= tile.depth and shared_bytes(shape, precision, tile) <= room
        if fits and max(tile.rows, tile.columns) <= shape.resolution:
            return tile
    raise ValueError(
        f"level {shape.resolution} has {shape.channels[shape.resolution]} channels, too many for the shared memory of "
        f"this GPU at {precision}; choose another precision, or export with `--format onnx`"
    )


def depth_of(shape: Shape, precision: str, tile: Tile) -> int:
    """The channels and points of a pixel that the tile keeps on the chip."""
    c = constants(shape, precision, tile)
    return int(c["C_PADDED"] + c["POINTS"] + (c["C_HALF_PADDED"] if c["HALF"] else 0))


def shared_bytes(shape: Shape, precision: str, tile: Tile) -> int:
    """The shared memory that a tile takes at most: features, and weights in as many buffers as stages."""
    c, item, depth = constants(shape, precision, tile), _TYPES[precision].itemsize, depth_of(shape, precision, tile)
    weights = (depth + c["H2"]) * tile.block * tile.unroll * tile.stages
    if tile.stages == 1:  # no buffers, but room for the operands of one product; float32 has them in two parts
        weights = max(16384 if precision == "float32" else 4096, (tile.pixels + c["K_PADDED"]) * c["H2"])
    return item * (tile.pixels * depth + weights)


_WIDEN = (16, 128)  # edges and hidden units that `_widen` computes at a time
PROJECT_CHANNELS = 32  # channels that `_project` multiplies at a time


def projection_tile(r: int, precision: str) -> tuple[int, int, int, int]:
    """The tile of `_project` at level r: pixels, hidden units, warps and stages."""
    if precision == "float32":
        return (32, 32, 4, 1)
    return (128, 128, 8, 3) if r >= 64 else (64, 64, 4, 3) if r >= 16 else (16, 32, 4, 4)


def padded(size: int) -> int:
    """The size of an axis of a matrix product: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def sliced(channels: int, size: int) -> int:
    """The channels of a level with their padding: whole slices."""
    return -(-channels // size) * size


def points_of(shape: Shape, tile: Tile) -> tuple[int, int]:
    """The numbers of edges and of pixels of level `base` that a tile touches."""
    scale = shape.resolution // shape.base
    rows, columns = tile.rows // scale, tile.columns // scale
    return (rows + 1) * (columns + 1), (rows + 2) * (columns + 2)


def constants(shape: Shape, precision: str, tile: Tile) -> dict[str, Any]:
    """The compile-time constants of `_interpret`."""
    r = shape.resolution
    return {
        "KEYPOINTS": shape.keypoints,
        "TF32": precision == "tf32",
        "DOT": "tf32x3" if precision == "float32" else "tf32",
        "INTERPRETED": triton.knobs.runtime.interpret,
        "LIMIT": torch.finfo(_TYPES[precision]).max,
        "R": r,
        "SCALE": r // shape.base,
        "HALF": shape.half,
        "C": shape.channels[r],
        "C_PADDED": sliced(shape.channels[r], tile.slice),
        "C_HALF": shape.channels[r // 2],
        "C_HALF_PADDED": sliced(shape.channels[r // 2], tile.slice),
        "POINTS": padded(sum(points_of(shape, tile))),
        "N": shape.heads,
        "H1": max(padded(shape.hidden[0]), tile.block),
        "H2": padded(shape.hidden[1]),
        "K": shape.classes,
        "K_PADDED": padded(shape.classes),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK": tile.block,
        "CHANNELS": tile.slice,
        "UNROLL": tile.unroll,
    }


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _rounded(x, TF32: tl.constexpr, kind):
    """Round float32 to the operands' type.

    Tensor cores cut float32 off to TF32, so it is rounded here. Both products are exact: a sum and a difference round.
    """
    if TF32:
        x = (x + 8192.0 * x) - 8192.0 * x
    return x.to(kind)


@triton.jit
def _operand(x, LIMIT: tl.constexpr, TF32: tl.constexpr, kind):
    """Round float32 to the operands' type; what this type cannot hold becomes NaN."""
    return _rounded(tl.where(tl.abs(x) <= LIMIT, x, float("nan")), TF32, kind)


@triton.jit
def _binary_entropy(p):
    other = 1.0 - p
    return -(p * tl.log(tl.maximum(p, 1e-30)) + other * tl.log(tl.maximum(other, 1e-30)))


@triton.jit
def _hat(x):
    """The weight of linear interpolation at distance x."""
    return tl.maximum(1.0 - tl.abs(x), 0.0)


@triton.jit
def _product(a, b, sums, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Add the matrix product of two operands to float32 `sums`."""
    if INTERPRETED:  # Triton's interpreter multiplies no bfloat16; products of operands are exact in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=DOT)


@triton.jit
def _project(
    features,
    weight,
    out,
    C,
    PIXELS,
    UNITS,
    TF32: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LIMIT: tl.constexpr,
    OUT_LIMIT: tl.constexpr,
    C_PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Project one level: features float32 [C,PIXELS] and weight [UNITS,C_PADDED] to out [PIXELS,UNITS]."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    kind = weight.dtype.element_ty
    sums = tl.zeros([BLOCK_P, BLOCK_U], tl.float32)
    for start in range(0, C_PADDED, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        at = features + channel.to(tl.int64)[:, None] * PIXELS + pixel[None, :]
        x = tl.load(at, mask=(channel < C)[:, None] & (pixel < PIXELS)[None, :], other=0.0)
        w = tl.load(weight + unit[:, None] * C_PADDED + channel[None, :], mask=(unit < UNITS)[:, None], other=0.0)
        sums = _product(tl.trans(_operand(x, LIMIT, TF32, kind)), tl.trans(w), sums, DOT, INTERPRETED)
    sums = tl.where(tl.abs(sums) <= OUT_LIMIT, sums, float("nan"))
    at = out + pixel.to(tl.int64)[:, None] * UNITS + unit[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(pixel < PIXELS)[:, None] & (unit < UNITS)[None, :])


@triton.jit
def _widen(
    edges,
    pixels,
    out,
    R,
    UNITS,
    LIMIT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Add level R to the sum of the levels below it, and evaluate it at the edges between the pixels of level 2R.

    edges float32 [R+1,R+1,UNITS] and pixels float32 [R,R,UNITS] to out [2R+1,2R+1,UNITS]. An edge of level 2R is an
    edge of level R or halfway between two. Beside it are two pixels of level R at the same distance, or it is the
    centre of one. Beyond the border, the outermost pixel repeats.
    """
    point = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[:, None]
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)[None, :]
    side = 2 * R + 1
    inside = (point < side * side) & (unit < UNITS)
    y, x = point // side, point % side
    up, down, left, right = y // 2, (y + 1) // 2, x // 2, (x + 1) // 2
    above, below = tl.maximum(down - 1, 0), tl.minimum(up, R - 1)
    before, after = tl.maximum(right - 1, 0), tl.minimum(left, R - 1)
    wide = UNITS.to(tl.int64)
    e00 = tl.load(edges + (up * (R + 1) + left) * wide + unit, mask=inside)
    e01 = tl.load(edges + (up * (R + 1) + right) * wide + unit, mask=inside)
    e10 = tl.load(edges + (down * (R + 1) + left) * wide + unit, mask=inside)
    e11 = tl.load(edges + (down * (R + 1) + right) * wide + unit, mask=inside)
    q00 = tl.load(pixels + (above * R + before) * wide + unit, mask=inside)
    q01 = tl.load(pixels + (above * R + after) * wide + unit, mask=inside)
    q10 = tl.load(pixels + (below * R + before) * wide + unit, mask=inside)
    q11 = tl.load(pixels + (below * R + after) * wide + unit, mask=inside)
    edge = 0.5 * (0.5 * (e00 + e10) + 0.5 * (e01 + e11))
    pixel = 0.5 * (0.5 * (q00 + q10) + 0.5 * (q01 + q11))
    total = edge + pixel
    total = tl.where(tl.abs(total) <= LIMIT, total, float("nan"))
    tl.store(out + point * wide + unit, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _interpret(
    full,
    half,
    points,
    weight_full,
    weight_half,
    weight2,
    bias2,
    weight3,
    bias3,
    label,
    js_map,
    mean_entropy,
    peak_heat,
    peak_pixel,
    KEYPOINTS: tl.constexpr,
    TF32: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LIMIT: tl.constexpr,
    R: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    C_HALF: tl.constexpr,
    C_HALF_PADDED: tl.constexpr,
    POINTS: tl.constexpr,
    N: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Label the P pixels of one tile.

    full float32 [C,R,R] and half float32 [C_HALF,R/2,R/2] are features. points [(S+1)^2+S^2,N*H1], for S = R/SCALE: the
    sum of the levels below S, and the bias, at the edges between the pixels of level S, and then level S at its pixels.
    weight_full [N*H1,C_PADDED], weight_half [N*H1,C_HALF_PADDED], weight2 [N*H2,H1], weight3 [N*K_PADDED,H2] and points
    have the operands' type; bias2 [N*H2] and bias3 [N*K_PADDED] are float32. The hidden units and classes that padding
    adds have weights of zero.

    Writes js_map and mean_entropy float32 [R,R]; and label uint8 [R,R], or the tile's highest heat peak_heat float32
    [tiles,K_PADDED], infinite for NaN, and the first pixel that has it, peak_pixel int32 [tiles,K_PADDED].
    """
    P: tl.constexpr = ROWS * COLUMNS
    S: tl.constexpr = R // SCALE
    kind = weight2.dtype.element_ty
    tile = tl.program_id(0)
    y0, x0 = tile // (R // COLUMNS) * ROWS, tile % (R // COLUMNS) * COLUMNS
    pixel = tl.arange(0, P)
    y, x = y0 + pixel // COLUMNS, x0 + pixel % COLUMNS

    # The features of level R, and those of level R/2 between four pixels, in slices of CHANNELS channels: all at once
    # would take more registers than everything after them. Lanes run along pixels, so channels come first.
    features = ()
    for i in tl.static_range(C_PADDED // CHANNELS):
        channel = i * CHANNELS + tl.arange(0, CHANNELS)[:, None]
        at = full + channel.to(tl.int64) * (R * R) + (y * R + x)[None, :]
        values = tl.load(at, mask=channel < C, other=0.0)
        features += (tl.trans(_operand(values, LIMIT, TF32, kind)),)  # [P,CHANNELS]
    between = ()
    if HALF:
        D: tl.constexpr = R // 2
        up, left = tl.maximum((y + 1) // 2 - 1, 0), tl.maximum((x + 1) // 2 - 1, 0)
        down, right = tl.minimum((y + 1) // 2, D - 1), tl.minimum((x + 1) // 2, D - 1)
        # An even pixel lies 3/4 of the way to the second neighbour, an odd one 1/4.
        v, h = tl.where(y % 2 == 0, 0.75, 0.25)[None, :], tl.where(x % 2 == 0, 0.75, 0.25)[None, :]
        for i in tl.static_range(C_HALF_PADDED // CHANNELS):
            channel = i * CHANNELS + tl.arange(0, CHANNELS)[:, None]
            plane, known = half + channel.to(tl.int64) * (D * D), channel < C_HALF
            a = tl.load(plane + (up * D + left)[None, :], mask=known, other=0.0)
            b = tl.load(plane + (up * D + right)[None, :], mask=known, other=0.0)
            upper = a * (1.0 - h) + b * h
            a = tl.load(plane + (down * D + left)[None, :], mask=known, other=0.0)
            b = tl.load(plane + (down * D + right)[None, :], mask=known, other=0.0)
            lower = a * (1.0 - h) + b * h
            values = upper * (1.0 - v) + lower * v
            between += (tl.trans(_operand(values, LIMIT, TF32, kind)),)  # [P,CHANNELS]

    # The edges and pixels of level S that the tile touches, and their weights at each pixel: multiples of 1/64.
    E_COLUMNS: tl.constexpr = COLUMNS // SCALE + 1
    EDGES: tl.constexpr = (ROWS // SCALE + 1) * E_COLUMNS
    Q_COLUMNS: tl.constexpr = COLUMNS // SCALE + 2
    TOUCHED: tl.constexpr = EDGES + (ROWS // SCALE + 2) * Q_COLUMNS
    point = tl.arange(0, POINTS)
    is_edge = point < EDGES
    e_y, e_x = y0 // SCALE + point // E_COLUMNS, x0 // SCALE + point % E_COLUMNS
    q_y, q_x = y0 // SCALE - 1 + (point - EDGES) // Q_COLUMNS, x0 // SCALE - 1 + (point - EDGES) % Q_COLUMNS
    p_y = tl.where(is_edge, e_y.to(tl.float32), q_y + 0.5)
    p_x = tl.where(is_edge, e_x.to(tl.float32), q_x + 0.5)
    weight = _hat((y[:, None] + 0.5) / SCALE - p_y[None, :]) * _hat((x[:, None] + 0.5) / SCALE - p_x[None, :])
    weight = tl.where((point < TOUCHED)[None, :], weight, 0.0).to(kind)  # [P,POINTS]
    q_y, q_x = tl.minimum(tl.maximum(q_y, 0), S - 1), tl.minimum(tl.maximum(q_x, 0), S - 1)
    line = tl.where(is_edge, e_y * (S + 1) + e_x, (S + 1) * (S + 1) + q_y * S + q_x)
    line = points + line.to(tl.int64)[:, None] * (N * H1)
    touched = (point < TOUCHED)[:, None]

    k = tl.arange(0, K_PADDED)[None, :]
    is_class = k < K
    sum_probability = tl.zeros([P, K_PADDED], tl.float32)
    sum_entropy = tl.zeros([P], tl.float32)
    votes = tl.zeros([P, K_PADDED], tl.int32)
    sum_heat = tl.zeros([P, K_PADDED], tl.float32)
    for head in range(N):
        row2 = head * H2 + tl.arange(0, H2)
        hidden2 = tl.zeros([P, H2], tl.float32)
        for start in tl.range(0, H1, BLOCK, loop_unroll_factor=UNROLL):
            unit = start + tl.arange(0, BLOCK)
            row1 = (head * H1 + unit)[:, None]
            hidden = tl.zeros([P, BLOCK], tl.float32)
            for i in tl.static_range(C_PADDED // CHANNELS):
                w = tl.load(weight_full + row1 * C_PADDED + (i * CHANNELS + tl.arange(0, CHANNELS))[None, :])
                hidden = _product(features[i], tl.trans(w), hidden, DOT, INTERPRETED)
            if HALF:
                for i in tl.static_range(C_HALF_PADDED // CHANNELS):
                    w = tl.load(weight_half + row1 * C_HALF_PADDED + (i * CHANNELS + tl.arange(0, CHANNELS))[None, :])
                    hidden = _product(between[i], tl.trans(w), hidden, DOT, INTERPRETED)
            known_points = tl.load(line + (head * H1 + unit)[None, :], mask=touched, other=0.0)
            hidden = _product(weight, known_points, hidden, DOT, INTERPRETED)
            # An overflow here becomes infinity, which `hidden2` cannot hide.
            hidden = _rounded(tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL), TF32, kind)  # [P,BLOCK]
            w = tl.load(weight2 + row2[:, None] * H1 + unit[None, :])
            hidden2 = _product(hidden, tl.trans(w), hidden2, DOT, INTERPRETED)
        hidden2 = hidden2 + tl.load(bias2 + row2)[None, :]
        hidden2 = tl.where(tl.abs(hidden2) <= LIMIT, tl.maximum(hidden2, 0.0), float("nan"))
        row3 = head * K_PADDED + tl.arange(0, K_PADDED)
        w = tl.load(weight3 + row3[:, None] * H2 + tl.arange(0, H2)[None, :])
        outputs = tl.zeros([P, K_PADDED], tl.float32)
        outputs = _product(_rounded(hidden2, TF32, kind), tl.trans(w), outputs, DOT, INTERPRETED)
        outputs = outputs + tl.load(bias3 + row3)[None, :]  # [P,K_PADDED]
        if KEYPOINTS:
            heat = tl.where(tl.abs(outputs) <= 3.0e38, outputs, float("nan"))
            sum_heat += heat
            probability = tl.clamp(heat, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            sum_probability += probability
            sum_entropy += tl.sum(tl.where(is_class, _binary_entropy(probability), 0.0), axis=1)
        else:
            # bias3 makes the outputs of the padding -1e30: their exponentials are 0, and so are the products below.
            top = tl.max(outputs, axis=1)
            shifted = outputs - top[:, None]
            exponential = tl.exp(shifted)
            total = tl.sum(exponential, axis=1)
            scale = 1.0 / total
            sum_probability += exponential * scale[:, None]
            sum_entropy += tl.log(total) - tl.sum(exponential * shifted, axis=1) * scale
            choice = tl.min(tl.where(shifted == 0.0, k, K_PADDED), axis=1)  # the smallest id wins a tie
            votes += (choice[:, None] == k).to(tl.int32)

    mean = sum_probability / N
    if KEYPOINTS:
        mixture = tl.sum(tl.where(is_class, _binary_entropy(mean), 0.0), axis=1)
    else:
        mixture = -tl.sum(tl.where(is_class, mean * tl.log(tl.maximum(mean, 1e-30)), 0.0), axis=1)
    entropy = sum_entropy / N
    js = tl.maximum(mixture - entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(js_map + y * R + x, js)
    tl.store(mean_entropy + y * R + x, entropy)
    if KEYPOINTS:
        heat = sum_heat / N
        heat = tl.where(heat == heat, heat, float("inf"))
        peak = tl.max(heat, axis=0)
        first = tl.min(tl.where(heat == peak[None, :], (y * R + x)[:, None], R * R), axis=0)
        here = tile * K_PADDED + tl.arange(0, K_PADDED)
        tl.store(peak_heat + here, peak)
        tl.store(peak_pixel + here, first)
    else:
        most = tl.max(votes, axis=1)
        winner = tl.min(tl.where(votes == most[:, None], k, K_PADDED), axis=1)
        tl.store(label + y * R + x, winner.to(tl.uint8))


# ---- one sample ------------------------------------------------------------------------------------------------------


class GpuInterpreter:
    """A Style Interpreter on one GPU that labels one sample at a time.

    `channels` maps each level to the number of channels that it reads there. `outputs` names the tensors that `run`
    returns.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        *,
        precision: str,
        device: str | torch.device,
        tile: Tile | None = None,
    ) -> None:
        """Take the arrays of `labelmint.kernel.interpreter.check_weights`, which has checked their shapes.

        `tile` replaces the committed one; measurements use it. Raises ValueError for what the kernel cannot run.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
        self.precision, self.device = precision, torch.device(device)
        self.score_kind = str(arrays["score_kind"])
        self.shape = shape_of(arrays)
        self.channels, self.resolution = dict(self.shape.channels), self.shape.resolution
        self.outputs: tuple[str, ...] = ("label", "js_map", "js_score")
        if self.shape.keypoints:
            self.outputs = ("keypoints", "confidence", "js_map", "js_score")
        self.tile = tile or tile_of(self.shape, precision, capability_of(self.device))
        self._constants = constants(self.shape, precision, self.tile)
        self._weights = _Weights(arrays, self._constants, precision, self.device)

    @torch.inference_mode()
    def run(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Label one sample: the features float32 [C_r,r,r] of each level, in order, on the device, to {name: tensor}.

        The tensors are label uint8 [R,R], or keypoints float32 [K,2] and confidence [K]; js_map float32 [R,R]; and
        js_score [1]. Raises ValueError for features of other shapes.
        """
        shapes = [(c, r, r) for r, c in self.channels.items()]
        fits = [tuple(x.shape) for x in features] == shapes
        if not fits or any(x.dtype != torch.float32 or x.device.type != self.device.type for x in features):
            raise ValueError(f"expected float32 features on {self.device} of the shapes {shapes}")
        maps = {r: x.contiguous() for r, x in zip(self.channels, features, strict=True)}
        with _on(self.device):
            points = self._points(maps)
            return self._finish(*self._label(maps, points))

    def _points(self, maps: Mapping[int, Tensor]) -> Tensor:
        """Project the levels up to `base`: [(base+1)^2+base^2,N*H1] of the operands' type, as `_interpret` reads it."""
        base, width = self.shape.base, self._constants["N"] * self._constants["H1"]
        kind = _TYPES[self.precision]
        points = torch.empty((base + 1) ** 2 + base**2, width, dtype=kind, device=self.device)
        below, own = points[: (base + 1) ** 2], points[(base + 1) ** 2 :]
        edges = self._weights.bias1.expand(25, -1).contiguous()  # [25,N*H1]: the edges of the 4x4 pixels
        for r in (r for r in self.channels if r < base):
            pixels = torch.empty(r * r, width, device=self.device)
            self._project(maps[r], r, pixels)
            out = below if 2 * r == base else torch.empty((2 * r + 1) ** 2, width, device=self.device)
            grid = (triton.cdiv((2 * r + 1) ** 2, _WIDEN[0]), triton.cdiv(width, _WIDEN[1]))
            _widen[grid](
                *(edges, pixels, out, r, width),
                LIMIT=torch.finfo(out.dtype).max,
                BLOCK_E=_WIDEN[0],
                BLOCK_U=_WIDEN[1],
                num_warps=4,
            )
            edges = out
        if base == 4:
            below.copy_(edges)
        self._project(maps[base], base, own)
        return points

    def _project(self, features: Tensor, r: int, out: Tensor) -> None:
        """Project level r, float32 [C_r,r,r], to out [r*r,N*H1]."""
        weight, c = self._weights.projection[r], self._constants
        block_p, block_u, warps, stages = projection_tile(r, self.precision)
        _project[(triton.cdiv(r * r, block_p), triton.cdiv(weight.shape[0], block_u))](
            *(features, weight, out, features.shape[0], r * r, weight.shape[0]),
            **{name: c[name] for name in ("TF32", "DOT", "INTERPRETED", "LIMIT")},
            OUT_LIMIT=torch.finfo(out.dtype).max,
            C_PADDED=weight.shape[1],
            BLOCK_P=block_p,
            BLOCK_U=block_u,
            BLOCK_C=PROJECT_CHANNELS,
            num_warps=warps,
            num_stages=stages,
        )

    def _label(self, maps: Mapping[int, Tensor], points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run `_interpret` on all tiles: label, [js_map, mean_entropy], peak_heat and peak_pixel."""
        r, w = self.resolution, self._weights
        tiles = r * r // self.tile.pixels
        label = torch.zeros(r, r, dtype=torch.uint8, device=self.device)
        uncertainty = torch.empty(2, r, r, device=self.device)
        heat = torch.empty(tiles, self._constants["K_PADDED"], device=self.device)
        pixel = torch.empty(heat.shape, dtype=torch.int32, device=self.device)
        _interpret[(tiles,)](
            *(maps[r], maps[r // 2], points, w.full, w.half, w.weight2, w.bias2, w.weight3, w.bias3),
            *(label, *uncertainty, heat, pixel),
            **self._constants,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
        )
        return label, uncertainty, heat, pixel

    def _finish(self, label: Tensor, uncertainty: Tensor, heat: Tensor, pixel: Tensor) -> dict[str, Tensor]:
        js_map, mean_entropy = uncertainty
        outputs = {"js_map": js_map, "js_score": _score(js_map, mean_entropy, self.score_kind)}
        if self.shape.keypoints:
            k, r = self.shape.classes, self.resolution
            highest = heat[:, :k].amax(dim=0)  # [K]
            first = torch.where(heat[:, :k] == highest, pixel[:, :k], r * r).amin(dim=0)  # the first pixel wins a tie
            outputs["keypoints"] = torch.stack([first % r, first // r], dim=1).to(torch.float32)
            outputs["confidence"] = torch.where(highest.isinf(), float("nan"), highest)
        else:
            outputs["label"] = label
        return {name: outputs[name] for name in self.outputs}


def shape_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Shape:
    """Return the dimensions of the weights. Raises ValueError for those that the kernel cannot run."""
    levels = sorted(int(name.partition("_")[2]) for name in arrays if name.startswith("projection_"))
    heads, h2, h1 = arrays["weight2"].shape
    shape = Shape(
        channels={r: arrays[f"projection_{r}"].shape[1] for r in levels},
        heads=heads,
        hidden=(h1, h2),
        classes=arrays["bias3"].shape[1],
        keypoints=str(arrays["task"]) == "keypoints",
    )
    if shape.resolution < MIN_RESOLUTION:
        raise ValueError(f"the GPU's kernel labels images of at least {MIN_RESOLUTION} pixels, not {shape.resolution}")
    return shape


def capability_of(device: torch.device) -> int:
    """The compute capability of a GPU as one number: 90 for 9.0. Without a GPU, that of the first committed tiles."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class _Weights:
    """The weights on the device, padded for `_interpret`, in the operands' type where it multiplies by them."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], c: Mapping[str, Any], precision: str, device: torch.device
    ) -> None:
        def whole(name: str, *sizes: int, padding: float = 0.0) -> Tensor:
            array = torch.from_numpy(np.array(arrays[name]))
            if name.startswith("projection_"):
                array = array.unflatten(0, (c["N"], -1))
            padded_array = torch.full((c["N"], *sizes), padding)
            padded_array[tuple(slice(0, size) for size in array.shape)] = array
            return padded_array.flatten(0, 1).contiguous()

        def operand(name: str, *sizes: int) -> Tensor:
            array = whole(name, *sizes)
            if not array.abs().max() <= torch.finfo(_TYPES[precision]).max:
                raise ValueError(f"{name} has numbers that {precision} cannot hold; choose another precision")
            if precision == "tf32":
                array = (array + 8192.0 * array) - 8192.0 * array  # as in `_rounded`
            return array.to(_TYPES[precision]).to(device)

        r = c["R"]
        self.full = operand(f"projection_{r}", c["H1"], c["C_PADDED"])
        self.half = operand(f"projection_{r // 2}", c["H1"], c["C_HALF_PADDED"]) if c["HALF"] else self.full
        self.weight2 = operand("weight2", c["H2"], c["H1"])
        self.weight3 = operand("weight3", c["K_PADDED"], c["H2"])
        self.bias1 = whole("bias1", c["H1"]).to(device)  # [N*H1]
        self.bias2 = whole("bias2", c["H2"]).to(device)
        # The outputs of the padding must be finite, and so small that their exponentials are 0.
        self.bias3 = whole("bias3", c["K_PADDED"], padding=-1e30).to(device)
        self.projection = {
            level: operand(
                f"projection_{level}", c["H1"], sliced(arrays[f"projection_{level}"].shape[1], PROJECT_CHANNELS)
            )
            for level in (4 << i for i in range((r // c["SCALE"]).bit_length() - 2))
        }


def _score(js_map: Tensor, mean_entropy: Tensor, kind: str) -> Tensor:
    """The image score, [R,R] to [1], summed in float64."""
    scored = js_map
    if kind == "mixture_entropy":
        scored = mean_entropy + js_map  # as in torch: JS divergence and mean entropy add up to it
    elif kind == "mean_entropy":
        scored = mean_entropy
    pixels = scored.flatten()
    if kind != "top10_mean":
        return pixels.sum(dtype=torch.float64).to(torch.float32).reshape(1)
    return pixels.topk(pixels.numel() // 10).values.mean(dtype=torch.float64).to(torch.float32).reshape(1)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
