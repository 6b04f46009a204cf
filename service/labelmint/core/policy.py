"""The decisions of the gateway, without I/O: seed to latent, options to gate and style mixing, seeds of a stream.

Rules of this file:
- A seed identifies a sample: its latent is `numpy.random.RandomState(seed).randn(1, z_dim)` in float32, as the official
  StyleGAN scripts draw it.
- A calibrated threshold is applied only under the conditions in which it was measured.
- No option is adjusted silently. An option that cannot be applied raises InvalidRequest, which names the field.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from labelmint.core.content import Condition, Conditions, conditions_of
from labelmint.core.errors import InvalidRequest, Uncalibrated, shortened
from labelmint.core.served_model import ServedModel

SEED_END = 2**32
ANNOTATION_SEED = 4_000_000_000  # a high one: the low seeds, which people request first, are then unseen samples
MAX_BATCH = 64
DEFAULT_WINDOW = 8
MAX_TRUNCATION_PSI = 2.0
DEFAULT_PAGE = 1 << 20
MAX_PAGE = 1 << 23


@dataclass(frozen=True)
class SampleOptions:
    """The options of a request; None means the model's default."""

    truncation_psi: float | None = None
    style_seed: int | None = None
    crossover: int | None = None
    max_js: float | None = None
    max_quantile: float | None = None
    include_rejected: bool = False
    include_js_map: bool = False
    omit_image: bool = False
    omit_label: bool = False  # or the keypoints
    where: tuple[Condition, ...] = ()
    ignore_js_quantile: float | None = None
    class_index: int | None = None

    def outputs(self, model: ServedModel) -> tuple[str, ...]:
        """The ensemble outputs to request; the score is always among them."""
        image = () if self.omit_image else ("image",)
        label = () if self.omit_label and not self.where else model.task.label_outputs
        js_map = self.include_js_map or self.ignore_js_quantile is not None
        return (*image, *label, *(("js_map",) if js_map else ()), "js_score")


@dataclass(frozen=True)
class Gate:
    """Accept scores up to `threshold` nats; `calibration_id` is empty when the caller gave the threshold."""

    truncation_psi: float
    threshold: float
    calibration_id: str

    def accepts(self, js_score: float) -> bool:
        # False for NaN: every gate rejects such a score.
        return js_score <= self.threshold


Outcome = Literal["accepted", "rejected", "filtered"]


@dataclass(frozen=True)
class Terms:
    """What the options of a request mean for a model, checked: what is the same for all its seeds.

    `options` says which parts of a sample are delivered; `outputs` are the ensemble outputs to request for it.
    A sample is judged by its score and its content, which is what `conditions` measured in it.
    """

    gate: Gate
    conditions: Conditions
    options: SampleOptions
    outputs: tuple[str, ...]

    def outcome(self, js_score: float, content: Mapping[str, float]) -> Outcome:
        """What a seed counts as. The gate comes first: a rejected seed is rejected whatever its sample contains."""
        if not self.gate.accepts(js_score):
            return "rejected"
        return "filtered" if self.conditions.missed(content) else "accepted"

    def delivers(self, js_score: float, content: Mapping[str, float]) -> bool:
        """Whether a sample is delivered. `include_rejected` lifts the gate and leaves the conditions."""
        passed = self.options.include_rejected or self.gate.accepts(js_score)
        return passed and not self.conditions.missed(content)


@dataclass(frozen=True)
class Mixing:
    """Style mixing: layers from `crossover` on take the style of `style_seed`'s latent; the others keep the shape."""

    style_seed: int
    crossover: int


def check_seed(seed: int, field: str = "seed") -> int:
    if not 0 <= seed < SEED_END:
        raise InvalidRequest(field, f"{seed} is out of range; seeds are 0 to {SEED_END - 1}")
    return seed


