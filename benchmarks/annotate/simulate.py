"""Simulates a person who annotates the demo with strokes, and measures what the strokes teach.

Rules of this file:
- A stroke is a brush stroke of the annotation page: a line that a person sees to be inside a true part, with the
  inaccuracy of a hand (HAND pixels, normally distributed) and a radius that leaves room to the edge. It may still cross
  the edge, as a hand does. Strokes go round the parts until SHARE of the image is drawn.
- The time of a stroke is stated, not measured: SECONDS, and one for each SPEED pixels.
- An arm is a way to choose images and to draw on them. Each run has other seeds; figures are means over the runs.
- Labels are compared with the renderer's exact masks of unseen seeds: the mean IoU of the classes that these show.
- `--interpreter quick` judges with the page's quick interpreter, in minutes; `ensemble` with the ten classifiers that
  `labelmint fit` trains, in hours. Each has its own results, and resumes.

Run it as `PYTHONPATH=benchmarks python -m annotate.simulate`; it writes
benchmarks/results/simulate_INTERPRETER.json and docs/images/simulate_INTERPRETER.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import resuming
import torch
from demo import faces, metrics
from demo.annotate import exact_masks
from PIL import Image, ImageFilter
from resuming import ROOT, Figures

from annotate.quick import GENERATOR, LAYOUT, SIDE
from labelmint.annotate.estimate import estimate
from labelmint.annotate.quick import Basis, Sums, preview, quick_interpreter, quick_spec
from labelmint.annotate.strokes import STROKES, mask_of
from labelmint.annotate.suggest import suggest
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, sha256_of
from labelmint.models.draw import draw, drawn_images
from labelmint.models.fit import FitSettings, fit, sample_pixels
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.store import load_generator

SHARE = 0.1  # of the pixels of an image, at most
HAND = 0.7  # pixels
LONGEST, POINTS = 32.0, 6  # pixels of a stroke, and points of the hand in it
SECONDS, SPEED = 3.0, 30.0
IMAGES = 16
COUNTS = (2, 4, 8, 12, 16)
CANDIDATES = 24  # of which the next image is suggested, as on the page
FIRST_SEED, RUN_SEEDS = 4_000_000_000, 10_000  # seeds of the runs
UNSEEN = range(4_200_000_000, 4_200_000_064)
STROKES_ARM, SUGGESTED, FULL = "strokes, random images", "strokes, suggested images", "full masks, random images"
BARS = {"strokes_to_full": 0.95, "images_of_suggested": 12, "estimate_error": 0.05}


@dataclass(frozen=True)
class Drawn:
    """A sparse mask uint8 [R,R], the strokes that give it, and the stated seconds that they take."""

    mask: np.ndarray
    strokes: Sequence[Mapping[str, Any]]
    seconds: float


def by_hand(exact: np.ndarray, seed: int) -> Drawn:
    """Draw strokes on the image whose exact mask is uint8 [R,R]."""
    rng, strokes, seconds = np.random.default_rng(seed), list[dict[str, Any]](), 0.0
    inside = {int(each): depth(exact == each) for each in np.unique(exact)}
    mask = np.full_like(exact, UNDRAWN)
    while (mask != UNDRAWN).mean() < SHARE - 0.01 and len(strokes) < 8 * len(inside):
        for number, deep in inside.items():
            line, radius = stroke_in(deep, rng)  # [P,2] of x, y
            points = (line + rng.normal(0.0, HAND, line.shape)).round(2).tolist()
            stroke = {"tool": "brush", "class": number, "radius": radius, "points": points}
            found = mask_of(STROKES.validate_python([*strokes, stroke]), SIDE)
            if (found != UNDRAWN).mean() > SHARE:
                continue
            strokes, mask = [*strokes, stroke], found
            seconds += SECONDS + float(np.hypot(*(line[-1] - line[0]))) / SPEED
    return Drawn(mask, strokes, seconds)


def stroke_in(deep: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A line [P,2] of x, y that a person sees to be inside a part, and its radius; `deep` is the depth of the part."""
    places = np.argwhere(deep >= max(1, 0.5 * deep.max()))[:, ::-1]  # [E,2] of x, y
    start = places[rng.integers(len(places))]
    near = places[np.hypot(*(places - start).T) <= LONGEST]
    for end in rng.permutation(near)[:20]:
        line = np.linspace(start, end, POINTS)
        x, y = line.round().astype(int).T
        if (deep[y, x] >= max(1, 0.5 * deep[start[1], start[0]])).all():
            return line, float(np.clip(deep[y, x].min() - 1.0, 0.5, 3.0))
    return start[None].astype(float), 0.5


