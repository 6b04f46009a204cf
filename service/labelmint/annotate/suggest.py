"""Proposes the seeds whose images would teach most when they are annotated next, each with its reason.

Rules of this file:
- A proposed image is far from all annotated and proposed ones in feature space, weighted by how uncertain the quick
  interpreter is about it: greedy k-centre selection (Sener and Savarese, 2018) times uncertainty (as in Yang et al.,
  Suggestive Annotation, 2017). Without annotations, the distance decides alone.
- Place in feature space: each image's features, standardised, as the mean over its pixels in the main directions.
- The same directory, candidates and options give the same seeds. An image that is in the directory is never proposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labelmint.core.errors import UnusableFile
from labelmint.core.task import TaskName
from labelmint.models.annotations import Unlabelled, names_path, read_drawn
from labelmint.models.draw import Features, counted, draw
from labelmint.models.fit import same_images
from labelmint.models.interpreter import StyleInterpreter, sample_features
from labelmint.models.quick import Basis, fit_quick, preview
from labelmint.models.store import load_unconditional
from labelmint.models.tasks import learning_of

PIXELS = 256  # of each image, on a regular grid: enough for the mean


@dataclass(frozen=True)
class Suggestion:
    """A seed; its distance to the nearest known image and its uncertainty, both relative to the mean candidate's."""

    seed: int
    distance: float
    uncertainty: float | None

    @property
    def reason(self) -> str:
        far = f"{self.distance:.1f} times as far from the known images as a usual image"
        return far if self.uncertainty is None else f"{self.uncertainty:.1f} times as uncertain and {far}"

    def __str__(self) -> str:
        return f"{self.seed}: {self.reason}"


def suggest_files(
    generator_path: Path,
    directory: Path,
    candidates: Sequence[int],
    *,
    count: int,
    layout: str,
    task: TaskName,
    annotation_format: str,
    unlabelled: Unlabelled,
) -> list[Suggestion]:
    """Return `count` suggestions for a directory of `synth`. Raises UnusableFile.

    Without the file of names (classes.json, keypoints.json), nothing is annotated yet. With it, everything must be.
    """
    generator = load_unconditional(generator_path)
    drawn = read_drawn(directory)
    free = [seed for seed in candidates if seed not in drawn.images]
    if len(free) < count:
        raise UnusableFile(directory, f"leaves {len(free)} candidates for {count} suggestions; name more candidates")
    interpreter = None
    if names_path(directory, task).exists():
        dataset = learning_of(task).read(directory, annotation_format, unlabelled)
        check = same_images(dataset, directory, generator_path)
        interpreter = fit_quick(generator, dataset, layout, check)

    def generated(seed: int) -> Mapping[int, Tensor]:
        return draw(generator, seed, drawn.truncation_psi, layout=layout)[1]

    known, size = list(drawn.images), generator.spec.resolution
    with counted(generated, len(known) + len(free), "suggest") as features:
        return suggest(features, known, free, resolution=size, count=count, judge=interpreter)


@torch.no_grad()
def suggest(
    features: Features,
    known: Sequence[int],
    candidates: Sequence[int],
    *,
    resolution: int,
    count: int,
    judge: StyleInterpreter | None,
) -> list[Suggestion]:
    """Return `count` of the candidates, the most useful first. `judge` is the quick interpreter, if there is one."""
    grids, uncertain = [], []
    for index, seed in enumerate([*known, *candidates]):
        maps = features(seed)
        grids.append(_grid(maps, resolution))  # [P,D]
        if judge is not None and index >= len(known):
            uncertain.append(float(preview(judge, maps)[1].mean()))
    basis = Basis.of(torch.cat(grids))
    places = torch.stack([basis.project(grid).mean(dim=0) for grid in grids])  # [known + candidates,Q]
    near, far = places[: len(known)], places[len(known) :]
    distance = torch.cdist(far, near).amin(dim=1)  # [C]
    usual = float(distance.mean()) or 1.0
    doubt = torch.tensor(uncertain if judge is not None else [1.0] * len(candidates))  # [C]
    doubt = doubt / doubt.mean().clamp(min=1e-12)
    taken = torch.zeros(len(candidates), dtype=torch.bool)
    chosen: list[Suggestion] = []
    for _ in range(count):
        best = int((distance * doubt).masked_fill(taken, -1.0).argmax())
        uncertainty = float(doubt[best]) if judge is not None else None
        chosen.append(Suggestion(candidates[best], float(distance[best]) / usual, uncertainty))
        distance = torch.minimum(distance, torch.cdist(far, far[best : best + 1])[:, 0])
        taken[best] = True
    return chosen


def _grid(maps: Mapping[int, Tensor], resolution: int) -> Tensor:
    """Return the features [P,D] of a regular grid of pixels of one image."""
    step = max(1, resolution // int(PIXELS**0.5))
    line = torch.arange(step // 2, resolution, step)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))
    return sample_features({r: x[0] for r, x in maps.items()}, rows, columns, resolution=resolution)
