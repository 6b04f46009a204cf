"""What the importers of generators share: gains, the average latent, noise, and the finished module.

Rules of this file:
- What a file does not hold is made from a fixed seed, so that importing it again gives the same bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from labelmint.checkpoints.name_table import Floats
from labelmint.errors import UnusableFile
from labelmint.models.generator import Generator, GeneratorSpec

NOISE_SEED = 0
AVERAGE_SEED = 0
AVERAGE_COUNT = 10_000


@dataclass(frozen=True)
class Imported:
    """A generator and what the notes of its file shall say about where its parts came from."""

    generator: Generator
    remarks: Mapping[str, object] = field(default_factory=dict)


def scaled(array: Floats, theirs: float, ours: float) -> Floats:
    """A parameter that they multiply by the gain `theirs`, for our module that multiplies it by `ours`."""
    if math.isclose(theirs, ours, rel_tol=1e-7):
        return array
    return (array.astype(np.float64) * (theirs / ours)).astype(np.float32)


def drawn_noise(resolutions: list[int]) -> list[Floats]:
    """Noise for the layers of these sizes, in their order: standard normal from `RandomState(NOISE_SEED)`."""
    rng = np.random.RandomState(NOISE_SEED)
    return [rng.randn(r, r).astype(np.float32) for r in resolutions]


@torch.no_grad()
def measured_average(mapping: nn.Module, z_dim: int) -> torch.Tensor:
    """The mean of w [w_dim] over AVERAGE_COUNT latents from `RandomState(AVERAGE_SEED)`, in float64.

    rosinality's scripts measure it like this, with seeds of the day, when they truncate.
    """
    latents = torch.from_numpy(np.random.RandomState(AVERAGE_SEED).randn(AVERAGE_COUNT, z_dim))  # [N,z_dim]
    return copy.deepcopy(mapping).double()(latents).mean(dim=0).float()


def build(path: Path, kind: type[GeneratorSpec], tensors: Mapping[str, Floats], **dimensions: Any) -> Generator:
    """The generator with these weights; without "mapping.w_avg" the average latent is measured.

    `dimensions` are the fields of its spec, which is a `kind`; raises UnusableFile where it refuses them.
    """
    try:
        spec = kind(**dimensions)
    except ValueError as error:
        raise UnusableFile(path, f"cannot be imported: {error}") from error
    generator = Generator(spec).eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    state.setdefault("mapping.w_avg", torch.zeros(spec.w_dim))
    generator.load_state_dict(state)
    if "mapping.w_avg" not in tensors:
        generator.mapping.w_avg.copy_(measured_average(generator.mapping, spec.z_dim))
    for name, value in generator.state_dict().items():
        if not torch.isfinite(value).all():
            raise UnusableFile(path, f"leads to NaN or infinity in {name!r}")
    return generator
