"""The Style Interpreter's second task: keypoints by heat maps (DatasetGAN, section 4.4).

Rules of this file:
- Each head regresses one heat value per keypoint. The heat maps are averaged over the heads. A keypoint is where the
  mean heat is highest; that heat is its confidence.
- The paper defines no uncertainty for this task, so labelmint does: each head's heat, clipped to [0,1], counts as a
  Bernoulli probability, and the JS divergences and entropies of a pixel are summed over the keypoints.
- The layers and the computation in strips are inherited. Only the steps after the heads' last layer differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from labelmint.models.annotations import AnnotatedDataset, Unlabelled, read_keypoints
from labelmint.models.interpreter import StyleInterpreter, Weights, interleave

# Standard deviation of a target's Gaussian, as a fraction of the image's side: 2 pixels at 128.
SIGMA = 1.0 / 64.0
# A pixel with more heat than this is in a keypoint's region: within about three standard deviations.
NEAR = 0.01


class KeypointInterpreter(StyleInterpreter):
    """The ensemble with K heat values per head and pixel instead of K classes.

    It returns keypoints float32 [B,K,2] as (x, y) in pixels, pixel centres at integers; confidence float32 [B,K], the
    mean heat there, nominally 0..1; js_map float32 [B,R,R] in nats, summed over keypoints; js_score [B,1].
    """

    def strip(self, parts: Mapping[str, Tensor], weights: Weights) -> tuple[Tensor, ...]:
        """Return the mean heat [B,S,K,R] and the maps of `maps`, [B,S,R], of a strip's S rows."""
        mean_heat, *rest = self.statistics(self.outputs(parts, weights))
        return interleave(mean_heat), *(interleave(x) for x in self.maps(self.divergence(*rest), rest[-1]))

    def finish(self, mean_heat: Tensor, js_map: Tensor, *scored: Tensor) -> tuple[Tensor, ...]:
        """Return the result of `forward` from the results of all strips, joined: [B,R,K,R] and [B,R,R]."""
        return *locate(mean_heat), js_map, self.score(js_map, *scored)

    def statistics(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Run everything after the heads' last layer, up to sufficient statistics.

        Heat [B,S,N,K,R] to mean_heat [B,S,K,R], mean_probability [B,S,K,R] (of the clipped heat), and mean_entropy
        [B,S,R] in nats, summed over keypoints.
        """
        heat = outputs
        probability = heat.clamp(0.0, 1.0)
        entropy = bernoulli_entropy(probability).sum(dim=3)  # [B,S,N,R]
        return heat.mean(dim=2), probability.mean(dim=2), entropy.mean(dim=2)

    def statistics_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        r, k = self.spec.resolution, self.spec.num_classes
        return {
            "mean_heat": (torch.float32, (k, r, r)),
            "mean_probability": (torch.float32, (k, r, r)),
            "mean_entropy": (torch.float32, (r, r)),
        }

    def uncertainty(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Return keypoints [B,K,2], confidence [B,K] and `maps`, [B,R,R], of whole images.

        The arguments are the statistics of `heads`: mean_heat and mean_probability [B,R,K,R], mean_entropy [B,R,R].
        """
        mean_heat, mean_probability, mean_entropy = statistics
        return *locate(mean_heat), *self.maps(self.divergence(mean_probability, mean_entropy), mean_entropy)

    def divergence(self, mean_probability: Tensor, mean_entropy: Tensor) -> Tensor:
        """Map mean_probability [B,S,K,R] and mean_entropy [B,S,R] to the JS divergence [B,S,R], at least 0."""
        return (bernoulli_entropy(mean_probability).sum(dim=2) - mean_entropy).clamp(min=0.0)


def bernoulli_entropy(probability: Tensor) -> Tensor:
    """-p log p - (1-p) log(1-p) in nats, elementwise; 0 log 0 is 0."""
    other = 1.0 - probability
    return -(probability * torch.log(probability.clamp(min=1e-30)) + other * torch.log(other.clamp(min=1e-30)))


def locate(heat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hottest pixel of each map; the first one, row by row, wins a tie.

    heat [B,R,K,R], with the rows before the keypoints, to (x, y) float32 [B,K,2] and heat [B,K].
    """
    size = heat.shape[3]
    flat = heat.transpose(1, 2).flatten(2)  # [B,K,R*R]
    index = flat.argmax(dim=2)  # [B,K]
    y = torch.div(index, size, rounding_mode="floor")
    return torch.stack([index - y * size, y], dim=2).to(torch.float32), flat.amax(dim=2)


def heat_targets(keypoints: Tensor, rows: Tensor, columns: Tensor, *, resolution: int) -> Tensor:
    """Return Gaussian targets at chosen pixels, float32 [P,K] with peak 1; all 0 for a keypoint that is absent.

    keypoints float32 [K,3] are (x, y, visibility); a hidden one counts as a visible one. Rows and columns are
    int64 [P].
    """
    dx = columns[:, None] - keypoints[None, :, 0]  # [P,K]
    dy = rows[:, None] - keypoints[None, :, 1]  # [P,K]
    deviation = SIGMA * resolution
    return torch.exp(-(dx.square() + dy.square()) / (2.0 * deviation**2)) * (keypoints[:, 2] > 0)


INTERPRETER: type[StyleInterpreter] = KeypointInterpreter


def read(directory: Path, annotation_format: str, unlabelled: Unlabelled) -> AnnotatedDataset:
    """A keypoint that is not listed is absent, so there are no unlabelled pixels."""
    return read_keypoints(directory, annotation_format)


def settings(resolution: int) -> dict[str, Any]:
    """Few pixels are near a keypoint, so every region gets the same share of the samples, whatever its area."""
    return {"pixels_per_image": resolution**2 // 8, "class_power": 0.0}


def regions(label: npt.NDArray[Any], resolution: int) -> Tensor:
    """Return region k + 1 around keypoint k, and 0 elsewhere, from a label float32 [K,3]."""
    heat, nearest = targets(label, torch.arange(resolution**2), resolution).max(dim=1)
    return torch.where(heat > NEAR, nearest + 1, 0)  # [R*R]


def targets(label: npt.NDArray[Any], pixels: Tensor, resolution: int) -> Tensor:
    """Return the heat [P,K]."""
    return heat_targets(torch.from_numpy(label), pixels // resolution, pixels % resolution, resolution=resolution)


def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of the heat [N,P,K]."""
    return F.mse_loss(outputs, wanted)


error = loss


def describe(training_error: float) -> str:
    return f"mean squared error {training_error:.2e}"
