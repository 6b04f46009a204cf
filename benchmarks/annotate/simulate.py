"""Measures what a simulated person's strokes on the demo teach, over strokes, images and time.

Rules of this file:
- The person (`person.py`) draws what the page asks for, and sees the page's predictions meanwhile.
- An arm is a way to choose images and to annotate them. Each run has other seeds; figures are means over the runs.
- Labels are compared with the renderer's exact masks of unseen seeds: the mean IoU of the classes that these show.
- Each point of the curves is a small `fit --unlabelled extend` (HEADS, STEPS). The bars are judged with the ten
  classifiers that `labelmint annotate` serves (SERVED_HEADS, SERVED_STEPS), except that of the suggestions.
- The estimate is compared with the served classifiers' IoU of the classes for which there is an estimate.

Run it as `PYTHONPATH=benchmarks python -m annotate.simulate`; it takes two hours and resumes. It writes
benchmarks/results/annotate_simulate.json and docs/images/annotate_simulate.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import resuming
import torch
from demo import faces, metrics
from demo.annotate import exact_masks
from resuming import ROOT, Figures

from annotate.person import SECONDS, SPEED, ZOOM_SECONDS, Drawing, Mask
from annotate.quick import GENERATOR, LAYOUT, SIDE
from labelmint.annotate.estimate import estimate
from labelmint.annotate.suggest import suggest
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset
from labelmint.models.draw import draw
from labelmint.models.extension import extended
from labelmint.models.fit import fit
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.pixels import FitSettings, sample_pixels
from labelmint.models.quick import PIXELS, Basis, Sums, preview, quick_interpreter, quick_spec
from labelmint.models.store import load_generator

IMAGES = 16
COUNTS = (2, 4, 6, 8, 10, 12, 14, 16)
CANDIDATES = 24  # of which the next image is suggested, as on the page
FIRST_SEED, RUN_SEEDS = 4_000_000_000, 10_000  # seeds of the runs
UNSEEN = range(4_200_000_000, 4_200_000_064)
HEADS, STEPS = 3, 1000
SERVED_HEADS, SERVED_STEPS = 10, FitSettings.steps
RANDOM, SUGGESTED, FULL = "strokes, random images", "strokes, suggested images", "full masks, random images"
ALONE = "strokes that are not extended, random images"
RUNS = 5
BARS = {"strokes_to_full": 0.95, "images_of_suggested": 12, "estimate_error": 0.05}
RESULTS = ROOT / "benchmarks" / "results" / "annotate_simulate.json"
PLOT = ROOT / "docs" / "images" / "annotate_simulate.png"
CODE = ("annotate/estimate.py", "annotate/suggest.py", "models/extension.py", "models/fit.py", "models/quick.py")
FINGERPRINT = resuming.digest_of(
    [
        GENERATOR,
        Path(__file__),
        Path(__file__).with_name("person.py"),
        *(ROOT / "service" / "labelmint" / name for name in CODE),
    ]
)


class Demo:
    """The generator, and what is true of its images."""

    def __init__(self) -> None:
        self.generator: Generator = load_generator(GENERATOR)
        self.exact = cache(lambda seed: exact_masks([seed])[seed])
        self._drawn = cache(lambda seed: draw(self.generator, seed, 1.0, layout=LAYOUT))

    def maps(self, seed: int) -> dict[int, torch.Tensor]:
        return self._drawn(seed)[1]

    def dataset(self, masks: Mapping[int, Mask]) -> AnnotatedDataset:
        images = {seed: to_uint8(self._drawn(seed)[0])[0].numpy() for seed in masks}
        return AnnotatedDataset("segmentation", 1.0, faces.CLASS_NAMES, faces.PALETTE, images, masks)

    def extended(self, dataset: AnnotatedDataset) -> AnnotatedDataset:
        return extended(self.generator, dataset, layout=LAYOUT)

    def fitted(self, dataset: AnnotatedDataset, heads: int, steps: int) -> StyleInterpreter:
        return fit(self.generator, dataset, FitSettings(steps=steps), layout=LAYOUT, heads=heads)[0]

    @torch.no_grad()
    def iou(self, interpreter: StyleInterpreter) -> dict[str, float]:
        """The IoU of each class that the unseen images show."""
        labels = torch.stack([interpreter(self.maps(seed))[0][0] for seed in UNSEEN]).long()
        exact = torch.stack([torch.from_numpy(self.exact(seed)) for seed in UNSEEN]).long()  # [I,R,R]
        by_class = metrics.iou(metrics.confusion(labels, exact))
        return {faces.CLASS_NAMES[number]: by_class[faces.CLASS_NAMES[number]] for number in exact.unique().tolist()}


class Desk:
    """The page's quick interpreter of what is drawn so far."""

    def __init__(self, demo: Demo) -> None:
        self._demo, self._sums = demo, dict[int, Sums]()
        grid = np.zeros((SIDE, SIDE), np.uint8)  # every pixel is drawn
        others = range(FIRST_SEED - 8, FIRST_SEED)
        self._basis = Basis.of(torch.cat([self._pixels(seed, grid, 512)[0] for seed in others]))

    def _pixels(self, seed: int, mask: Mask, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pool = sample_pixels(
            self._demo.dataset({seed: mask}),
            seed,
            self._demo.maps(seed),
            resolution=SIDE,
            settings=FitSettings(pixels_per_image=count),
            rng=torch.Generator().manual_seed(0),
        )
        return pool.features, pool.targets

    def draws(self, seed: int, mask: Mask) -> None:
        features, targets = self._pixels(seed, mask, PIXELS)
        self._sums[seed] = Sums.of(self._basis.project(features), targets, len(faces.CLASS_NAMES))

    def interpreter(self) -> StyleInterpreter:
        spec = quick_spec(self._demo.generator, self._demo.dataset({}), LAYOUT)
        return quick_interpreter(spec, self._basis, Sums.together(self._sums.values()))

    def look(self, seed: int, mask: Mask) -> Mask:
        """The prediction uint8 [R,R] of an image of which this mask is drawn."""
        self.draws(seed, mask)
        label: Mask = preview(self.interpreter(), self._demo.maps(seed))[0].numpy()
        return label


def annotated(demo: Demo, first: int, following: Callable[[Desk, list[int]], int]) -> dict[int, Drawing]:
    """What a person draws on IMAGES images, from the seed `first` on; `following` chooses each next image."""
    desk, found, seed = Desk(demo), dict[int, Drawing](), first
    while True:
        found[seed] = drawing = Drawing(demo.exact(seed), seed)
        drawing.draw(lambda mask, seed=seed: desk.look(seed, mask))  # type: ignore[misc]
        desk.draws(seed, drawing.mask)
        if len(found) == IMAGES:
            return found
        seed = following(desk, list(found))


def suggested(demo: Demo, first: int) -> Callable[[Desk, list[int]], int]:
    """The choice of a person who always takes the first suggestion."""

    def following(desk: Desk, known: list[int]) -> int:
        free = [seed for seed in range(first, first + RUN_SEEDS) if seed not in known][:CANDIDATES]
        return suggest(demo.maps, known, free, resolution=SIDE, count=1, judge=desk.interpreter())[0].seed

    return following


def measure_arm(demo: Demo, first: int, arm: str) -> Figures:
    """The figures of one arm of the run that begins with the seed `first`."""
    if arm == FULL:
        return curves(demo, {seed: demo.exact(seed) for seed in range(first, first + IMAGES)})
    following = suggested(demo, first) if arm == SUGGESTED else lambda desk, known: max(known) + 1
    drawings = annotated(demo, first, following)
    masks = {seed: each.mask for seed, each in drawings.items()}
    wrong = [(each.mask != each.exact)[each.mask != UNDRAWN].mean() for each in drawings.values()]
    dataset = demo.dataset(masks)
    spec = quick_spec(demo.generator, dataset, LAYOUT)
    by_class = estimate(spec, demo.extended(dataset), demo.maps, drawn=dataset).by_class
    return {
        **curves(demo, masks),
        "strokes": at_counts([len(each.strokes) for each in drawings.values()]),
        "seconds": at_counts([each.seconds for each in drawings.values()]),
        "share_drawn": float(np.mean([(mask != UNDRAWN).mean() for mask in masks.values()])),
        "share_wrong": float(np.mean(wrong)),
        "estimated_iou": {name: each.value for name, each in by_class.items() if not np.isnan(each.value)},
        "miou_alone": mean_of(demo.iou(demo.fitted(dataset, HEADS, STEPS))) if arm == RANDOM else None,
    }


def curves(demo: Demo, masks: Mapping[int, Mask]) -> Figures:
    """The mIoU of small fits to the first masks, and the IoU of each class of the served fit to all."""

    def first(count: int) -> AnnotatedDataset:
        return demo.extended(demo.dataset(dict(list(masks.items())[:count])))

    small = {str(n): mean_of(demo.iou(demo.fitted(first(n), HEADS, STEPS))) for n in COUNTS}
    return {"miou": small, "served_iou": demo.iou(demo.fitted(first(IMAGES), SERVED_HEADS, SERVED_STEPS))}


def mean_of(iou: Mapping[str, float]) -> float:
    return float(np.mean(list(iou.values())))


def at_counts(values: Sequence[float]) -> dict[str, float]:
    return {str(n): float(sum(values[:n])) for n in COUNTS}


def summary(runs: Sequence[Mapping[str, Figures]]) -> Figures:
    """Means over the runs, and what the bars ask for."""

    def mean(arm: str, name: str) -> dict[str, float]:
        return {n: float(np.mean([run[arm][name][n] for run in runs])) for n in map(str, COUNTS)}

    def served(arm: str) -> float:
        return float(np.mean([list(run[arm]["served_iou"].values()) for run in runs]))

    errors = {arm: [error(run[arm]) for run in runs] for arm in (RANDOM, SUGGESTED)}
    arms: dict[str, Figures] = {
        arm: {"miou": mean(arm, "miou"), "served_miou": served(arm)} for arm in (RANDOM, SUGGESTED, FULL)
    }
    for arm in errors:
        arms[arm] |= {name: mean(arm, name) for name in ("strokes", "seconds")}
        arms[arm] |= {name: float(np.mean([run[arm][name] for run in runs])) for name in ("share_drawn", "share_wrong")}
        arms[arm]["estimate_errors"] = errors[arm]
    arms[ALONE] = {"miou": {str(IMAGES): float(np.mean([run[RANDOM]["miou_alone"] for run in runs]))}}
    wanted, reached = arms[RANDOM]["miou"][str(IMAGES)], arms[SUGGESTED]["miou"]
    return {
        "runs": len(runs),
        "unseen_images": len(UNSEEN),
        "stated_seconds": {"stroke": SECONDS, "pixels_a_second": SPEED, "zoom": ZOOM_SECONDS},
        "arms": arms,
        "strokes_to_full": arms[RANDOM]["served_miou"] / arms[FULL]["served_miou"],
        "images_of_suggested": min((n for n in COUNTS if reached[str(n)] >= wanted), default=None),
        "estimate_error": float(np.mean(np.abs(errors[RANDOM]))),
    }


def error(figures: Figures) -> float:
    """The estimated mIoU minus the true one, over the classes for which there is an estimate."""
    both = [name for name in figures["estimated_iou"] if name in figures["served_iou"]]
    return float(np.mean([figures["estimated_iou"][name] - figures["served_iou"][name] for name in both]))


def plot(found: Figures) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    axes = dict(zip(("images", "strokes", "minutes"), panels, strict=True))
    for arm, each in found["arms"].items():
        images = [int(count) for count in each["miou"]]
        (line,) = axes["images"].plot(images, list(each["miou"].values()), marker="o", label=arm)
        if "strokes" in each:
            minutes = [seconds / 60 for seconds in each["seconds"].values()]
            for name, x in (("strokes", list(each["strokes"].values())), ("minutes", minutes)):
                axes[name].plot(x, list(each["miou"].values()), marker="o", color=line.get_color(), label=arm)
    axes["images"].set_xlabel("annotated images")
    axes["strokes"].set_xlabel("strokes")
    said = f"({SECONDS:g} s a stroke, {SPEED:g} pixels a second, {ZOOM_SECONDS:g} s to zoom in)"
    axes["minutes"].set_xlabel(f"minutes of drawing\n{said}")
    for each in panels:
        each.set_xlim(left=0)
        each.set_ylim(0.4, 0.9)
        each.grid(alpha=0.3)
    axes["images"].set_xticks(COUNTS)
    axes["images"].set_ylabel("mIoU on unseen images")
    axes["images"].legend(loc="lower right", fontsize=8)
    figure.savefig(PLOT, dpi=110)


def measured(demo: Demo, number: int) -> dict[str, Figures]:
    """The arms of a run, measured now or before."""
    arms = (RANDOM, SUGGESTED, FULL)
    kept = resuming.Kept(f"annotate_simulate_{number}", FINGERPRINT)
    if not kept.complete(arms):
        index, done = kept.begin(arms)
        for arm in arms:
            if arm not in done:
                kept.keep(index, arm, measure_arm(demo, FIRST_SEED + number * RUN_SEEDS, arm))
                print(number, arm, kept.rounds[index][arm]["miou"], flush=True)
    return kept.complete(arms)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=int, help="measure this run only, beside others in other processes")
    only: int | None = parser.parse_args().run
    demo = Demo()
    if only is not None:
        measured(demo, only)
        return
    found = summary([measured(demo, number) for number in range(RUNS)])
    resuming.write(RESULTS, found)
    plot(found)
    for bar, value in BARS.items():
        print(f"{bar}: {found[bar]} (bar {value})")


if __name__ == "__main__":
    main()
