"""The quick interpreter: linear heads that are fitted to the drawn pixels in closed form, in a fraction of a second.

Rules of this file:
- S* is never built. Pixels are sampled exactly where they were drawn. Whole images are labelled by a `StyleInterpreter`
  that holds the linear heads, so a preview comes from the same computation as a served label.
- Features are standardised and reduced to their main directions (`Basis`) before anything is solved. The directions
  need no labels, so they are computed once. The cost of a fit does not depend on the size of the generator.
- What a fit needs of the pixels are sums (`Sums`). They add up over strokes and images, and an image is left out by
  adding up the others.
- The heads differ in the directions that each of them sees (the random subspaces of Ho, 1998). The ensemble therefore
  disagrees even when only one image is drawn.

Segmentation is linear discriminant analysis with equal priors and a shrunken covariance; keypoints are ridge regression
on the heat. benchmarks/annotate/quick.py compares this with alternatives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from labelmint.core.task import task_of
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.tasks import build_interpreter

DIRECTIONS = 256
HEADS = 4
SHARE = 0.5  # of the directions, for each head of several
SHRINKAGE = 0.3  # added to each variance; a standardised feature has variance 1
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
        with torch.random.fork_rng():
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

    def seen_by(self, directions: Tensor) -> Sums:
        """Return the sums over only some directions, int64 [Q']."""
        gram = self.gram[directions][:, directions]
        return Sums(gram, self.mixed[:, directions], self.total[directions], self.targets, self.pixels)


def quick_interpreter(spec: InterpreterSpec, basis: Basis, sums: Sums) -> StyleInterpreter:
    """Fit the heads of `quick_spec` and return them as an interpreter.

    A linear score s is relu(s) - relu(-s), so each of the interpreter's hidden layers holds s and -s.
    """
    outputs, count = spec.num_classes, basis.directions.shape[1]
    solve = _discriminants if task_of(spec.task).has_label_image else _regressions
    rng = torch.Generator().manual_seed(0)
    heads = []
    for _ in range(spec.num_heads):
        seen = torch.arange(count)
        if spec.num_heads > 1:
            seen = torch.randperm(count, generator=rng)[: max(1, round(SHARE * count))].sort().values
        weight, bias = solve(sums.seen_by(seen))  # [K,Q'], [K]
        raw = weight @ (basis.directions[:, seen] / basis.scale[:, None]).t()  # [K,D]
        heads.append((raw, bias - raw @ basis.mean))
    first = torch.stack([torch.cat([weight, -weight]) for weight, _ in heads])  # [N,2K,D]
    bias1 = torch.stack([torch.cat([bias, -bias]) for _, bias in heads])  # [N,2K]
    same = torch.eye(2 * outputs).expand(spec.num_heads, -1, -1)  # [N,2K,2K]
    last = torch.cat([torch.eye(outputs), -torch.eye(outputs)], dim=1).expand(spec.num_heads, -1, -1)  # [N,K,2K]
    interpreter = build_interpreter(spec)
    none = torch.zeros(spec.num_heads, 2 * outputs)
    interpreter.take_layers([(first, bias1), (same, none), (last, none[:, :outputs])])
    return interpreter.eval()


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
