"""What the page computes: features of images, quick interpreters of what is drawn, suggestions and the estimate.

Rules of this file:
- One thread computes predictions, and another one what takes longer: suggestions and estimates. So a stroke never waits
  for those, and the event loop stays free. Results do not depend on timing.
- Features are computed once for each image, and kept within a bound; the least recently used ones are computed again.
- The directions of the features come from images that nobody chose, so they are the same for whatever is drawn.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelmint.annotate.estimate import Estimate, estimate
from labelmint.annotate.strokes import Mask
from labelmint.annotate.suggest import Suggestion, suggest
from labelmint.annotate.workspace import Sheet, Workspace
from labelmint.core.errors import InsufficientResources, InvalidRequest, TooFew
from labelmint.core.heat import heat_colours
from labelmint.core.policy import ANNOTATION_SEED, SEED_END
from labelmint.core.task import task_of
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset
from labelmint.models.draw import draw
from labelmint.models.extension import extended_by
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.interpreter import StyleInterpreter, sample_features
from labelmint.models.layout import channels_of
from labelmint.models.pixels import FitSettings, sample_pixels
from labelmint.models.quick import PIXELS, Basis, Sums, preview, quick_interpreter, quick_spec

T = TypeVar("T")

CANDIDATES = 24  # images among which the next one is chosen
BASIS_IMAGES, BASIS_PIXELS = 8, 512  # pixels of each image from which the directions are computed
KEPT_PREVIEWS = 3

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Preview:
    """The labels uint8 [R,R] (or keypoints float32 [K,2]) and uncertainties float32 [R,R] of some images, by seed."""

    number: int
    seconds: float
    pixels: int
    images: Mapping[int, Mask]
    labels: Mapping[int, npt.NDArray[Any]]
    uncertainties: Mapping[int, Floats]

    def image(self, seed: int) -> Mask:
        return self._of(self.images, seed)

    def label(self, seed: int) -> Mask:
        return self._of(self.labels, seed)

    def heat(self, seed: int) -> Mask:
        """The uncertainty in colours, uint8 [R,R,3]: dark where the prediction is sure, brightest from ln 2 nats on."""
        return heat_colours(self._of(self.uncertainties, seed))

    def described(self) -> dict[str, Any]:
        images = [{"seed": seed, "uncertainty": float(each.sum())} for seed, each in self.uncertainties.items()]
        return {"preview": self.number, "seconds": self.seconds, "pixels": self.pixels, "images": images}

    def _of(self, found: Mapping[int, npt.NDArray[Any]], seed: int) -> npt.NDArray[Any]:
        if seed not in found:
            raise InvalidRequest("seed", f"the prediction has no seed {seed}; ask for a new one")
        return found[seed]


class Studio:
    """The computations for one directory. `attach` comes before everything but `image`."""

    def __init__(self, generator: Generator, *, layout: str, truncation_psi: float) -> None:
        """Raises InsufficientResources if the features of a few images do not fit in memory."""
        self._generator, self._layout, self._psi = generator, layout, truncation_psi
        channels = channels_of(layout, generator.spec.taps)
        self._image_bytes = 4 * sum(count * level * level for level, count in channels.items())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._room = memory // 4
        if self._image_bytes * 2 > self._room:
            raise InsufficientResources(
                f"the features of one image take {self._image_bytes / 1e9:.1f} GB, and this machine has "
                f"{memory / 1e9:.0f} GB; annotate on a machine with at least {8 * self._image_bytes / 1e9:.0f} GB"
            )
        self._features: OrderedDict[int, tuple[Mask, dict[int, Tensor]]] = OrderedDict()
        # By seed, with the revision and the number of classes that they are of.
        self._sums: dict[int, tuple[tuple[int, int], Sums]] = {}
        self._basis: Basis | None = None
        self._previews: OrderedDict[int, Preview] = OrderedDict()
        self._number = 0
        self._quick = ThreadPoolExecutor(1, "predictions")
        self._slow = ThreadPoolExecutor(1, "suggestions")
        self._lock = threading.Lock()  # of the features: `image` is also called on the event loop
        self._workspace: Workspace

    def attach(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def close(self) -> None:
        for thread in (self._quick, self._slow):
            thread.shutdown(wait=True, cancel_futures=True)

    def image(self, seed: int) -> Mask:
        """The image uint8 [R,R,3] of a seed."""
        return self._drawn(seed)[0]

    async def prepare(self, seed: int) -> None:
        """Compute the image and features of a seed, so that `image` answers at once."""
        await _within(self._quick, lambda: self._drawn(seed))

    def preview(self, number: int) -> Preview:
        if number not in self._previews:
            raise InvalidRequest("preview", f"there is no prediction {number} any more; ask for a new one")
        return self._previews[number]

    async def look(self, seed: int, others: Sequence[int]) -> Preview:
        """Fit a quick interpreter to everything that is drawn, and label these images; raises TooFew."""
        sheets, dataset = self._annotated()
        found = await _within(self._quick, lambda: self._look(sheets, dataset, [seed, *others]))
        self._previews[found.number] = found
        while len(self._previews) > KEPT_PREVIEWS:
            self._previews.popitem(last=False)
        return found

    async def estimate(self) -> dict[str, Any]:
        """What leaving out each image says, for the page; raises TooFew below two images."""
        sheets, dataset = self._annotated()
        if len(sheets) < 2:
            raise TooFew("the estimate leaves out one image at a time: draw on a second one")
        found = await _within(self._slow, lambda: self._estimate(sheets, dataset))
        curve = [{"images": count, "miou": each.value, "spread": each.spread} for count, each in found.curve.items()]
        classes = [
            {
                "name": name,
                "iou": _number(each.value),
                "spread": _number(each.spread),
                "images": found.shown_in[name],
            }
            for name, each in found.by_class.items()
        ]
        measure = "mIoU" if task_of(dataset.task).has_label_image else "Found"
        curve = [each for each in curve if _number(each["miou"]) is not None]
        if not curve:
            raise TooFew("no class is drawn on two images yet, so nothing can be compared; draw one on a second image")
        return {"measure": measure, "curve": curve, "classes": classes, "advice": _advice(found.gain)}

    async def suggestions(self, count: int) -> list[Suggestion]:
        """The seeds that would teach most, among the first that are neither open nor skipped; the best first."""
        known, skipped = list(self._workspace.sheets), set(self._workspace.skipped)
        if not known:
            return [Suggestion(seed, 0.0, None) for seed in range(ANNOTATION_SEED, ANNOTATION_SEED + count)]
        free = (seed for seed in range(ANNOTATION_SEED, SEED_END) if seed not in skipped and seed not in known)
        candidates = [next(free) for _ in range(max(CANDIDATES, count))]
        try:
            sheets, dataset = self._annotated()
        except TooFew:
            sheets, dataset = {}, None  # the distance decides alone
        return await _within(
            self._slow, lambda: self._suggest(sheets, dataset, known, candidates=candidates, count=count)
        )

    def _annotated(self) -> tuple[dict[int, Sheet], AnnotatedDataset]:
        """What is drawn at this moment; raises TooFew if nothing can be learned from it."""
        dataset = self._workspace.annotated()
        classes = {int(each) for label in dataset.labels.values() for each in np.unique(label)} - {UNDRAWN}
        if task_of(dataset.task).has_label_image and len(classes) < 2:
            raise TooFew("Draw a few strokes of two classes to see a prediction.")
        if not dataset.labels:
            raise TooFew("Place a keypoint first.")
        return {seed: self._workspace.sheets[seed] for seed in dataset.labels}, dataset

    def _estimate(self, sheets: Mapping[int, Sheet], dataset: AnnotatedDataset) -> Estimate:
        whole = dataset
        if task_of(dataset.task).has_label_image:  # nearly as `fit` will learn it, which has other directions
            whole = extended_by(self._fitted(sheets, dataset)[0], dataset, self._seen)
        spec = quick_spec(self._generator, dataset, self._layout)
        return estimate(spec, whole, self._seen, drawn=dataset)

    def _suggest(
        self,
        sheets: Mapping[int, Sheet],
        dataset: AnnotatedDataset | None,
        known: Sequence[int],
        *,
        candidates: Sequence[int],
        count: int,
    ) -> list[Suggestion]:
        judge = None if dataset is None else self._fitted(sheets, dataset)[0]
        size = self._generator.spec.resolution
        return suggest(self._seen, known, candidates, resolution=size, count=count, judge=judge)

    def _fitted(self, sheets: Mapping[int, Sheet], dataset: AnnotatedDataset) -> tuple[StyleInterpreter, int]:
        """A quick interpreter of everything that is drawn, and the number of pixels that it knows."""
        basis = self._directions()
        sums = Sums.together(self._sums_of(sheet, dataset, basis) for sheet in sheets.values())
        return quick_interpreter(quick_spec(self._generator, dataset, self._layout), basis, sums), sums.pixels

    @torch.no_grad()
    def _look(self, sheets: Mapping[int, Sheet], dataset: AnnotatedDataset, seeds: Sequence[int]) -> Preview:
        begun = time.perf_counter()
        interpreter, pixels = self._fitted(sheets, dataset)
        images, labels, uncertainties = {}, {}, {}
        for seed in dict.fromkeys(seeds):
            images[seed], maps = self._drawn(seed)
            label, uncertainty = preview(interpreter, maps)
            labels[seed], uncertainties[seed] = label.numpy(), uncertainty.numpy()
        self._number += 1
        return Preview(self._number, time.perf_counter() - begun, pixels, images, labels, uncertainties)

    def _sums_of(self, sheet: Sheet, dataset: AnnotatedDataset, basis: Basis) -> Sums:
        """The sums of the drawn pixels of an image, computed once for each revision and number of classes."""
        key = (sheet.revision, len(dataset.names))
        known = self._sums.get(sheet.seed)
        if known is not None and known[0] == key:
            return known[1]
        pool = sample_pixels(
            dataset,
            sheet.seed,
            self._drawn(sheet.seed)[1],
            resolution=self._generator.spec.resolution,
            settings=FitSettings(pixels_per_image=PIXELS),
            rng=torch.Generator().manual_seed(0),
        )
        sums = Sums.of(basis.project(pool.features), pool.targets, key[1])
        self._sums[sheet.seed] = key, sums
        return sums

    def _directions(self) -> Basis:
        if self._basis is None:
            size = self._generator.spec.resolution
            rng = torch.Generator().manual_seed(0)
            count = min(BASIS_PIXELS, size * size)
            self._basis = Basis.of(
                torch.cat(
                    [
                        self._sampled(seed, torch.randperm(size * size, generator=rng)[:count])
                        for seed in range(ANNOTATION_SEED, ANNOTATION_SEED + BASIS_IMAGES)
                    ]
                )
            )
        return self._basis

    def _sampled(self, seed: int, pixels: Tensor) -> Tensor:
        """The features of pixels int64 [P] of an image, [P,D]."""
        size = self._generator.spec.resolution
        maps = {level: x[0] for level, x in self._drawn(seed)[1].items()}
        return sample_features(maps, pixels // size, pixels % size, resolution=size)

    def _seen(self, seed: int) -> dict[int, Tensor]:
        """The features of a seed: the kept ones, or new ones that are not kept, so that they displace no others."""
        with self._lock:
            kept = self._features.get(seed)
        return draw(self._generator, seed, self._psi, layout=self._layout)[1] if kept is None else kept[1]

    @torch.no_grad()
    def _drawn(self, seed: int) -> tuple[Mask, dict[int, Tensor]]:
        """The image uint8 [R,R,3] and the features {r: [1,C_r,r,r]} of a seed."""
        with self._lock:
            if seed in self._features:
                self._features.move_to_end(seed)
                return self._features[seed]
            while self._features and (len(self._features) + 1) * self._image_bytes > self._room:
                self._features.popitem(last=False)
            image, maps = draw(self._generator, seed, self._psi, layout=self._layout)
            self._features[seed] = to_uint8(image)[0].numpy(), maps
            return self._features[seed]


def _number(value: float) -> float | None:
    """A number as JSON has it: NaN becomes null."""
    return None if np.isnan(value) else value


def _advice(gain: Mapping[str, float]) -> str:
    best = max(gain, key=lambda name: gain[name])
    return f"Draw {best!r} on another image: it would gain most."


async def _within(thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, work)
