"""The Style Interpreter: an ensemble of N small MLPs that labels every pixel from the generator's feature maps.

Rules of this file:
- The upsampled feature tensor S* (D x R x R) is never built. The first linear layer commutes with bilinear
  upsampling, so each level is projected at its own resolution, and the projections are upsampled and added.
- The computation runs in strips of rows, and in a strip by phase. The four phases are the pixels with an even or odd
  row and an even or odd column: maps of half the side. All pixels of a phase lie at the same place between the pixels
  of half the resolution, so upsampling is one small convolution, the same for all channels.
- Levels below half the resolution bend only at the edges between the pixels of half the resolution, and are linear
  between these edges. Their sum is computed on the grid of edges, which is a quarter of the work. This is exact.
- BatchNorm follows ReLU and is frozen, so it is already folded into the linear layer that follows it.
- Everything up to the last layer is a convolution over maps [batch, channel, row, column]. ONNX Runtime keeps such maps
  in one blocked layout from the features to the last layer, and adds and clips (ReLU) as it writes.

Sources: DatasetGAN (Zhang et al. 2021), section 3.2, and its released `pixel_classifier`. `labelmint.core.calibration`
defines the kinds of scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmint.core.calibration import SCORE_KINDS
from labelmint.core.task import TaskName, task_of
from labelmint.models.layout import MAX_RESOLUTION

Maps: TypeAlias = Mapping[int, Tensor]  # of each level: float32 [B,C_r,r,r]
Weights: TypeAlias = Mapping[str, Tensor]  # see `StyleInterpreter.weights`
Strip: TypeAlias = Callable[[Mapping[str, Tensor], Weights], tuple[Tensor, ...]]
Finish: TypeAlias = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class InterpreterSpec:
    """The dimensions of an interpreter, which are stored with its weights.

    `channels` maps a feature resolution to the number of channels that the layout takes there. For each class id (or
    keypoint, for that task), `class_names` has one name and `palette` one RGB triple.
    """

    layout: str
    resolution: int
    channels: Mapping[int, int]
    num_heads: int
    hidden: tuple[int, int]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    task: TaskName = "segmentation"

    def __post_init__(self) -> None:
        task = task_of(self.task)
        # These resolutions alone set the size of the interpolation matrices, one per level; no tensor in a file does.
        if not 8 <= self.resolution <= MAX_RESOLUTION or max(self.channels, default=0) > self.resolution:
            raise ValueError(
                f"an image has 8 to {MAX_RESOLUTION} pixels per side and features of at most as many, "
                f"not {self.resolution} and {sorted(self.channels)[-1:]}"
            )
        if odd := [r for r in self.channels if r < 4 or r & (r - 1)]:
            raise ValueError(f"features have 4, 8, 16, ... pixels per side, not {odd[0]}")
        if len(self.palette) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class names need as many colours, not {len(self.palette)}")
        if not task.min_names <= len(self.class_names) <= 255:
            raise ValueError(f"{task.min_names} to 255 classes fit a uint8 label, not {len(self.class_names)}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def feature_dim(self) -> int:
        """D, the number of channels of all levels together."""
        return sum(self.channels.values())


def default_strip_rows(resolution: int) -> int:
    """Return the rows of a strip that gave the best time and memory on CPUs (docs/your-generator.md)."""
    return 32 if resolution <= 256 else 16


def hidden_widths(num_classes: int) -> tuple[int, int]:
    """Return (h1, h2) of the released classifier: narrower if there are fewer than 32 classes."""
    return (128, 32) if num_classes < 32 else (256, 128)


class StyleInterpreter(nn.Module):
    """The folded ensemble, float32: the first layer as one projection per level [N*h1,C_r], the others [N,out,in]."""

    def __init__(self, spec: InterpreterSpec, score_kind: str = "sum", strip_rows: int | None = None) -> None:
        super().__init__()
        if score_kind not in SCORE_KINDS:
            raise ValueError(f"unknown score kind {score_kind!r}; known: {', '.join(SCORE_KINDS)}")
        if strip_rows is None:
            strip_rows = default_strip_rows(spec.resolution)
        if strip_rows < 2 or strip_rows & (strip_rows - 1):
            raise ValueError(f"a strip has 2, 4, 8, ... rows, not {strip_rows}")
        self.spec = spec
        self.score_kind = score_kind
        self.strip_rows = min(strip_rows, spec.resolution)
        n, (h1, h2), k = spec.num_heads, spec.hidden, spec.num_classes
        self.projection = nn.ParameterDict({str(r): torch.zeros(n * h1, c) for r, c in spec.channels.items()})
        self.bias1 = nn.Parameter(torch.zeros(n * h1))
        self.weight2 = nn.Parameter(torch.zeros(n, h2, h1))
        self.bias2 = nn.Parameter(torch.zeros(n, h2))
        self.weight3 = nn.Parameter(torch.zeros(n, k, h2))
        self.bias3 = nn.Parameter(torch.zeros(n, k))
        half = spec.resolution // 2
        for r in spec.channels:
            if r < half:
                self.register_buffer(f"edges_{r}", edge_matrix(r, half), persistent=False)  # [R/2+1,r]

    @torch.no_grad()
    def take_layers(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy in the three folded linear layers of all heads: weight [N,out,in] and bias [N,out] each.

        The first layer's D inputs are the channels of the levels, from the lowest resolution to the highest.
        """
        (weight1, bias1), *others = layers
        levels = weight1.flatten(0, 1).split(list(self.spec.channels.values()), dim=1)  # [N*h1,C_r] each
        for r, level in zip(self.spec.channels, levels, strict=True):
            self.projection[str(r)].copy_(level)
        self.bias1.copy_(bias1.flatten())
        targets = ((self.weight2, self.bias2), (self.weight3, self.bias3))
        for (weight, bias), (our_weight, our_bias) in zip(others, targets, strict=True):
            our_weight.copy_(weight)
            our_bias.copy_(bias)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as those of convolutions over all heads, by their names in an exported file.

        projection_<r> [N*h1,C_r,1,1], bias1 [N*h1], weight2 [N*h2,h1,1,1], bias2 [N*h2], weight3 [N*(K+spare),h2,1,1],
        bias3 [N*(K+spare)]. The spare outputs of the last layer are zero.
        """
        spare = -self.spec.num_classes % _CHANNELS_OF_A_BLOCK
        maps = {f"projection_{r}": self.projection[str(r)] for r in self.spec.channels} | {"bias1": self.bias1}
        maps |= {"weight2": self.weight2.flatten(0, 1), "bias2": self.bias2.flatten()}
        maps |= {"weight3": F.pad(self.weight3, (0, 0, 0, spare)).flatten(0, 1)}
        maps |= {"bias3": F.pad(self.bias3, (0, spare)).flatten()}
        return {name: x[:, :, None, None] if x.dim() == 2 else x for name, x in maps.items()}

    def forward(self, features: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Label an image strip by strip.

        Args:
            features: {r: float32 [B,C_r,r,r]} of the spec's layout.

        Returns:
            label uint8 [B,R,R], js_map float32 [B,R,R] in nats, js_score float32 [B,1].
        """
        return self.run(features, self.weights(), self.strip, self.finish)

    def run(self, features: Maps, weights: Weights, strip: Strip, finish: Finish) -> tuple[Tensor, ...]:
        """Prepare the parts of each strip, call `strip` with them, and `finish` with the joined results.

        An export calls it with other functions. So it uses only slices, convolutions, `pad`, `cat` and `@`.
        """
        strips = [strip(parts, weights) for parts in self.parts_of_strips(features, weights)]
        return finish(*(_joined(each, dim=1) for each in zip(*strips, strict=True)))

    def strip(self, parts: Mapping[str, Tensor], weights: Weights) -> tuple[Tensor, ...]:
        """Label the S rows of a strip from its parts (see `parts`): label [B,S,R] and the maps of `maps`, [B,S,R]."""
        return tuple(interleave(x) for x in self.uncertainty(*self.statistics(self.outputs(parts, weights))))

    def finish(self, label: Tensor, js_map: Tensor, *scored: Tensor) -> tuple[Tensor, ...]:
        """Return the result of `forward` from the joined results of all strips: each [B,R,R]."""
        return label, js_map, self.score(js_map, *scored)

    def parts_of_strips(self, features: Maps, weights: Weights) -> Iterator[dict[str, Tensor]]:
        """Yield the parts of each strip, from the top."""
        lower = self.lower(features, weights)
        for start in range(0, self.spec.resolution, self.strip_rows):
            yield self.parts(features, lower, range(start, start + self.strip_rows))

    def outputs(self, parts: Mapping[str, Tensor], weights: Weights) -> Tensor:
        """Return the heads' K outputs for the S rows of a strip: [B,2S,N,K,R/2], one phase below the other.

        `interleave` brings the results that are computed from them into the order of the image.
        """
        return torch.cat([self.layers(hidden, weights) for hidden in self.phases(parts, weights)], dim=1)

    def aggregate(self, features: Maps, rows: range) -> Tensor:
        """Run everything before the first ReLU, for the S output rows `rows` (S is even): [B,N*h1,S,R]."""
        weights = self.weights()
        parts = self.parts(features, self.lower(features, weights), rows)
        upper_left, upper_right, lower_left, lower_right = self.phases(parts, weights)
        # Not `interleave`: on maps of this size, ONNX Runtime's transposes take three times as long as all the rest.
        upper = torch.stack((upper_left, upper_right), dim=-1).flatten(-2)  # [B,N*h1,S/2,R]
        lower = torch.stack((lower_left, lower_right), dim=-1).flatten(-2)  # [B,N*h1,S/2,R]
        return torch.stack((upper, lower), dim=3).flatten(2, 3)  # [B,N*h1,S,R]

    def lower(self, features: Maps, weights: Weights) -> dict[int, ProjectedRows]:
        """Return the projections of the levels below half the resolution."""
        size, found = self.spec.resolution, {}
        for r in (r for r in self.spec.channels if r < size // 2):
            height = min(r, max(_BAND_PIXELS // r, self.strip_rows * r // size))
            found[r] = ProjectedRows(features[r], r, height, functools.partial(self.project, r=r, weights=weights))
        return found

    def project(self, maps: Tensor, r: int, weights: Weights, stride: int = 1) -> Tensor:
        """Apply the first layer's part for level r: [B,C_r,H,W] to [B,N*h1,H,W], or every `stride`-th pixel of it."""
        # Interpolation weights sum to one, so the bias can be added to the smallest level instead of the largest map.
        bias = weights["bias1"] if r == min(self.spec.channels) else None
        return F.conv2d(maps, weights[f"projection_{r}"], bias, stride)

    def parts(self, features: Maps, lower: Mapping[int, ProjectedRows], rows: range) -> dict[str, Tensor]:
        """Return what the S output rows `rows` (S is even) depend on, as far as the layout has such levels.

        `edges` [B,N*h1,S/2+1,R/2+1]: the sum of the lower levels at the edges between pixels of half the resolution.
        `middle` [B,C,S/2+2,R/2+2]: features of half the resolution with a ring of one pixel. `upper` [B,C,S,R]:
        features of the full resolution.
        """
        size, parts = self.spec.resolution, {}
        half, first, last = size // 2, rows.start // 2, rows.stop // 2
        if lower:
            parts["edges"] = self.on_edges(lower, range(first, last + 1))
        if half in self.spec.channels:
            # At the border of the image, clamping repeats the outermost pixel.
            border = (1, 1, int(first == 0), int(last == half))
            parts["middle"] = F.pad(_rows(features[half], first - 1, last + 1, half), border, mode="replicate")
        if size in self.spec.channels:
            parts["upper"] = _rows(features[size], rows.start, rows.stop, size)
        return parts

    def phases(self, parts: Mapping[str, Tensor], weights: Weights) -> Iterator[Tensor]:
        """Run everything before the first ReLU, from the parts of S output rows: four phases [B,N*h1,S/2,R/2].

        Pixel (i, j) of phase (a, b) is the pixel of row 2i+a and column 2j+b. The phases come in the order (0, 0),
        (0, 1), (1, 0), (1, 1).
        """
        size = self.spec.resolution
        middle = None
        if "middle" in parts:
            middle = self.project(parts["middle"], size // 2, weights)  # [B,N*h1,S/2+2,R/2+2]
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            terms = []
            if middle is not None:  # at 1/4 or 3/4 between two pixels of half the resolution
                terms.append(_stencil(middle, _BETWEEN_PIXELS[a], _BETWEEN_PIXELS[b]))
            if "edges" in parts:  # between the two edges around the pixel
                terms.append(_stencil(parts["edges"], _BETWEEN_EDGES[a], _BETWEEN_EDGES[b]))
            if "upper" in parts:
                terms.append(self.project(parts["upper"][:, :, a:, b:], size, weights, stride=2))
            yield functools.reduce(torch.add, terms)  # [B,N*h1,S/2,R/2]

    def on_edges(self, lower: Mapping[int, ProjectedRows], edges: range) -> Tensor:
        """Sum the lower levels at the edges between pixels of half the resolution: [B,N*h1,len(edges),R/2+1]."""
        interpolated, vertical = [], []
        for r, projected in lower.items():
            matrix = self.get_buffer(f"edges_{r}")  # [R/2+1,r]
            first, last = touched_rows(r, self.spec.resolution // 2, edges)
            interpolated.append(projected.rows(first, last) @ matrix.t())  # [B,N*h1,rows,R/2+1]
            vertical.append(matrix[edges.start : edges.stop, first:last])  # [len(edges),rows]
        # One matrix product does the vertical interpolation and the sum over the levels.
        return torch.cat(vertical, dim=1) @ torch.cat(interpolated, dim=2)

    def layers(self, hidden: Tensor, weights: Weights) -> Tensor:
        """Run the small layers of every head: maps [B,N*h1,H,W] to the heads' K outputs [B,H,N,K,W]."""
        n, k = self.spec.num_heads, self.spec.num_classes
        x = torch.relu(hidden)
        x = torch.relu(F.conv2d(x, weights["weight2"], weights["bias2"], groups=n))  # [B,N*h2,H,W]
        x = F.conv2d(x, weights["weight3"], weights["bias3"], groups=n)  # [B,N*(K+spare),H,W]
        return x.transpose(1, 2).unflatten(2, (n, -1))[:, :, :, :k]  # [B,H,N,K,W]

    def heads(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Run everything after the first linear layer, up to sufficient statistics.

        hidden [B,N*h1,S,R] to mean_probability [B,S,K,R], mean_entropy [B,S,R] in nats, and votes uint8 [B,S,K,R],
        the number of heads that chose each class.
        """
        return self.statistics(self.layers(hidden, self.weights()))

    def statistics_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The statistics of one sample by name, as steps pass them on: with the channels before the rows."""
        r, k = self.spec.resolution, self.spec.num_classes
        return {
            "mean_probability": (torch.float32, (k, r, r)),
            "mean_entropy": (torch.float32, (r, r)),
            "votes": (torch.uint8, (k, r, r)),
        }

    def statistics(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the result of `heads` from the heads' outputs, here logits: [B,S,N,K,R]."""
        k, logits = self.spec.num_classes, outputs
        # H(p) = logsumexp(l) - sum p l: one exponential per class, and one logarithm per pixel and head.
        top = logits.amax(dim=3, keepdim=True)  # [B,S,N,1,R]
        shifted = logits - top
        exponential = torch.exp(shifted)
        total = exponential.sum(dim=3, keepdim=True)  # [B,S,N,1,R]
        probability = exponential / total  # [B,S,N,K,R]
        entropy = torch.log(total).squeeze(3) - (probability * shifted).sum(dim=3)  # [B,S,N,R]
        choice = logits.argmax(dim=3, keepdim=True)  # [B,S,N,1,R]; the smallest id wins a tie
        classes = torch.arange(k, device=logits.device)[:, None]  # [K,1]
        votes = (choice == classes).to(torch.float32).sum(dim=2)  # [B,S,K,R]
        return (
            probability.mean(dim=2),  # [B,S,K,R]
            entropy.mean(dim=2),  # [B,S,R]
            votes.to(torch.uint8),  # [B,S,K,R]
        )

    def uncertainty(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Return the majority label (the smallest id wins a tie) uint8 [B,S,R], and `maps`.

        The arguments are the statistics of `heads`: mean_probability [B,S,K,R], mean_entropy [B,S,R], votes uint8
        [B,S,K,R]. The class axis comes after the rows because ONNX Runtime sums over an axis next to the batch in a
        different order at batch 1 than at batch 2.
        """
        mean_probability, mean_entropy, votes = statistics
        # The clamp makes 0 log 0 equal 0. Products of smaller probabilities are too small to change a float32 sum.
        logarithm = torch.log(mean_probability.clamp(min=1e-30))
        mixture_entropy = -(mean_probability * logarithm).sum(dim=2)  # [B,S,R]
        js = (mixture_entropy - mean_entropy).clamp(min=0.0)  # rounding can make it slightly negative
        label = votes.to(torch.int32).argmax(dim=2).to(torch.uint8)  # [B,S,R]
        return label, *self.maps(js, mean_entropy)

    def maps(self, js: Tensor, mean_entropy: Tensor) -> tuple[Tensor, ...]:
        """Return the JS divergence, and after it the map that `score` takes if that is another one: [B,S,R], in nats.

        JS divergence and mean entropy add up to the mixture entropy, which is therefore never below the mean entropy.
        """
        if self.score_kind == "mixture_entropy":
            return js, mean_entropy + js
        return (js, mean_entropy) if self.score_kind == "mean_entropy" else (js,)

    def score(self, js_map: Tensor, *scored: Tensor) -> Tensor:
        """Return the image score of kind `score_kind` from `maps` of the whole image: [B,R,R] to [B,1]."""
        pixels = (js_map, *scored)[-1].flatten(1)  # [B,P]
        if self.score_kind != "top10_mean":  # "sum" is the paper's
            return pixels.sum(dim=1, keepdim=True)
        count = pixels.shape[1] // 10  # the released code
        return pixels.topk(count, dim=1).values.mean(dim=1, keepdim=True)


def interleave(x: Tensor) -> Tensor:
    """Bring phases into the order of the image: [B,4*h,...,w], one phase after the other, to [B,2h,...,2w]."""
    x = x.unflatten(1, (2, 2, -1))  # [B,a,b,h,...,w]
    return x.permute(0, 3, 1, *range(4, x.dim()), 2).flatten(-2).flatten(1, 2)  # [B,h*a,...,w*b]


class ProjectedRows:
    """The rows of a level's projection, in bands that are projected when a strip first touches them.

    A band is forgotten when the strips, which come from the top, have passed it.
    """

    def __init__(self, maps: Tensor, side: int, height: int, project: Callable[[Tensor], Tensor]) -> None:
        """`project` takes rows of `maps` [B,C,side,side]; the `height` of a band divides `side`."""
        self._maps, self._side, self._height, self._project = maps, side, height, project
        self._bands: dict[int, Tensor] = {}

    def rows(self, first: int, last: int) -> Tensor:
        """Return the rows [first, last) of the projection: [B,N*h1,last-first,side]."""
        starts = range(first - first % self._height, last, self._height)
        self._bands = {start: self._bands[start] if start in self._bands else self._band(start) for start in starts}
        return _joined(
            [_rows(band, first - start, last - start, self._height) for start, band in self._bands.items()], dim=2
        )

    def _band(self, start: int) -> Tensor:
        return self._project(_rows(self._maps, start, start + self._height, self._side))


def _rows(maps: Tensor, first: int, last: int, height: int) -> Tensor:
    """Return the rows [first, last) as far as maps of this height have them."""
    first, last = max(first, 0), min(last, height)
    return maps if (first, last) == (0, height) else maps[:, :, first:last]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def touched_rows(source: int, half: int, edges: range) -> tuple[int, int]:
    """The rows [low, high) of a level of side `source` that the sums at these edges of half the resolution need."""
    scale = source / half
    low = max(math.floor(edges.start * scale - 0.5), 0)
    high = min(math.floor((edges.stop - 1) * scale - 0.5) + 1, source - 1)
    return low, high + 1


def edge_matrix(source: int, target: int) -> Tensor:
    """Return the matrix of bilinear interpolation of `source` pixels at the target+1 edges of `target` pixels.

    float32 [target+1,source], with align_corners=False: beyond the centre of the outermost pixels, their value is
    repeated.
    """
    position = torch.arange(target + 1, dtype=torch.float64) * (source / target) - 0.5
    position = position.clamp(min=0.0, max=source - 1.0)
    low = position.floor().long()
    high = (low + 1).clamp(max=source - 1)
    fraction = position - low
    matrix = torch.zeros(target + 1, source, dtype=torch.float64)
    row = torch.arange(target + 1)
    matrix.index_put_((row, low), 1.0 - fraction, accumulate=True)
    matrix.index_put_((row, high), fraction, accumulate=True)
    return matrix.float()


# For an even and an odd position: the weights of the pixels before, at and after it, and of the edges before and after.
_BETWEEN_PIXELS = ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25))
_BETWEEN_EDGES = ((0.75, 0.25), (0.25, 0.75))
# A band of a level's projection has at least so many pixels: products of fewer are slower.
_BAND_PIXELS = 4096
# ONNX Runtime's blocked layout accepts a grouped convolution only if each group has whole blocks of channels.
_CHANNELS_OF_A_BLOCK = 16


def _stencil(maps: Tensor, vertical: Sequence[float], horizontal: Sequence[float]) -> Tensor:
    """Apply the same small filter to every channel, without padding: [B,C,H,W] to [B,C,H-v+1,W-h+1]."""
    channels = maps.shape[1]
    taps = torch.outer(torch.tensor(vertical), torch.tensor(horizontal)).to(maps)  # [v,h]
    return F.conv2d(maps, taps.expand(channels, 1, -1, -1), groups=channels)


def fold_batch_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, *, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Fold y = W bn(x) + b into y = W' x + b'. weight [...,out,in], bias [...,out], statistics [...,in]."""
    scale = gamma / torch.sqrt(variance + epsilon)  # [...,in]
    shift = beta - mean * scale  # [...,in]
    return weight * scale.unsqueeze(-2), bias + (weight @ shift.unsqueeze(-1)).squeeze(-1)


def sample_features(features: Mapping[int, Tensor], rows: Tensor, columns: Tensor, *, resolution: int) -> Tensor:
    """Return S* at chosen pixels only: {r: [C_r,r,r]} of one image, rows and columns int64 [P] to float32 [P,D]."""
    parts = []
    for r, x in features.items():
        row_low, row_high, row_fraction = _neighbours(r, resolution, rows)
        left, right, fraction = _neighbours(r, resolution, columns)
        flat = x.flatten(1)  # [C,r*r]; `index_select` is faster than two indices
        upper, lower = (
            torch.lerp(flat.index_select(1, r * row + left), flat.index_select(1, r * row + right), fraction)
            for row in (row_low, row_high)
        )  # [C,P] each
        parts.append(torch.lerp(upper, lower, row_fraction))
    return torch.cat(parts, dim=0).t().contiguous()  # [P,D]


def _neighbours(source: int, target: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two source positions of each output position and the weight of the second."""
    position = ((index.double() + 0.5) * (source / target) - 0.5).clamp(min=0.0)
    low = position.floor().long()
    return low, (low + 1).clamp(max=source - 1), (position - low).float()
