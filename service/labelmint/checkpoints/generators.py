"""Code that all importers of generators share: gains, filters, the average latent, noise, and the finished module.

Rules of this file:
- Values that a file lacks are generated from a fixed seed. So a second import of the file gives the same bytes.
- A low-pass filter is read from the file, not assumed. Taps in whole-number ratios become whole numbers, so the usual
  filter is exactly (1, 3, 3, 1).
- The store's `build_module` builds the network. It first compares the spec with the file's tensors, so a false size in
  a file takes no memory.
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
# The measurement allocates several arrays of AVERAGE_COUNT rows of this width. Published mappings are 512 wide.
MAX_MEASURED_WIDTH = 4096
MAX_TAPS = 64
_TOLERANCE = 1e-6  # of the taps of a filter


@dataclass(frozen=True)
class Imported:
    """A generator, and remarks about the origin of its parts for the notes of its file."""

    generator: Generator
    remarks: Mapping[str, object] = field(default_factory=dict)


def scaled(array: Floats, theirs: float, ours: float) -> Floats:
    """Rescale a parameter from the source network, whose gain is `theirs`, to our module, whose gain is `ours`."""
    if math.isclose(theirs, ours, rel_tol=1e-7):
        return array
    return to_float32(array.astype(np.float64) * (theirs / ours))


def filter_taps(kernel: Floats, gain: float) -> tuple[float, ...] | None:
    """Return the taps of `kernel` [F] or [F,F] with sum `gain`, or None if it is not such a filter.

    NVlabs store filters of 8 or more taps in one dimension, and shorter ones as the outer product.
    """
    if kernel.ndim not in (1, 2) or len(set(kernel.shape)) != 1 or not 1 <= kernel.shape[0] <= MAX_TAPS:
        return None
    scaled = kernel.astype(np.float64) / gain
    if abs(scaled.sum() - 1.0) > _TOLERANCE * kernel.size:
        return None
    taps = scaled if kernel.ndim == 1 else scaled.sum(axis=0)
    if kernel.ndim == 2 and np.abs(np.outer(taps, taps) - scaled).max() > _TOLERANCE:
        return None
    smallest = np.abs(taps[np.abs(taps) > _TOLERANCE]).min()
    whole = np.round(taps / smallest)
    if np.abs(taps / smallest - whole).max() < 1e-4:
        taps = whole
    return tuple(float(tap) for tap in taps)


def drawn_noise(resolutions: list[int]) -> list[Floats]:
    """Standard normal noise from `RandomState(NOISE_SEED)` for layers of these sizes, in this order."""
    rng = np.random.RandomState(NOISE_SEED)
    return [rng.randn(r, r).astype(np.float32) for r in resolutions]


@torch.no_grad()
def measured_average(mapping: nn.Module, z_dim: int, classes: int) -> torch.Tensor:
    """The mean of w [w_dim] over AVERAGE_COUNT latents from `RandomState(AVERAGE_SEED)`, in float64.

    With `classes`, their number, each latent has the next class in turn.
    rosinality's scripts measure it in the same way when they truncate, but without a fixed seed.
    """
    latents = torch.from_numpy(np.random.RandomState(AVERAGE_SEED).randn(AVERAGE_COUNT, z_dim))  # [N,z_dim]
    class_index = torch.arange(AVERAGE_COUNT, dtype=torch.int32)[:, None] % classes if classes else None  # [N,1]
    return copy.deepcopy(mapping).double()(latents, class_index).mean(dim=0).float()


def build(path: Path, kind: type[GeneratorSpec], tensors: Mapping[str, Floats], **dimensions: Any) -> Generator:
    """Return the generator with these weights. Without "mapping.w_avg", the average latent is measured.

    `dimensions` are the fields of its spec, a `kind`. Raises UnusableFile if the spec rejects them.
    """
    try:
        spec = kind(**dimensions)
    except ValueError as error:
        raise UnusableFile(path, f"cannot be imported: {error}") from error
    state = {name: torch.from_numpy(np.asarray(array, order="C")) for name, array in tensors.items()}
    _check_finite(path, state)
    is_measured = "mapping.w_avg" not in state
    widest = max(spec.z_dim + spec.embedding_width, spec.w_dim, spec.mapping_width or 0)
    if is_measured and widest > MAX_MEASURED_WIDTH:
        raise UnusableFile(
            path,
            f"has no average latent and a mapping {widest} wide; "
            f"the average latent can be measured up to a width of {MAX_MEASURED_WIDTH}",
        )
    state.setdefault("mapping.w_avg", torch.zeros(spec.w_dim))
    generator = build_module(path, lambda: Generator(spec), state).eval()
    if is_measured:
        average = measured_average(generator.mapping, spec.z_dim, len(spec.generator_classes))
        _check_finite(path, {"mapping.w_avg": average})
        generator.mapping.w_avg.copy_(average)
    return generator


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise UnusableFile(path, f"leads to NaN or infinity in {name!r}")
