"""The quick interpreter: linear heads that are fitted to the drawn pixels in closed form, in a fraction of a second.

Rules of this file:
- S* is never built. Pixels are sampled exactly where they were drawn. Whole images are labelled by a `StyleInterpreter`
  that holds the linear heads, so a preview comes from the same computation as a served label.
- Features are standardised and reduced to their main directions (`Basis`) before anything is solved. The directions
  need no labels, so they are computed once. The cost of a fit does not depend on the size of the generator.
- What a fit needs of the pixels are sums (`Sums`). They add up over strokes and images, and an image is left out by
  adding up the others.
- One head is fitted. Its uncertainty is the entropy of its own probabilities: measured on the demo, that finds wrong
  pixels about as well as the JS divergence of four linear heads (benchmarks/annotate/quick.py), for one fit.

Segmentation is linear discriminant analysis with equal priors and a shrunken covariance; keypoints are ridge regression
on the heat.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from labelmint.core.task import task_of
from labelmint.models.annotations import AnnotatedDataset
from labelmint.models.draw import Check, Features, counted, features_of, unchecked
from labelmint.models.generator import Generator
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter, Weights
from labelmint.models.layout import channels_of
from labelmint.models.pixels import POOL_BYTES, FitSettings, affordable, pools
from labelmint.models.tasks import learning_of

DIRECTIONS = 256
SHRINKAGE = 0.3  # added to each variance; a standardised feature has variance 1
PIXELS = 4096  # of one image that it learns from, at most
# Larger strips than for ten classifiers: with one head, the number of steps costs more than memory does.
STRIP_ROWS = 64
_RANDOM = threading.Lock()  # of torch's random numbers, which all threads share
NEVER = -1e6  # the score of a class that no pixel was drawn of


@dataclass(frozen=True)
class Basis:
    """The main directions of the features: mean and scale float32 [D], directions float32 [D,Q]."""

    mean: Tensor
    scale: Tensor
    directions: Tensor

    @staticmethod
    def of(features: Tensor) -> Basis:
        """Return the basis of pixels float32 [P,D], at least two; labels are not needed."""
        mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-4)
        count = min(DIRECTIONS, *features.shape)
        with _RANDOM, torch.random.fork_rng():
            torch.manual_seed(0)  # the algorithm starts from random directions
            _, _, directions = torch.pca_lowrank((features - mean) / scale, count, center=False)  # [D,Q]
        return Basis(mean, scale, directions)

    def project(self, features: Tensor) -> Tensor:
        """Map pixels [P,D] to [P,Q]."""
        return ((features - self.mean) / self.scale) @ self.directions


@dataclass(frozen=True)
class Sums:
    """What a fit needs of projected pixels x [P,Q] with targets y [P,K], class ids as one-hot rows.

    gram [Q,Q] is the sum of x x', mixed [K,Q] of y x', total [Q] of x, targets [K] of y; pixels counts them.
    """

    gram: Tensor
    mixed: Tensor
    total: Tensor
    targets: Tensor
    pixels: int

    @staticmethod
    def of(projected: Tensor, targets: Tensor, outputs: int) -> Sums:
        """Targets are class ids int64 [P] or heat float32 [P,K]."""
        y = targets if targets.is_floating_point() else F.one_hot(targets, outputs).float()  # [P,K]
        return Sums(projected.t() @ projected, y.t() @ projected, projected.sum(dim=0), y.sum(dim=0), len(y))

    @staticmethod
    def together(parts: Iterable[Sums]) -> Sums:
        """Return the sums over the pixels of all parts, of which there is at least one."""
        first, *others = parts
        for other in others:
            first = Sums(
                first.gram + other.gram,
                first.mixed + other.mixed,
                first.total + other.total,
                first.targets + other.targets,
                first.pixels + other.pixels,
            )
        return first


@torch.no_grad()
def sums_of(spec: InterpreterSpec, dataset: AnnotatedDataset, features: Features) -> tuple[Basis, dict[int, Sums]]:
    """Return the basis of the features of the drawn pixels, and each image's sums. `spec` is of `quick_spec`."""
    settings = FitSettings(**learning_of(dataset.task).settings(spec.resolution))
    settings = replace(settings, pixels_per_image=min(PIXELS, settings.pixels_per_image))
    width, resolution = spec.feature_dim, spec.resolution
    # A quarter of the bound, because `Basis.of` needs three more copies.
    most_bytes = POOL_BYTES // 4
    settings = affordable(settings, len(dataset.labels), width=width, resolution=resolution, most_bytes=most_bytes)
    rng = torch.Generator().manual_seed(0)
    found = dict(pools(dataset, features, settings, resolution=resolution, rng=rng))
    basis = Basis.of(torch.cat([pool.features for pool in found.values()]))
    outputs = len(dataset.names)
    return basis, {seed: Sums.of(basis.project(pool.features), pool.targets, outputs) for seed, pool in found.items()}


