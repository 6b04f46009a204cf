"""Conditions on what a sample contains: their text, their check against a model, and their measurement. Pure functions.

Rules of this file:
- A condition is about one label name: the area of a class, as a share of the image's pixels, or the confidence of a
  keypoint. Both bounds are inclusive.
- REST and the command line write a condition as NAME:MIN..MAX, where one bound may be missing. No character of this
  form means anything to a shell or needs percent-encoding in a URL, and a name may contain any character.
- A condition that no sample can satisfy, or that is about nothing in the model, is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.core.errors import ContentMissing, InvalidRequest, shortened
from labelmint.core.served_model import ServedModel
from labelmint.core.task import Measure

# The error of a sample that does not satisfy them names each with its measured value, in a trailer of bounded size.
MAX_CONDITIONS = 16
_NUMBER = re.compile(r"(?:[0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})(?:[eE]-?[0-9]{1,3})?")
_FIELD = "where"

Labels = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Condition:
    """The class or keypoint `name` measures at least `minimum` and at most `maximum`; None: no bound."""

    name: str
    minimum: float | None = None
    maximum: float | None = None

    def __str__(self) -> str:
        low, high = ("" if bound is None else f"{bound:.12g}" for bound in (self.minimum, self.maximum))
        return f"{shortened(self.name)}:{low}..{high}"

    @property
    def bounds(self) -> tuple[float, float]:
        return (
            -math.inf if self.minimum is None else self.minimum,
            math.inf if self.maximum is None else self.maximum,
        )


def condition_of(text: str) -> Condition:
    """Read a condition in the form NAME:MIN..MAX; raises InvalidRequest."""
    name, _, bounds = text.rpartition(":")
    low, dots, high = bounds.partition("..")
    if not (name and dots and (low or high) and all(_NUMBER.fullmatch(bound) for bound in (low, high) if bound)):
        raise InvalidRequest(
            _FIELD,
            f"{shortened(text)!r} is not a condition; write NAME:MIN..MAX, for example hair:0.01.. for at least 1 % "
            "of the pixels, hair:..0 for none, hair:0.01..0.5 for both bounds",
        )
    return Condition(name, float(low) if low else None, float(high) if high else None)


@dataclass(frozen=True)
class Conditions:
    """The conditions of a request, checked for a model. `indices` are those of their names in the model."""

    measure: Measure
    each: tuple[Condition, ...]
    indices: tuple[int, ...]

    def measured(self, labels: Labels) -> dict[str, float]:
        """The content of a sample: what the conditions are about, by name, in its label outputs."""
        measure = _MEASURES[self.measure]
        return {
            condition.name: measure(labels, index) for condition, index in zip(self.each, self.indices, strict=True)
        }

    def missed(self, content: Mapping[str, float]) -> list[Condition]:
        """The conditions that the content of a sample does not satisfy."""
        # A value that is not a number is within no bounds.
        return [each for each in self.each if not each.bounds[0] <= content[each.name] <= each.bounds[1]]

    def missing(self, seed: int, content: Mapping[str, float]) -> ContentMissing:
        """The error for a sample that does not satisfy the conditions."""
        missed = (
            f"{each.name} has {self.measure} {content[each.name]:.12g}, not {each}" for each in self.missed(content)
        )
        return ContentMissing(seed, content, "; ".join(missed))


def listed(where: Sequence[Condition]) -> str:
    """Conditions as an error names them."""
    return " and ".join(map(str, where))


def conditions_of(model: ServedModel, where: Sequence[Condition]) -> Conditions:
    """Check conditions against a model; raises InvalidRequest, which names the wrong one."""
    if len(where) > MAX_CONDITIONS:
        raise InvalidRequest(_FIELD, f"{len(where)} conditions given; give at most {MAX_CONDITIONS}")
    measure, indices = model.task.measure, dict[str, int]()
    for each in where:
        if each.name not in model.label_names:
            known = ", ".join(model.label_names)
            raise InvalidRequest(
                _FIELD, f"{str(each)!r}: model {model.name!r} has no such name; its {model.task.names}: {known}"
            )
        if each.name in indices:
            raise InvalidRequest(
                _FIELD, f"{each}: there are two conditions for this name; write them as one, NAME:MIN..MAX"
            )
        if each.minimum is None and each.maximum is None:
            raise InvalidRequest(_FIELD, f"{each}: has no bound; give a minimum, a maximum or both")
        if not all(0.0 <= bound <= 1.0 for bound in (each.minimum, each.maximum) if bound is not None):
            raise InvalidRequest(_FIELD, f"{each}: is out of range; {_RANGES[measure]} is 0 to 1")
        if not each.bounds[0] <= each.bounds[1]:
            raise InvalidRequest(_FIELD, f"{each}: the minimum is above the maximum; no sample is like that")
        indices[each.name] = model.label_names.index(each.name)
    if measure == "area":
        _check_sum(model, where)
    return Conditions(measure, tuple(where), tuple(indices.values()))


def _check_sum(model: ServedModel, where: Sequence[Condition]) -> None:
    """Raises InvalidRequest if the areas cannot add up to the image, of which each pixel has one class."""
    least = math.fsum(each.minimum or 0.0 for each in where)
    most = math.fsum(1.0 if each.maximum is None else each.maximum for each in where)
    if least > 1.0 + 1e-9:
        raise InvalidRequest(_FIELD, f"{listed(where)}: the minima add up to {least:g}, more than the whole image")
    if len(where) == len(model.label_names) and most < 1.0 - 1e-9:
        raise InvalidRequest(
            _FIELD, f"{listed(where)}: the maxima of all classes add up to {most:g}, less than the whole image"
        )


def _area(labels: Labels, index: int) -> float:
    label = labels["label"]  # uint8 [R,R]
    return int(np.count_nonzero(label == index)) / label.size


def _confidence(labels: Labels, index: int) -> float:
    return float(labels["confidence"][index])  # float32 [K]


_MEASURES: Mapping[Measure, Callable[[Labels, int], float]] = {"area": _area, "confidence": _confidence}
_RANGES: Mapping[Measure, str] = {"area": "a share of the image's pixels", "confidence": "a confidence"}
