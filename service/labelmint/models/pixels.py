"""Samples drawn pixels of annotated images, with their features.

Rules of this file:
- Pixels are sampled at random from each image: rare classes more often than in proportion to their area, and at least
  one pixel of every class in the image. A pixel that nobody drew is never sampled.
- Only the features of the sampled pixels are kept, within a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labelmint.models.annotations import AnnotatedDataset
from labelmint.models.draw import Check, Features, counted, features_of, unchecked
from labelmint.models.generator import Generator
from labelmint.models.interpreter import sample_features
from labelmint.models.layout import channels_of
from labelmint.models.tasks import learning_of

# The limit for the features of all sampled pixels. With many images, fewer pixels are sampled from each.
POOL_BYTES = 3 << 30


@dataclass(frozen=True)
class FitSettings:
    pixels_per_image: int = 8192
    class_power: float = 0.5  # pixels of a class are sampled in proportion to its area to this power
    steps: int = 4000
    batch: int = 256  # pixels per head and step
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Pool:
    """The sampled pixels of all images: features float32 [P,D]; targets class ids int64 [P] or heat float32 [P,K]."""

    features: Tensor
    targets: Tensor


@torch.no_grad()
def draw_pool(
    generator: Generator,
    dataset: AnnotatedDataset,
    settings: FitSettings,
    *,
    layout: str,
    rng: torch.Generator,
    check: Check = unchecked,
) -> tuple[Pool, dict[int, int]]:
    """Sample pixels from every image. Returns the pool and the number of channels of each feature level."""
    channels = channels_of(layout, generator.spec.taps)
    width, images, resolution = sum(channels.values()), len(dataset.labels), generator.spec.resolution
    limited = affordable(settings, images, width=width, resolution=resolution, most_bytes=POOL_BYTES)
    features = torch.empty(limited.pixels_per_image * images, width)  # [P,D]
    targets, filled = list[Tensor](), 0
    with counted(features_of(generator, dataset, layout, check), images, "draw pixels") as drawn:
        for _, pixels in pools(dataset, drawn, limited, resolution=resolution, rng=rng):
            count = len(pixels.targets)
            features[filled : filled + count] = pixels.features
            targets.append(pixels.targets)
            filled += count
    return Pool(features[:filled], torch.cat(targets)), channels


def affordable(settings: FitSettings, images: int, *, width: int, resolution: int, most_bytes: int) -> FitSettings:
    """Return the settings with no more pixels of each image than it has, and than `most_bytes` hold the features of.

    A pixel has `width` features.
    """
    held = most_bytes // (4 * width * images)
    return replace(settings, pixels_per_image=min(settings.pixels_per_image, held, resolution**2))


@torch.no_grad()
def pools(
    dataset: AnnotatedDataset, features: Features, settings: FitSettings, *, resolution: int, rng: torch.Generator
) -> Iterator[tuple[int, Pool]]:
    """Yield the seed and the sampled pixels of each image."""
    for seed in dataset.labels:
        maps = features(seed)
        yield seed, sample_pixels(dataset, seed, maps, resolution=resolution, settings=settings, rng=rng)


def sample_pixels(
    dataset: AnnotatedDataset,
    seed: int,
    maps: Mapping[int, Tensor],
    *,
    resolution: int,
    settings: FitSettings,
    rng: torch.Generator,
) -> Pool:
    """Sample drawn pixels of one image, or all if fewer are drawn than wanted. `maps` are {r: float32 [1,C_r,r,r]}."""
    learning, label = learning_of(dataset.task), dataset.labels[seed]
    region = learning.regions(label, resolution)  # [R*R]
    drawn = (region >= 0).nonzero().flatten()  # [P]
    count = min(settings.pixels_per_image, len(drawn))
    chosen = drawn[choose_pixels(region[drawn], count, settings.class_power, rng=rng)]  # [P]
    rows, columns = chosen // resolution, chosen % resolution
    sampled = sample_features({r: x[0] for r, x in maps.items()}, rows, columns, resolution=resolution)
    return Pool(sampled, learning.targets(label, chosen, resolution))


def choose_pixels(label: Tensor, count: int, class_power: float, *, rng: torch.Generator) -> Tensor:
    """Sample `count` pixels of one image without replacement: the regions int64 [P] of all to indices int64 [count]."""
    area = torch.bincount(label).double()  # [K]
    weight = area.clamp(min=1).pow(class_power - 1.0)[label]  # [P]
    # Weighted sampling as an exponential race: the largest keys win. One pixel of every class gets the maximum key.
    key = torch.rand(label.shape, generator=rng, dtype=torch.float64).clamp(min=1e-300).log() / weight
    for present in area.nonzero().flatten().tolist():
        members = (label == present).nonzero().flatten()
        key[members[key[members].argmax()]] = 1.0
    return key.topk(count).indices.sort().values
