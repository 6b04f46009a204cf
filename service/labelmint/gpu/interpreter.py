"""The Style Interpreter for GPUs, in the Triton language: labels and JS uncertainty from a generator's feature maps.

Rules of this file:
- The mathematics is that of `labelmint.models.interpreter`; only the order of the computation differs.
- It imports only the standard library, numpy, torch and triton, because an exported model carries a copy of it.
- One sample at a time, every sum in one fixed order, no atomic operations, and one committed tile for each kind of GPU:
  the bytes of a sample depend neither on its batch nor on what ran before.
- Operands of the tensor cores have the type that `precision` names; sums and statistics are float32.
- A number that is not finite, or that the operands' type cannot hold, becomes NaN, and NaN passes through everything to
  the JS divergence. So every gate rejects such a sample; its label means nothing.

Names: R is the output resolution; C_r the channels of level r; N the number of heads; h1, h2 their hidden widths; K the
number of classes or keypoints. `base` is the level up to which levels are projected at their own resolution.

How a sample is labelled:
1. Each level r <= base is projected to the N*h1 hidden units at its own resolution, as one matrix product.
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
from collections.abc import Iterator, Mapping, Sequence
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
    """How a kernel is cut: pixels of a tile, hidden units computed at a time, and the compiler's options."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


def tile_of(shape: Shape, precision: str, capability: int) -> Tile:
    """Return the committed tile for a GPU of this compute capability (80, 90, 100)."""
    return Tile(8, 16, 32, 8, 1)