def depth(area: np.ndarray) -> np.ndarray:
    """How many pixels each pixel of an area bool [R,R] is from its edge, at most 8; 1 beside the edge, int [R,R]."""
    left, found = Image.fromarray(area.astype(np.uint8) * 255), np.zeros(area.shape, int)
    for _ in range(8):
        found += np.asarray(left) > 0
        left = left.filter(ImageFilter.MinFilter(3))
    return found


class Demo:
    """The generator, and what is true of its images."""

    def __init__(self) -> None:
        self.generator: Generator = load_generator(GENERATOR)
        self.exact = cache(lambda seed: exact_masks([seed])[seed])
        self.maps = cache(lambda seed: draw(self.generator, seed, 1.0, layout=LAYOUT)[1])
        self.image = cache(lambda seed: dict(drawn_images(self.generator, [seed], 1.0))[seed])

    def dataset(self, masks: Mapping[int, np.ndarray]) -> AnnotatedDataset:
        images = {seed: self.image(seed) for seed in masks}
        return AnnotatedDataset("segmentation", 1.0, faces.CLASS_NAMES, faces.PALETTE, images, masks)

    def quick(self, dataset: AnnotatedDataset) -> StyleInterpreter:
        rng, settings = torch.Generator().manual_seed(0), FitSettings(pixels_per_image=4096)
        pools = [
            sample_pixels(dataset, seed, self.maps(seed), resolution=SIDE, settings=settings, rng=rng)
            for seed in dataset.labels
        ]
        basis = Basis.of(torch.cat([pool.features for pool in pools]))
        sums = [Sums.of(basis.project(pool.features), pool.targets, len(dataset.names)) for pool in pools]
        return quick_interpreter(quick_spec(self.generator, dataset, LAYOUT), basis, Sums.together(sums))

    def ensemble(self, dataset: AnnotatedDataset) -> StyleInterpreter:
        return fit(self.generator, dataset, FitSettings(), layout=LAYOUT, heads=10)[0]

    @torch.no_grad()
    def miou(self, interpreter: StyleInterpreter) -> float:
        """The mean IoU over the classes that the unseen images show."""
        labels, exact = [], []
        for seed in UNSEEN:
            one = interpreter.spec.num_heads == 1
            labels.append(preview(interpreter, self.maps(seed))[0] if one else interpreter(self.maps(seed))[0][0])
            exact.append(torch.from_numpy(self.exact(seed)))
        wanted = torch.stack(exact).long()  # [I,R,R]
        by_class = metrics.iou(metrics.confusion(torch.stack(labels).long(), wanted))
        return float(np.mean([by_class[faces.CLASS_NAMES[number]] for number in wanted.unique().tolist()]))


def suggested(demo: Demo, first: int, count: int) -> list[int]:
    """The seeds that a person gets who always takes the first suggestion, from the first seed of a run on."""
    seeds, masks = [first], {first: by_hand(demo.exact(first), first).mask}
    while len(seeds) < count:
        free = [seed for seed in range(first, first + RUN_SEEDS) if seed not in seeds][:CANDIDATES]
        judge = demo.quick(demo.dataset(masks))
        found = suggest(demo.maps, seeds, free, resolution=SIDE, count=1, judge=judge)[0].seed
        seeds.append(found)
        masks[found] = by_hand(demo.exact(found), found).mask
    return seeds


