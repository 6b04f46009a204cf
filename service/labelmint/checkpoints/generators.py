"""What the importers of generators share: gains, the average latent, noise, and the finished module.

Rules of this file:
- What a file does not hold is made from a fixed seed, so that importing it again gives the same bytes.
- The network is built by the store's `build_module`: only after its spec has been compared with the file's tensors.
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

from labelmint.checkpoints.name_table import Floats, to_float32
from labelmint.core.errors import UnusableFile
from labelmint.models.generator import Generator, GeneratorSpec
from labelmint.models.store import build_module

NOISE_SEED = 0
AVERAGE_SEED = 0
AVERAGE_COUNT = 10_000
# Measuring takes some arrays of AVERAGE_COUNT rows of this width; published mappings are 512 wide.
MAX_MEASURED_WIDTH = 4096


@dataclass(frozen=True)
class Imported:
    """A generator and what the notes of its file shall say about where its parts came from."""

    generator: Generator
    remarks: Mapping[str, object] = field(default_factory=dict)


def scaled(array: Floats, theirs: float, ours: float) -> Floats:
    """A parameter that they multiply by the gain `theirs`, for our module that multiplies it by `ours`."""
    if math.isclose(theirs, ours, rel_tol=1e-7):
        return array
    return to_float32(array.astype(np.float64) * (theirs / ours))


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
    state = {name: torch.from_numpy(np.asarray(array, order="C")) for name, array in tensors.items()}
    _check_finite(path, state)
    is_measured = "mapping.w_avg" not in state
    widest = max(spec.z_dim, spec.w_dim, spec.mapping_width or 0)
    if is_measured and widest > MAX_MEASURED_WIDTH:
        raise UnusableFile(
            path,
            f"has no average latent and a mapping {widest} wide; "
            f"the average latent can be measured up to a width of {MAX_MEASURED_WIDTH}",
        )
    state.setdefault("mapping.w_avg", torch.zeros(spec.w_dim))
    generator = build_module(path, lambda: Generator(spec), state).eval()
    if is_measured:
        average = measured_average(generator.mapping, spec.z_dim)
        _check_finite(path, {"mapping.w_avg": average})
        generator.mapping.w_avg.copy_(average)
    return generator


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise UnusableFile(path, f"leads to NaN or infinity in {name!r}")