def padded(size: int) -> int:
    """The size of an axis of a matrix product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


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
        "DOT": "tf32" if precision == "tf32" else "ieee",
        "LIMIT": torch.finfo(_TYPES[precision]).max,
        "R": r,
        "SCALE": r // shape.base,
        "HALF": shape.half,
        "C": shape.channels[r],
        "C_PADDED": padded(shape.channels[r]),
        "C_HALF": shape.channels[r // 2],
        "C_HALF_PADDED": padded(shape.channels[r // 2]),
        "POINTS": padded(sum(points_of(shape, tile))),
        "N": shape.heads,
        "H1": max(padded(shape.hidden[0]), tile.block),
        "H2": padded(shape.hidden[1]),
        "K": shape.classes,
        "K_PADDED": padded(shape.classes),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK": tile.block,
    }


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _operand(x, LIMIT: tl.constexpr, TF32: tl.constexpr, like):
    """Convert float32 to the operands' type. What this type cannot hold becomes NaN.

    Tensor cores cut float32 off to TF32. The two multiplications round instead: both are exact but for one rounding.
    """
    x = tl.where(tl.abs(x) <= LIMIT, x, float("nan"))
    if TF32:
        x = (x + 8192.0 * x) - 8192.0 * x
    return x.to(like)


@triton.jit
def _relu(x, LIMIT: tl.constexpr):
    """ReLU that passes NaN on. An infinite sum comes from an operand that has overflowed, so it becomes NaN."""
    return tl.where(tl.abs(x) <= LIMIT, tl.maximum(x, 0.0), float("nan"))


@triton.jit
def _binary_entropy(p):
    other = 1.0 - p
    return -(p * tl.log(tl.maximum(p, 1e-30)) + other * tl.log(tl.maximum(other, 1e-30)))


@triton.jit
def _hat(x):
    """The weight of linear interpolation at distance x."""
    return tl.maximum(1.0 - tl.abs(x), 0.0)


@triton.jit
def _widen(edges, pixels, out, R, CHANNELS, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Add level R to the sum of the levels below it, and evaluate it at the edges between the pixels of level 2R.

    edges float32 [R+1,R+1,CHANNELS] and pixels float32 [R,R,CHANNELS] to out [2R+1,2R+1,CHANNELS]. An edge of level 2R
    is an edge of level R or halfway between two; the pixels of level R around it are as far away on both sides, or it
    is the centre of one. Beyond the border, the outermost pixel repeats.
    """
    point, channel = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    y, x = point // (2 * R + 1), point % (2 * R + 1)
    up, down, left, right = y // 2, (y + 1) // 2, x // 2, (x + 1) // 2
    above, below = tl.maximum((y - 1) // 2, 0), tl.minimum(y // 2, R - 1)
    before, after = tl.maximum((x - 1) // 2, 0), tl.minimum(x // 2, R - 1)
    above, before = tl.where(y == 0, 0, above), tl.where(x == 0, 0, before)
    wide = CHANNELS.to(tl.int64)
    e00 = tl.load(edges + (up * (R + 1) + left) * wide + channel, mask=inside)
    e01 = tl.load(edges + (up * (R + 1) + right) * wide + channel, mask=inside)
    e10 = tl.load(edges + (down * (R + 1) + left) * wide + channel, mask=inside)
    e11 = tl.load(edges + (down * (R + 1) + right) * wide + channel, mask=inside)
    q00 = tl.load(pixels + (above * R + before) * wide + channel, mask=inside)
    q01 = tl.load(pixels + (above * R + after) * wide + channel, mask=inside)
    q10 = tl.load(pixels + (below * R + before) * wide + channel, mask=inside)
    q11 = tl.load(pixels + (below * R + after) * wide + channel, mask=inside)
    edge = 0.5 * (0.5 * (e00 + e10) + 0.5 * (e01 + e11))
    pixel = 0.5 * (0.5 * (q00 + q10) + 0.5 * (q01 + q11))
    total = edge + pixel
    total = tl.where(tl.abs(total) <= LIMIT, total, float("nan"))
    tl.store(out + point * wide + channel, total.to(out.dtype.element_ty), mask=inside)


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
    peak_heat,
    peak_pixel,
    KEYPOINTS: tl.constexpr,
    TF32: tl.constexpr,
    DOT: tl.constexpr,
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
):
    """Label the P pixels of one tile.

    full float32 [C,R,R] and half float32 [C_HALF,R/2,R/2] are features. points [(S+1)^2+S^2,N*H1], for S = R/SCALE: the
    sum of the levels below S, and the bias, at the edges between the pixels of level S, and then level S at its pixels.
    weight_full [N*H1,C_PADDED], weight_half [N*H1,C_HALF_PADDED], weight2 [N*H2,H1], weight3 [N*K_PADDED,H2] and points
    have the operands' type; bias2 [N*H2] and bias3 [N*K_PADDED] are float32. The hidden units and classes that padding
    adds have weights of zero.

    Writes js_map float32 [R,R]; and label uint8 [R,R], or the tile's highest heat peak_heat float32 [tiles,K_PADDED],
    infinite for NaN, and the first pixel that has it, peak_pixel int32 [tiles,K_PADDED].
    """
    P: tl.constexpr = ROWS * COLUMNS
    S: tl.constexpr = R // SCALE
    kind = weight2.dtype.element_ty
    tile = tl.program_id(0)
    y0, x0 = tile // (R // COLUMNS) * ROWS, tile % (R // COLUMNS) * COLUMNS
    pixel = tl.arange(0, P)
    y, x = y0 + pixel // COLUMNS, x0 + pixel % COLUMNS

    # The features of level R, and those of level R/2 between four pixels. Channels come first: lanes run along pixels.
    channel = tl.arange(0, C_PADDED)[:, None]
    at = full + channel.to(tl.int64) * (R * R) + (y * R + x)[None, :]
    features = tl.load(at, mask=(channel < C) & (y >= 0)[None, :], other=0.0)
    features = tl.trans(_operand(features, LIMIT, TF32, kind))  # [P,C_PADDED]
    if HALF:
        D: tl.constexpr = R // 2
        channel_half = tl.arange(0, C_HALF_PADDED)[:, None]
        plane = half + channel_half.to(tl.int64) * (D * D)
        known = (channel_half < C_HALF) & (y >= 0)[None, :]
        up, left = tl.maximum((y + 1) // 2 - 1, 0), tl.maximum((x + 1) // 2 - 1, 0)
        down, right = tl.minimum((y + 1) // 2, D - 1), tl.minimum((x + 1) // 2, D - 1)
        # An even pixel lies 3/4 of the way to the second neighbour, an odd one 1/4.
        v, h = tl.where(y % 2 == 0, 0.75, 0.25)[None, :], tl.where(x % 2 == 0, 0.75, 0.25)[None, :]
        a = tl.load(plane + (up * D + left)[None, :], mask=known, other=0.0)
        b = tl.load(plane + (up * D + right)[None, :], mask=known, other=0.0)
        upper = a * (1.0 - h) + b * h
        a = tl.load(plane + (down * D + left)[None, :], mask=known, other=0.0)
        b = tl.load(plane + (down * D + right)[None, :], mask=known, other=0.0)
        lower = a * (1.0 - h) + b * h
        between = upper * (1.0 - v) + lower * v
        between = tl.trans(_operand(between, LIMIT, TF32, kind))  # [P,C_HALF_PADDED]

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
        for start in range(0, H1, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            row1 = (head * H1 + unit)[:, None]
            w = tl.load(weight_full + row1 * C_PADDED + tl.arange(0, C_PADDED)[None, :])
            hidden = tl.dot(features, tl.trans(w), input_precision=DOT)
            if HALF:
                w = tl.load(weight_half + row1 * C_HALF_PADDED + tl.arange(0, C_HALF_PADDED)[None, :])
                hidden = tl.dot(between, tl.trans(w), hidden, input_precision=DOT)
            known_points = tl.load(line + (head * H1 + unit)[None, :], mask=touched, other=0.0)
            hidden = tl.dot(weight, known_points, hidden, input_precision=DOT)
            hidden = _operand(_relu(hidden, 3.0e38), LIMIT, TF32, kind)  # [P,BLOCK]
            w = tl.load(weight2 + row2[:, None] * H1 + unit[None, :])
            hidden2 = tl.dot(hidden, tl.trans(w), hidden2, input_precision=DOT)
        hidden2 = _relu(hidden2 + tl.load(bias2 + row2)[None, :], 3.0e38)
        row3 = head * K_PADDED + tl.arange(0, K_PADDED)
        w = tl.load(weight3 + row3[:, None] * H2 + tl.arange(0, H2)[None, :])
        outputs = tl.dot(_operand(hidden2, LIMIT, TF32, kind), tl.trans(w), input_precision=DOT)
        outputs = outputs + tl.load(bias3 + row3)[None, :]  # [P,K_PADDED]
        outputs = tl.where(tl.abs(outputs) <= 3.0e38, outputs, float("nan"))
        if KEYPOINTS:
            sum_heat += outputs
            probability = tl.minimum(tl.maximum(outputs, 0.0, propagate_nan=tl.PropagateNan.ALL), 1.0, propagate_nan=tl.PropagateNan.ALL)
            sum_probability += probability
            sum_entropy += tl.sum(tl.where(is_class, _binary_entropy(probability), 0.0), axis=1)
        else:
            outputs = tl.where(is_class, outputs, float("-inf"))
            top = tl.max(outputs, axis=1)
            shifted = outputs - top[:, None]
            exponential = tl.exp(shifted)
            total = tl.sum(exponential, axis=1)
            probability = exponential / total[:, None]
            sum_probability += probability
            sum_entropy += tl.log(total) - tl.sum(tl.where(is_class, probability * shifted, 0.0), axis=1)
            choice = tl.min(tl.where(outputs == top[:, None], k, K_PADDED), axis=1)  # the smallest id wins a tie
            votes += (choice[:, None] == k).to(tl.int32)

    mean = sum_probability / N
    if KEYPOINTS:
        mixture = tl.sum(tl.where(is_class, _binary_entropy(mean), 0.0), axis=1)
    else:
        mixture = -tl.sum(tl.where(is_class, mean * tl.log(tl.maximum(mean, 1e-30)), 0.0), axis=1)
    js = tl.maximum(mixture - sum_entropy / N, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(js_map + y * R + x, js)
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
        with _on(self.device), _matrix_products(self.precision):
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
            pixels = maps[r].flatten(1).t() @ self._weights.projection[r]  # [r*r,N*H1]
            out = below if 2 * r == base else torch.empty((2 * r + 1) ** 2, width, device=self.device)
            block = min(1024, triton.next_power_of_2(width))
            _widen[((2 * r + 1) ** 2, triton.cdiv(width, block))](
                edges, pixels, out, r, width, LIMIT=torch.finfo(out.dtype).max, BLOCK=block, num_warps=4
            )
            edges = out
        if base == 4:
            below.copy_(edges)
        torch.matmul(maps[base].flatten(1).t().to(kind), self._weights.projection[base].to(kind), out=own)
        return points

    def _label(self, maps: Mapping[int, Tensor], points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run `_interpret` on all tiles: label, js_map, peak_heat and peak_pixel."""
        r, w = self.resolution, self._weights
        tiles = r * r // self.tile.pixels
        label = torch.zeros(r, r, dtype=torch.uint8, device=self.device)
        js_map = torch.empty(r, r, device=self.device)
        heat = torch.empty(tiles, self._constants["K_PADDED"], device=self.device)
        pixel = torch.empty(heat.shape, dtype=torch.int32, device=self.device)
        _interpret[(tiles,)](
            *(maps[r], maps[r // 2], points, w.full, w.half, w.weight2, w.bias2, w.weight3, w.bias3),
            *(label, js_map, heat, pixel),
            **self._constants,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
        )
        return label, js_map, heat, pixel

    def _finish(self, label: Tensor, js_map: Tensor, heat: Tensor, pixel: Tensor) -> dict[str, Tensor]:
        outputs = {"js_map": js_map, "js_score": _score(js_map, self.score_kind)}
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
        def padded_to(name: str, *sizes: int) -> Tensor:
            array = torch.from_numpy(np.array(arrays[name]))
            if name.startswith("projection_"):
                array = array.unflatten(0, (c["N"], -1))
            whole = torch.zeros(c["N"], *sizes)
            whole[tuple(slice(0, size) for size in array.shape)] = array
            return whole.flatten(0, 1).contiguous()

        def operand(name: str, *sizes: int) -> Tensor:
            whole = padded_to(name, *sizes)
            if whole.abs().max() > torch.finfo(_TYPES[precision]).max:
                raise ValueError(f"{name} has numbers that {precision} cannot hold; choose another precision")
            if precision == "tf32":
                whole = (whole + 8192.0 * whole) - 8192.0 * whole  # rounded, see `_operand`
            return whole.to(_TYPES[precision]).to(device)

        r, kept = c["R"], c["R"] // c["SCALE"]
        levels = [4 << i for i in range(kept.bit_length() - 2)]
        self.full = operand(f"projection_{r}", c["H1"], c["C_PADDED"])
        self.half = operand(f"projection_{r // 2}", c["H1"], c["C_HALF_PADDED"]) if c["HALF"] else self.full
        self.weight2 = operand("weight2", c["H2"], c["H1"])
        self.weight3 = operand("weight3", c["K_PADDED"], c["H2"])
        self.bias1 = padded_to("bias1", c["H1"]).to(device)  # [N*H1]
        self.bias2 = padded_to("bias2", c["H2"]).to(device)
        self.bias3 = padded_to("bias3", c["K_PADDED"]).to(device)
        self.projection = {  # {r: float32 [C_r,N*H1]}
            r: padded_to(f"projection_{r}", c["H1"], arrays[f"projection_{r}"].shape[1]).t().contiguous().to(device)
            for r in levels
        }


def _score(js_map: Tensor, kind: str) -> Tensor:
    """The image score, [R,R] to [1], summed in float64."""
    pixels = js_map.flatten()
    if kind == "sum":
        return pixels.sum(dtype=torch.float64).to(torch.float32).reshape(1)
    return pixels.topk(pixels.numel() // 10).values.mean(dtype=torch.float64).to(torch.float32).reshape(1)


@contextlib.contextmanager
def _matrix_products(precision: str) -> Iterator[None]:
    """Let torch multiply float32 matrices as TF32, except for the reference, and sum half precision in float32."""
    settings = torch.backends.cuda.matmul
    wanted = {
        "allow_tf32": precision != "float32",
        "allow_fp16_reduced_precision_reduction": False,
        "allow_bf16_reduced_precision_reduction": False,
    }
    before = {name: getattr(settings, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
