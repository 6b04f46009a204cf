"""A repository with a model of three generator classes, two of them calibrated, and what the model draws.

Rules of this file:
- `kinds` draws the classes cat, dog and fox at 16x16. The gates of cat and dog are the medians of their own scores; fox
  is not calibrated. `tiny` is a model without classes.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labelmint.core.policy import latent_of
from labelmint.triton.client import Latents
from labelmint.triton.server import TritonServer
from tests.support.inference import connected, running
from tests.support.models import export_conditional
from tests.support.repositories import copy_model, gate_class, hold

CAT, DOG, FOX = 0, 1, 2
NAMES = ("cat", "dog", "fox")
SEEDS = 32


@dataclass(frozen=True)
class Kinds:
    """The Triton, and by class the JS scores of the seeds 0 to SEEDS - 1 and the calibrated threshold."""

    triton: TritonServer
    scores: dict[int, list[float]]
    thresholds: dict[int, float]
    calibrations: dict[int, str]  # their ids


@asynccontextmanager
async def kinds(directory: Path, tiny_repository: Path, *, held: bool = False) -> AsyncIterator[Kinds]:
    """A Triton with `kinds`, `tiny` and, if `held`, a copy of it, `held`, that waits a second for others."""
    repository = Path(shutil.copytree(tiny_repository, directory / "repository"))
    export_conditional(repository, "kinds")
    async with running(repository, "kinds") as server, connected(server) as client:
        scores = {}
        for index in range(len(NAMES)):
            latents = [latent_of(seed, 16) for seed in range(SEEDS)]
            asked = [Latents(each, each, 99, 1.0, index) for each in latents]
            found = [await client.infer("kinds", "1", each, outputs=("js_score",)) for each in asked]
            scores[index] = [float(each["js_score"][0]) for each in found]
    thresholds = {index: float(np.median(scores[index])) for index in (CAT, DOG)}
    gates = {
        index: gate_class(repository, "kinds", index, threshold=threshold) for index, threshold in thresholds.items()
    }
    models = ["kinds", "tiny"]
    if held:
        copy_model(repository, "kinds", "held")
        hold(repository, "held_generator", seconds=1.0)
        models.append("held")
    async with running(repository, *models) as server:
        yield Kinds(server, scores, thresholds, {index: gate.id for index, gate in gates.items()})
