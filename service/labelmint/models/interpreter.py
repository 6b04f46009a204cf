"""The Style Interpreter: an ensemble of N small MLPs that labels every pixel from the generator's feature maps.

Rules of this file:
- The upsampled feature tensor S* (D x R x R) is never built. The first linear layer commutes with bilinear
  upsampling, so each level is projected at its own resolution and the projections are upsampled and added.
- Work proceeds in strips of rows; the same three functions serve the whole image (`range(R)`) and a strip.
- BatchNorm stands after ReLU and is frozen, so it is already folded into the linear layer that follows it.
- Inside, pixels are laid out [batch, row, channel, column]: every step is a matrix product without a transpose.

Sources: DatasetGAN (Zhang et al. 2021), section 3.2, and its released `pixel_classifier`; the JS divergence is
H(mean of p_n) - mean of H(p_n), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

SCORE_KINDS = ("sum", "top10_mean")
Task = Literal["segmentation", "keypoints"]


@dataclass(frozen=True)
class InterpreterSpec:
    """The dimensions that travel with the weights.

    `channels` maps a feature resolution to the number of channels the layout takes there, `class_names` has one
    name a class id (or keypoint, for that task) and `palette` one RGB triple.
    """

    layout: str
    resolution: int
    channels: Mapping[int, int]
    num_heads: int
    hidden: tuple[int, int]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    task: Task = "segmentation"

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"unknown task {self.task!r}; known: {', '.join(get_args(Task))}")
        if len(self.palette) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class names need as many colours, not {len(self.palette)}")
        fewest = 2 if self.task == "segmentation" else 1
        if not fewest <= len(self.class_names) <= 255:
            raise ValueError(f"{fewest} to 255 classes fit a uint8 label, not {len(self.class_names)}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def feature_dim(self) -> int:
        """D: all channels of all levels."""
        return sum(self.channels.values())


def hidden_widths(num_classes: int) -> tuple[int, int]:
    """(h1, h2) of the released classifier: narrower when there are fewer than 32 classes."""
    return (128, 32) if num_classes < 32 else (256, 128)


class StyleInterpreter(nn.Module):
    """The folded ensemble, float32: the first layer as one projection a level [N*h1,C_r], the others [N,out,in]."""

    def __init__(self, spec: InterpreterSpec, score_kind: str = "sum", strip_rows: int = 16) -> None:
        super().__init__()
        if score_kind not in SCORE_KINDS:
            raise ValueError(f"unknown score kind {score_kind!r}; known: {', '.join(SCORE_KINDS)}")
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
        for r in spec.channels:
            self.register_buffer(f"bilinear_{r}", bilinear_matrix(r, spec.resolution), persistent=False)  # [R,r]

    @torch.no_grad()
    def take_layers(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the three folded linear layers of all heads: weight [N,out,in] and bias [N,out] each.

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

    def forward(self, features: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Label an image strip by strip.

        Args:
            features: {r: float32 [B,C_r,r,r]} of the spec's layout.

        Returns:
            label uint8 [B,R,R], js_map float32 [B,R,R] in nats, js_score float32 [B,1].
        """
        strips = [self.uncertainty(*self.heads(hidden)) for hidden in self.strips(features)]
        label = torch.cat([strip[0] for strip in strips], dim=1)  # [B,R,R]
        js_map = torch.cat([strip[1] for strip in strips], dim=1)  # [B,R,R]
        return label, js_map, self.score(js_map)

    def strips(self, features: Mapping[int, Tensor]) -> Iterator[Tensor]:
        """The hidden layer before its ReLU, strip by strip from the top: [B,S,N*h1,R] each."""
        for start in range(0, self.spec.resolution, self.strip_rows):
            yield self.aggregate(features, range(start, start + self.strip_rows))

    def aggregate(self, features: Mapping[int, Tensor], rows: range) -> Tensor:
        """Everything linear, for the S output rows `rows`: [B,S,N*h1,R], before the first ReLU."""
        size = self.spec.resolution
        interpolated, vertical = [], []
        full = None
        # Interpolation weights sum to one, so the bias may ride on the smallest level instead of the largest map.
        bias: Tensor | None = self.bias1[:, None]  # [N*h1,1]
        for r in self.spec.channels:
            bilinear = self.get_buffer(f"bilinear_{r}")  # [R,r]
            low, high = touched_rows(r, size, rows)
            source = features[r][:, :, low:high].transpose(1, 2)  # [B,rows,C,r]
            projected = self.projection[str(r)] @ source  # [B,rows,N*h1,r]
            if bias is not None:
                projected, bias = projected + bias, None
            if r == size:
                full = projected  # nothing to interpolate
            else:
                interpolated.append(projected @ bilinear.t())  # [B,rows,N*h1,R]
                vertical.append(bilinear[rows.start : rows.stop, low:high])  # [S,rows]
        # Vertical interpolation and the sum over the levels in one matrix product.
        stacked = torch.cat(interpolated, dim=1)  # [B,rows of all levels,N*h1,R]
        summed = torch.cat(vertical, dim=1) @ stacked.flatten(2)  # [B,S,N*h1*R]
        hidden = summed.unflatten(2, (self.bias1.shape[0], size))  # [B,S,N*h1,R]
        return hidden if full is None else hidden + full

    def layers(self, hidden: Tensor) -> Tensor:
        """The small layers of every head: hidden [B,S,N*h1,R] to its K outputs [B,S,N,K,R]."""
        x = torch.relu(hidden).unflatten(2, (self.spec.num_heads, self.spec.hidden[0]))  # [B,S,N,h1,R]
        x = torch.relu(self.weight2 @ x + self.bias2[:, :, None])  # [B,S,N,h2,R]
        return self.weight3 @ x + self.bias3[:, :, None]  # [B,S,N,K,R]

    def heads(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Everything after the first linear layer, down to sufficient statistics.

        hidden [B,S,N*h1,R] to mean_probability [B,S,K,R], mean_entropy [B,S,R] in nats, and votes uint8 [B,S,K,R],
        the number of heads that chose each class.
        """
        k = self.spec.num_classes
        logits = self.layers(hidden)  # [B,S,N,K,R]
        # H(p) = logsumexp(l) - sum p l: one exponential a class, no logarithm.
        top = logits.amax(dim=3, keepdim=True)  # [B,S,N,1,R]
        shifted = logits - top
        exponential = torch.exp(shifted)
        total = exponential.sum(dim=3, keepdim=True)  # [B,S,N,1,R]
        probability = exponential / total  # [B,S,N,K,R]
        entropy = torch.log(total).squeeze(3) - (probability * shifted).sum(dim=3)  # [B,S,N,R]
        choice = logits.argmax(dim=3, keepdim=True)  # [B,S,N,1,R]; the smallest id of equals
        classes = torch.arange(k, device=logits.device)[:, None]  # [K,1]
        votes = (choice == classes).to(torch.float32).sum(dim=2)  # [B,S,K,R]
        return (
            probability.mean(dim=2),  # [B,S,K,R]
            entropy.mean(dim=2),  # [B,S,R]
            votes.to(torch.uint8),  # [B,S,K,R]
        )

    def uncertainty(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Majority label (ties to the smallest id) uint8 [B,S,R] and JS divergence [B,S,R] in nats, at least 0.

        The statistics of `heads`: mean_probability [B,S,K,R], mean_entropy [B,S,R], votes uint8 [B,S,K,R]. The class
        axis stands inside the rows because ONNX Runtime sums over an axis next to the batch in another order at batch 1
        than at batch 2.
        """
        mean_probability, mean_entropy, votes = statistics
        # The clamp keeps 0 log 0 at 0; below it the product is smaller than a float32 sum can see.
        logarithm = torch.log(mean_probability.clamp(min=1e-30))
        mixture_entropy = -(mean_probability * logarithm).sum(dim=2)  # [B,S,R]
        js = (mixture_entropy - mean_entropy).clamp(min=0.0)  # rounding can fall a hair below 0
        label = votes.to(torch.int32).argmax(dim=2).to(torch.uint8)  # [B,S,R]
        return label, js

    def score(self, js_map: Tensor) -> Tensor:
        """The image score of the spec's kind: [B,R,R] to [B,1]."""
        pixels = js_map.flatten(1)  # [B,P]
        if self.score_kind == "sum":  # the paper
            return pixels.sum(dim=1, keepdim=True)
        count = pixels.shape[1] // 10  # the released code
        return pixels.topk(count, dim=1).values.mean(dim=1, keepdim=True)


def touched_rows(source: int, target: int, rows: range) -> tuple[int, int]:
    """The rows [low, high) of a level of side `source` that the output rows of side `target` are made of."""
    if source == target:
        return rows.start, rows.stop
    scale = source / target
    low = max(math.floor((rows.start + 0.5) * scale - 0.5), 0)
    high = min(math.floor((rows.stop - 0.5) * scale - 0.5) + 1, source - 1)
    return low, max(high, low) + 1


def bilinear_matrix(source: int, target: int) -> Tensor:
    """Bilinear interpolation (align_corners=False, from `source` to `target` directly) as float32 [target,source]."""
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    position = position.clamp(min=0.0)
    low = position.floor().long()
    high = (low + 1).clamp(max=source - 1)
    fraction = position - low
    matrix = torch.zeros(target, source, dtype=torch.float64)
    row = torch.arange(target)
    matrix.index_put_((row, low), 1.0 - fraction, accumulate=True)
    matrix.index_put_((row, high), fraction, accumulate=True)
    return matrix.float()


def fold_batch_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Fold y = W bn(x) + b into y = W' x + b'. weight [...,out,in], bias [...,out], statistics [...,in]."""
    scale = gamma / torch.sqrt(variance + epsilon)  # [...,in]
    shift = beta - mean * scale  # [...,in]
    return weight * scale.unsqueeze(-2), bias + (weight @ shift.unsqueeze(-1)).squeeze(-1)


def sample_features(features: Mapping[int, Tensor], rows: Tensor, columns: Tensor, resolution: int) -> Tensor:
    """S* at chosen pixels only: {r: [C_r,r,r]} of one image, rows and columns int64 [P] to float32 [P,D]."""
    parts = []
    for r, x in features.items():
        row_low, row_high, row_fraction = _neighbours(r, resolution, rows)
        left, right, fraction = _neighbours(r, resolution, columns)
        upper = torch.lerp(x[:, row_low, left], x[:, row_low, right], fraction)  # [C,P]
        lower = torch.lerp(x[:, row_high, left], x[:, row_high, right], fraction)  # [C,P]
        parts.append(torch.lerp(upper, lower, row_fraction))
    return torch.cat(parts, dim=0).t().contiguous()  # [P,D]


def _neighbours(source: int, target: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two source positions of each output position and the weight of the second."""
    position = ((index.double() + 0.5) * (source / target) - 0.5).clamp(min=0.0)
    low = position.floor().long()
    return low, (low + 1).clamp(max=source - 1), (position - low).float()