def fit_quick(
    generator: Generator, dataset: AnnotatedDataset, layout: str, check: Check = unchecked
) -> StyleInterpreter:
    """Return the quick interpreter of all drawn pixels."""
    spec = quick_spec(generator, dataset, layout)
    with counted(features_of(generator, dataset, layout, check), len(dataset.labels), "draw pixels") as features:
        basis, sums = sums_of(spec, dataset, features)
    return quick_interpreter(spec, basis, Sums.together(sums.values()))


class _Linear:
    """Makes an interpreter linear: the outputs of the first layer are those of the head, and the others are skipped."""

    def layers(self, hidden: Tensor, _: Weights) -> Tensor:
        """Map the first layer's outputs [B,K,H,W] to the head's outputs [B,H,1,K,W]."""
        return hidden.transpose(1, 2).unsqueeze(2)


def quick_spec(generator: Generator, dataset: AnnotatedDataset, layout: str) -> InterpreterSpec:
    """Return the spec of a quick interpreter: one linear head, whose first layer has K outputs."""
    count, size = len(dataset.names), generator.spec.resolution
    channels = channels_of(layout, generator.spec.taps)
    return InterpreterSpec(layout, size, channels, 1, (count, count), dataset.names, dataset.palette, dataset.task)


def quick_interpreter(spec: InterpreterSpec, basis: Basis, sums: Sums) -> StyleInterpreter:
    """Fit the head of `quick_spec` and return it as an interpreter."""
    solve = _discriminants if task_of(spec.task).has_label_image else _regressions
    reduced, bias = solve(sums)  # [K,Q], [K]
    weight = reduced @ (basis.directions / basis.scale[:, None]).t()  # [K,D]
    bias = bias - weight @ basis.mean
    linear = type("QuickInterpreter", (_Linear, learning_of(spec.task).INTERPRETER), {})
    interpreter: StyleInterpreter = linear(spec, "mean_entropy", STRIP_ROWS)
    skipped = torch.zeros(1, spec.num_classes, spec.num_classes), torch.zeros(1, spec.num_classes)
    interpreter.take_layers([(weight[None], bias[None]), skipped, skipped])
    return interpreter.eval()


@torch.no_grad()
def preview(interpreter: StyleInterpreter, features: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the label of one image and where to draw next, from its features {r: [1,C_r,r,r]}.

    The label is uint8 [R,R], or keypoints float32 [K,2]. The second is the entropy of each pixel, float32 [R,R], in
    nats.
    """
    label, entropy = interpreter.run(
        features, interpreter.weights(), interpreter.strip, lambda *maps: (interpreter.finish(*maps)[0], maps[-1])
    )
    return label[0], entropy[0]


def _discriminants(sums: Sums) -> tuple[Tensor, Tensor]:
    """Return the weight [K,Q] and bias [K] of linear discriminant analysis, in logits."""
    means = sums.mixed / sums.targets.clamp(min=1.0)[:, None]  # [K,Q]
    within = (sums.gram - (means * sums.targets[:, None]).t() @ means) / sums.pixels  # [Q,Q]
    within.diagonal().add_(SHRINKAGE)
    weight = torch.linalg.solve(within, means.t()).t()  # [K,Q]
    bias = -0.5 * (weight * means).sum(dim=1)
    return weight, torch.where(sums.targets > 0, bias, NEVER)


def _regressions(sums: Sums) -> tuple[Tensor, Tensor]:
    """Return the weight [K,Q] and bias [K] of ridge regression."""
    mean, wanted = sums.total / sums.pixels, sums.targets / sums.pixels  # [Q], [K]
    covariance = sums.gram / sums.pixels - torch.outer(mean, mean)  # [Q,Q]
    covariance.diagonal().add_(SHRINKAGE)
    weight = torch.linalg.solve(covariance, (sums.mixed / sums.pixels - torch.outer(wanted, mean)).t()).t()  # [K,Q]
    return weight, wanted - weight @ mean