def measure_run(demo: Demo, number: int, fitted: Callable[[AnnotatedDataset], StyleInterpreter]) -> dict[str, Figures]:
    """The figures of one run, by arm."""
    first = FIRST_SEED + number * RUN_SEEDS
    chosen = {STROKES_ARM: list(range(first, first + IMAGES)), SUGGESTED: suggested(demo, first, IMAGES)}
    found: dict[str, Figures] = {}
    for arm, seeds in chosen.items():
        drawn = {seed: by_hand(demo.exact(seed), seed) for seed in seeds}
        masks = {seed: each.mask for seed, each in drawn.items()}
        found[arm] = {
            "miou": {str(n): demo.miou(fitted(demo.dataset({s: masks[s] for s in seeds[:n]}))) for n in COUNTS},
            "strokes": {str(n): sum(len(drawn[s].strokes) for s in seeds[:n]) for n in COUNTS},
            "seconds": {str(n): sum(drawn[s].seconds for s in seeds[:n]) for n in COUNTS},
            "share": float(np.mean([(mask != UNDRAWN).mean() for mask in masks.values()])),
            "wrong": float(np.mean([wrong(masks[s], demo.exact(s)) for s in seeds])),
            "estimate": estimate(demo.generator, demo.dataset(masks), layout=LAYOUT).curve[IMAGES].value,
        }
    seeds = chosen[STROKES_ARM]
    exact = {str(n): demo.dataset({seed: demo.exact(seed) for seed in seeds[:n]}) for n in COUNTS}
    found[FULL] = {"miou": {n: demo.miou(fitted(dataset)) for n, dataset in exact.items()}}
    print(number, {arm: each["miou"][str(IMAGES)] for arm, each in found.items()}, flush=True)
    return found


def wrong(mask: np.ndarray, exact: np.ndarray) -> float:
    """The share of the drawn pixels that are drawn as another class than theirs."""
    drawn = mask != UNDRAWN
    return float((mask[drawn] != exact[drawn]).mean())


def summary(runs: Sequence[Mapping[str, Figures]]) -> Figures:
    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {name: mean([each[name] for each in values]) for name in values[0]}
        return float(np.mean(values))

    arms = {arm: mean([run[arm] for run in runs]) for arm in (STROKES_ARM, SUGGESTED, FULL)}
    last = str(IMAGES)
    wanted = arms[STROKES_ARM]["miou"][last]
    errors = [run[STROKES_ARM]["estimate"] - run[STROKES_ARM]["miou"][last] for run in runs]
    return {
        "runs": len(runs),
        "unseen_images": len(UNSEEN),
        "arms": arms,
        "strokes_to_full": wanted / arms[FULL]["miou"][last],
        "images_of_suggested": min((n for n in COUNTS if arms[SUGGESTED]["miou"][str(n)] >= wanted), default=None),
        "estimate_error": float(np.mean(errors)),
        "estimate_errors": errors,
    }


def plot(found: Figures, path: Path) -> None:
    figure, (by_images, by_time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for arm, each in found["arms"].items():
        by_images.plot(list(COUNTS), list(each["miou"].values()), marker="o", label=arm)
        if "seconds" in each:
            minutes = [seconds / 60 for seconds in each["seconds"].values()]
            by_time.plot(minutes, list(each["miou"].values()), marker="o", label=arm)
    by_images.set_xlabel("annotated images")
    by_time.set_xlabel(f"minutes of drawing ({SECONDS:g} s a stroke, {SPEED:g} pixels a second)")
    for axes in (by_images, by_time):
        axes.set_ylabel("mIoU on unseen images")
        axes.set_ylim(0, 1)
        axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpreter", choices=("quick", "ensemble"), default="quick")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    name, demo = f"simulate_{arguments.interpreter}", Demo()
    kept = resuming.Kept(name, sha256_of(GENERATOR))
    for number in range(arguments.runs):
        if number >= len(kept.rounds) or not kept.rounds[number]:
            index, _ = kept.begin((STROKES_ARM, SUGGESTED, FULL))
            for arm, figures in measure_run(demo, number, getattr(demo, arguments.interpreter)).items():
                kept.keep(index, arm, figures)
    found = summary(kept.rounds[: arguments.runs]) | {"interpreter": arguments.interpreter}
    resuming.write(ROOT / "benchmarks" / "results" / f"simulate_{arguments.interpreter}.json", found)
    plot(found, ROOT / "docs" / "images" / f"simulate_{arguments.interpreter}.png")
    for bar, value in BARS.items():
        print(f"{bar}: {found[bar]} (bar {value})")


if __name__ == "__main__":
    main()
