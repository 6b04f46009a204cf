"""Metrics of the demo: PSNR and sharpness of images, IoU of masks.

Rules of this file:
- IoU is computed from one confusion matrix over all images. It is not the mean of the IoU of each image. So the IoU of
  a rare class counts its pixels where it occurs, and the pixels where it was found by mistake.
- Sharpness is a ratio of two sums over all images, for the same reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demo import faces

NUM_CLASSES = len(faces.CLASS_NAMES)
OCTAVES = 4  # 128, 64, 32 and 16 pixels per side


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, [B], of float images [B,3,R,R] in [-1,1]."""
    error = (image.clamp(-1.0, 1.0) - target) / 2.0
    return -10.0 * error.square().flatten(1).mean(dim=1).log10()


def octaves(image: Tensor) -> list[Tensor]:
    """Split images [B,C,R,R] into the first OCTAVES bands of a Laplacian pyramid, [B,C,R,R], [B,C,R/2,R/2], ...

    A band is the image at its resolution minus the image at half of it, enlarged. The filter of both ways is the
    binomial one, 1 3 3 1; pixels beyond the border repeat the border. The rest of the pyramid is left out.
    """
    bands = []
    for _ in range(OCTAVES):
        smaller = halved(image)
        bands.append(image - enlarged(smaller))
        image = smaller
    return bands


def halved(image: Tensor) -> Tensor:
    """Filter [B,C,R,R] with 1 3 3 1 in both directions and take every second pixel, [B,C,R/2,R/2]."""
    for _ in range(2):
        padded = torch.cat([image[..., :1], image, image[..., -1:]], dim=-1)
        outer, inner = padded[..., :-3:2] + padded[..., 3::2], padded[..., 1:-2:2] + padded[..., 2:-1:2]
        image = ((outer + 3.0 * inner) / 8.0).transpose(-1, -2)
    return image


def enlarged(image: Tensor) -> Tensor:
    """Enlarge [B,C,R,R] twofold by the same filter, [B,C,2R,2R]: bilinear interpolation between the pixels' centres.

    Slices are used here and in `halved` because their gradients are slices too, which neither scatter nor round in a
    varying order.
    """
    for _ in range(2):
        before = torch.cat([image[..., :1], image[..., :-1]], dim=-1)
        after = torch.cat([image[..., 1:], image[..., -1:]], dim=-1)
        pairs = torch.stack([before + 3.0 * image, 3.0 * image + after], dim=-1) / 4.0  # [B,C,R,R,2]
        image = pairs.flatten(-2).transpose(-1, -2)
    return image


def gradient_energy(image: Tensor) -> Tensor:
    """Return per octave, [OCTAVES], the sum of squared differences of neighbours over images [B,C,R,R]."""
    return torch.stack([_squared_differences(band) for band in octaves(image)])


def band_energy(image: Tensor) -> Tensor:
    """Return per octave, [OCTAVES], the sum of squares of the bands of images [B,C,R,R]."""
    return torch.stack([band.double().square().sum() for band in octaves(image)])


def _squared_differences(band: Tensor) -> Tensor:
    dx, dy = band[..., 1:] - band[..., :-1], band[..., 1:, :] - band[..., :-1, :]
    return dx.double().square().sum() + dy.double().square().sum()


def by_octave(values: Tensor, rendered: Tensor) -> dict[str, float]:
    """Divide sums over images [OCTAVES] by those of the renders, octave by octave, the finest first.

    With the gradient energies of generated images, this is their sharpness. It is below 1 in the fine octaves of a
    blurred picture, such as the mean over what a generator cannot place. With the band energies of the error, the ratio
    is 0 if all details are right, 1 if none is drawn, and 2 if details as strong as the render's are in wrong places.
    """
    names = [str(faces.RESOLUTION >> octave) for octave in range(OCTAVES)]
    return dict(zip(names, (values / rendered).tolist(), strict=True))


def confusion(predicted: Tensor, exact: Tensor) -> Tensor:
    """Count pairs of class ids, given in equal shapes: int64 [K,K], row = exact, column = predicted."""
    pairs = exact.long().flatten() * NUM_CLASSES + predicted.long().flatten()
    return torch.bincount(pairs, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)


def iou(counts: Tensor, unions: Tensor | None = None) -> dict[str, float]:
    """Compute the intersection over union of each class name from a confusion matrix; `unions` [K] replace its own."""
    unions = union(counts) if unions is None else unions
    return dict(zip(faces.CLASS_NAMES, (counts.diagonal().double() / unions.clamp(min=1)).tolist(), strict=True))


def union(counts: Tensor) -> Tensor:
    """Count the pixels that have each class in either mask, int64 [K], from a confusion matrix."""
    return counts.sum(0) + counts.sum(1) - counts.diagonal()


def areas(label: Tensor) -> Tensor:
    """Count the pixels of each class, int64 [K], in masks of class ids."""
    return torch.bincount(label.flatten(), minlength=NUM_CLASSES)


def table(by_class: dict[str, float]) -> str:
    """Format one line per class, with the mean last."""
    lines = [f"  {name:<11}{value:.3f}" for name, value in by_class.items()]
    return "\n".join([*lines, f"  {'mean':<11}{sum(by_class.values()) / len(by_class):.3f}"])