def check_batch(seeds: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(seeds) <= MAX_BATCH:
        raise InvalidRequest("seeds", f"{len(seeds)} given; a batch takes 1 to {MAX_BATCH}, use a stream for more")
    return tuple(check_seed(seed, "seeds") for seed in seeds)


def latent_of(seed: int, z_dim: int) -> npt.NDArray[np.float32]:
    """The latent of a seed, float32 [1,z_dim]."""
    generator = _reseeded.generator
    generator.seed(seed)
    return generator.randn(1, z_dim).astype(np.float32)


class _Reseeded(threading.local):
    """One generator per thread, seeded again for each latent: a new RandomState reads entropy, at 20 times the cost."""

    def __init__(self) -> None:
        self.generator = np.random.RandomState(0)


_reseeded = _Reseeded()


def check_class(model: ServedModel, class_index: int | None, *, required: bool = True) -> None:
    """Raises InvalidRequest unless the generator has this class. None is right where it has no classes.

    With `required` False, None is right for every model.
    """
    classes = model.generator_classes
    if not classes:
        if class_index is not None:
            raise InvalidRequest("class_index", f"model {model.name!r} has no generator classes; leave it unset")
        return
    last = len(classes) - 1
    given = f"give 0 ({shortened(classes[0])}) to {last} ({shortened(classes[-1])})"
    allowed = f"model {model.name!r} has {len(classes)} generator classes, {given} (see GetModel)"
    if class_index is None and required:
        raise InvalidRequest("class_index", f"missing; {allowed}")
    if class_index is not None and not 0 <= class_index <= last:
        raise InvalidRequest("class_index", f"{class_index} is out of range; {allowed}")


def mixing_of(model: ServedModel, options: SampleOptions) -> Mixing | None:
    """The style mixing of one sample, None for an unmixed one; raises InvalidRequest."""
    if options.style_seed is None and options.crossover is None:
        return None
    if options.style_seed is None:
        raise InvalidRequest("style_seed", "missing; a crossover needs a style seed for the layers from it on")
    return Mixing(check_seed(options.style_seed, "style_seed"), _check_crossover(model, options.crossover))


def mixings_of(
    model: ServedModel, options: SampleOptions, style_seeds: Sequence[int], *, count: int
) -> tuple[Mixing | None, ...]:
    """The style mixing of each of a batch's `count` samples; raises InvalidRequest.

    `style_seeds` is empty, or has one seed per sample and replaces the option `style_seed`.
    """
    if not style_seeds:
        return (mixing_of(model, options),) * count
    if options.style_seed is not None:
        raise InvalidRequest("style_seed", "give style_seed for the whole batch or style_seeds, not both")
    if len(style_seeds) != count:
        raise InvalidRequest("style_seeds", f"{len(style_seeds)} given for {count} seeds; give one per seed, or none")
    crossover = _check_crossover(model, options.crossover)
    return tuple(Mixing(check_seed(seed, "style_seeds"), crossover) for seed in style_seeds)


def _check_crossover(model: ServedModel, crossover: int | None) -> int:
    allowed = f"model {model.name!r} has {model.num_ws} layers, give 1 to {model.num_ws - 1}"
    if crossover is None:
        raise InvalidRequest("crossover", f"missing; it is the first layer that takes the style: {allowed}")
    if not 1 <= crossover < model.num_ws:
        raise InvalidRequest("crossover", f"{crossover} is out of range; {allowed}")
    return crossover


def group_id(
    model: ServedModel, seed: int, mixing: Mixing, *, truncation_psi: float, class_index: int | None = None
) -> str:
    """The id that all mixed samples of one shape share, whatever their style: 16 hexadecimal digits.

    They are the first 16 of the SHA-256 over the model's digest, the seed, the crossover, the truncation and, if the
    generator has classes, the class. Numbers are in decimal, and colons separate the parts.
    """
    drawn = "" if class_index is None else f":{class_index}"
    content = f"{model.digest}:{seed}:{mixing.crossover}:{truncation_psi!r}{drawn}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def gate_of(model: ServedModel, options: SampleOptions) -> Gate:
    """The gate for these options; raises InvalidRequest or Uncalibrated."""
    check_class(model, options.class_index)
    calibration = model.calibration_of(options.class_index)
    psi = options.truncation_psi
    if psi is None:
        psi = calibration.truncation_psi if calibration is not None else 1.0
    if not 0.0 <= psi <= MAX_TRUNCATION_PSI:
        raise InvalidRequest("truncation_psi", f"{psi} is out of range; give 0 to {MAX_TRUNCATION_PSI:g}")
    if options.max_js is not None and options.max_quantile is not None:
        raise InvalidRequest("max_js", "give max_js or max_quantile, not both")
    if options.max_js is not None:
        if not (math.isfinite(options.max_js) and options.max_js >= 0.0):
            raise InvalidRequest("max_js", f"{options.max_js} is not a JS score; give nats, at least 0")
        return Gate(psi, options.max_js, "")
    if options.max_quantile is not None and not 0.0 < options.max_quantile <= 1.0:
        raise InvalidRequest("max_quantile", f"{options.max_quantile} is out of range; give above 0 and at most 1")
    if calibration is None:
        raise Uncalibrated("max_js", model.uncalibrated(options.class_index))
    if options.crossover is not None:
        raise Uncalibrated(
            "crossover",
            "mixed samples were not calibrated, only unmixed ones: neither the threshold nor a quantile applies. "
            f"Give max_js as well, for example the calibrated threshold, {calibration.threshold:g} (see GetModel)",
        )
    if psi != calibration.truncation_psi:
        raise Uncalibrated(
            "truncation_psi",
            f"{psi:g} was not calibrated, only {calibration.truncation_psi:g}; give max_js as well",
        )
    if options.max_quantile is not None:
        return Gate(psi, calibration.score_at(options.max_quantile), calibration.id)
    return Gate(psi, calibration.threshold, calibration.id)


def terms_of(model: ServedModel, options: SampleOptions) -> Terms:
    """The terms of a request with these options; raises InvalidRequest or Uncalibrated."""
    quantile = options.ignore_js_quantile
    if quantile is not None:
        check_has_label(model, "ignore_js_quantile", "leave it unset")
        if options.omit_label:
            raise InvalidRequest("ignore_js_quantile", "omit_label leaves no label to ignore pixels of; leave it unset")
        if not 0.0 <= quantile <= 1.0:
            raise InvalidRequest("ignore_js_quantile", f"{quantile} is out of range; give 0 to 1")
    return Terms(gate_of(model, options), conditions_of(model, options.where), options, options.outputs(model))


def check_has_label(model: ServedModel, field: str, asked: str) -> None:
    """Raises InvalidRequest, with the advice `asked`, for a model without a label image, such as a keypoint model."""
    if not model.task.has_label_image:
        raise InvalidRequest(field, f"model {model.name!r} has task {model.task.name!r} and no label image; {asked}")


def window_of(window: int, largest: int) -> int:
    """How many samples a stream generates ahead of its reader; 0 means the default. Raises InvalidRequest."""
    if not 0 <= window <= largest:
        raise InvalidRequest("window", f"{window} is out of range; give 1 to {largest}, or 0 for the default")
    return window or min(DEFAULT_WINDOW, largest)


def check_page(seeds: tuple[int, int], page_size: int) -> int:
    """The size of a page of the seeds from seeds[0] up to seeds[1], 0 for as far as they are known.

    Raises InvalidRequest. A `page_size` of 0 means the default.
    """
    start, end = seeds
    for field, seed in (("start_seed", start), ("end_seed", end)):
        if not 0 <= seed <= SEED_END:
            raise InvalidRequest(field, f"{seed} is out of range; give 0 to {SEED_END}")
    if end and end < start:
        raise InvalidRequest("end_seed", f"{end} is below start_seed, {start}; give the first seed after the range")
    if not 0 <= page_size <= MAX_PAGE:
        raise InvalidRequest("page_size", f"{page_size} is out of range; give 1 to {MAX_PAGE}, or 0 for the default")
    return page_size or DEFAULT_PAGE


@dataclass(frozen=True)
class Walk:
    """The seeds of a stream: those from `start` on that are congruent to `shard_index` modulo `shard_count`."""

    start: int
    shard_index: int = 0
    shard_count: int = 1

    def __post_init__(self) -> None:
        # A finished walk resumes at 2^32. It is empty, and not an error.
        if self.start != SEED_END:
            check_seed(self.start, "start_seed")
        if self.shard_count < 1:
            raise InvalidRequest("shard_count", f"{self.shard_count} is not a number of shards; give at least 1")
        if not 0 <= self.shard_index < self.shard_count:
            raise InvalidRequest("shard_index", f"{self.shard_index} is out of range; give 0 to {self.shard_count - 1}")

    def seeds(self) -> range:
        first = self.start + (self.shard_index - self.start) % self.shard_count
        return range(first, SEED_END, self.shard_count)
