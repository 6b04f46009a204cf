"""Conditions on content: their text, the check against a model, what is measured. Compared with plain references."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from labelmint.core.content import MAX_CONDITIONS, Condition, condition_of, conditions_of
from labelmint.core.errors import InvalidRequest
from labelmint.core.policy import SampleOptions, terms_of
from labelmint.core.task import KEYPOINTS
from labelmint_client import SampleOptions as ClientOptions
from tests.support.samples import marked, segmented
from tests.support.served import MODEL

pytestmark = pytest.mark.unit


MARKS = replace(MODEL, task=KEYPOINTS, label_names=("left eye", "chin"))
THREE = replace(MODEL, label_names=("background", "hair", "hat"), palette=((0, 0, 0),) * 3)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("hair:0.01..", Condition("hair", 0.01, None)),
        ("hair:..0", Condition("hair", None, 0.0)),
        ("hair:0.01..0.5", Condition("hair", 0.01, 0.5)),
        ("hair:.5..1", Condition("hair", 0.5, 1.0)),
        ("hair:1e-3..", Condition("hair", 0.001, None)),
        ("left eye:0.5..", Condition("left eye", 0.5, None)),
        ("a:b..c=d>1:0.5..", Condition("a:b..c=d>1", 0.5, None)),
        ("hair:3..4", Condition("hair", 3.0, 4.0)),  # a model's check refuses it
    ],
)
def test_a_condition_is_read(text: str, condition: Condition) -> None:
    assert condition_of(text) == condition


@pytest.mark.parametrize(
    "text",
    [
        *("", "hair", "hair:", "hair:..", ":0.1..", "hair:0.1", "hair=0.1", "hair>0.1", "hair:0.1...", "hair:a..b"),
        *("hair:nan..", "hair:inf..", "hair:-1..", "hair:+1..", "hair: 0.1..", "hair:1_0..", "hair:0.1..0.2..0.3"),
        *("hair:0..1 ", "hair:١..", f"hair:{'9' * 21}..", "x" * 70_000, "hair:" + "1" * 70_000, ":" * 70_000),
    ],
)
def test_what_is_no_condition_is_one_short_error(text: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^where: .* is not a condition; write NAME:MIN\.\.MAX, for example"
    ) as caught:
        condition_of(text)
    assert len(caught.value.message) < 300 and caught.value.metadata == {"field": "where"}


def test_the_client_reads_conditions_as_the_gateway_does() -> None:
    """Two distributions, one syntax: texts drawn from the pieces of conditions."""
    draw = random.Random(0)
    pieces = ["hair", "hat", ":", "..", ".", "0", "0.01", ".5", "1", "1e-3", "e", "-", " ", "9" * 20, "nan", "٣", "é"]
    read = 0
    for _ in range(20_000):
        name, low, high = draw.choice(["hair", "a:b", ""]), draw.choice(pieces), draw.choice(pieces)
        shaped = f"{name}:{draw.choice(['', low])}..{draw.choice(['', high])}"
        text = draw.choice([shaped, "".join(draw.choices(pieces, k=draw.randint(0, 6)))])
        try:
            mine = condition_of(text)
        except InvalidRequest:
            with pytest.raises(ValueError, match="is not a condition"):
                ClientOptions(where=(text,))
            continue
        read += 1
        (theirs,) = ClientOptions(where=(text,)).message("segmentation").where
        (marks,) = ClientOptions(where=(text,)).message("keypoints").where
        low, high = (None if bound is None else bound for bound in (mine.minimum, mine.maximum))
        assert theirs.name == marks.name == mine.name
        assert (theirs.HasField("min_area"), theirs.HasField("max_area")) == (low is not None, high is not None)
        assert (theirs.min_area, theirs.max_area) == (low or 0.0, high or 0.0)
        assert (marks.min_confidence, marks.max_confidence) == (low or 0.0, high or 0.0)
        assert not marks.HasField("min_area") and not theirs.HasField("max_confidence")
    assert read > 1000
    with pytest.raises(ValueError, match="give a sequence of conditions"):
        ClientOptions(where="hair:0.1..")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conditions", "problem"),
    [
        (
            [Condition("beard", 0.1)],
            "'beard:0.1..': model 'faces' has no such name; its classes: background, hair, hat",
        ),
        ([Condition("hair", 0.1), Condition("hair", None, 0.5)], "hair:..0.5: there are two conditions for this name"),
        ([Condition("hair")], "hair:..: has no bound"),
        ([Condition("hair", 1.5)], "hair:1.5..: is out of range; a share of the image's pixels is 0 to 1"),
        ([Condition("hair", None, -0.1)], "hair:..-0.1: is out of range"),
        ([Condition("hair", float("nan"))], "hair:nan..: is out of range"),
        ([Condition("hair", 0.6, 0.5)], "hair:0.6..0.5: the minimum is above the maximum"),
        ([Condition("hair", 0.6), Condition("hat", 0.5)], "hair:0.6.. and hat:0.5..: the minima add up to 1.1"),
        (
            [Condition("hair", None, 0.3), Condition("hat", None, 0.3), Condition("background", 0, 0.3)],
            "the maxima of all classes add up to 0.9, less than the whole image",
        ),
        ([Condition("x" * 100, 0.5)], f"'{'x' * 64}...:0.5..': model"),
        ([Condition("hair", 0.1)] * (MAX_CONDITIONS + 1), "17 conditions given; give at most 16"),
    ],
)
def test_a_condition_that_cannot_be_is_named(conditions: list[Condition], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(problem)) as caught:
        terms_of(THREE, SampleOptions(max_js=1.0, where=tuple(conditions)))
    assert caught.value.metadata == {"field": "where"}


def test_shares_that_add_up_to_the_image_are_possible() -> None:
    tenths = [Condition(f"c{index}", 0.1, 0.1) for index in range(10)]
    model = replace(MODEL, label_names=tuple(each.name for each in tenths))
    assert conditions_of(model, tenths).indices == tuple(range(10))
    # Confidences do not add up to anything.
    conditions_of(MARKS, [Condition("chin", 0.9), Condition("left eye", 0.9)])
    conditions_of(MARKS, [Condition("chin", None, 0.1), Condition("left eye", None, 0.1)])


def test_areas_and_confidences_are_measured_and_bounds_are_inclusive() -> None:
    sample = segmented()
    label = sample.labels["label"]
    share = sum(value == 1 for value in label.ravel().tolist()) / 64
    for low, high, fits in (
        (share, share, True),
        (share, None, True),
        (None, share, True),
        (np.nextafter(share, 1), None, False),
        (None, np.nextafter(share, 0), False),
        (0.0, 1.0, True),
    ):
        conditions = conditions_of(MODEL, [Condition("hair", low, high)])
        assert (
            conditions.measured(sample.labels) == {"hair": share} and (not conditions.missed({"hair": share})) is fits
        )
    marks = marked(sample, "left eye")
    conditions = conditions_of(MARKS, [Condition("chin", None, 0.5), Condition("left eye", 0.5)])
    assert conditions.measured(marks.labels) == {"chin": float(np.float32(0.4)), "left eye": float(np.float32(0.9))}
    assert not conditions.missed(conditions.measured(marks.labels))
    chin, eye = conditions.each
    assert conditions.missed({"chin": 0.4, "left eye": 0.4}) == [eye]
    assert (
        conditions.missed({"chin": 0.6, "left eye": 1.0})
        == conditions.missed({"chin": np.nan, "left eye": 1.0})
        == [chin]
    )


def test_a_missing_content_names_what_is_missed_alone_and_tells_all_that_was_measured() -> None:
    conditions = conditions_of(THREE, [Condition("hair", 0.5), Condition("hat", None, 0.25)])
    error = conditions.missing(7, {"hair": 0.125, "hat": 0.25})
    assert error.message.startswith("seed 7 does not satisfy where: hair has area 0.125, not hair:0.5..; ask for")
    assert error.metadata == {"seed": "7", "content": '{"hair": 0.125, "hat": 0.25}'}


def test_no_condition_is_satisfied_by_everything() -> None:
    conditions = terms_of(MODEL, SampleOptions(max_js=1.0)).conditions
    assert conditions.measured({}) == {} and conditions.missed({}) == []


@pytest.mark.parametrize(
    ("js_score", "area", "outcome", "delivered", "delivered_with_rejected"),
    [
        (2.0, 0.5, "accepted", True, True),
        (2.0, 0.4, "filtered", False, False),
        (2.1, 0.5, "rejected", False, True),
        (2.1, 0.4, "rejected", False, False),
    ],
)
def test_the_gate_comes_first_and_include_rejected_lifts_it_alone(
    js_score: float, area: float, outcome: str, delivered: bool, delivered_with_rejected: bool
) -> None:
    options, content = SampleOptions(max_js=2.0, where=(Condition("hair", 0.5),)), {"hair": area}
    strict, loose = terms_of(MODEL, options), terms_of(MODEL, replace(options, include_rejected=True))
    assert strict.outcome(js_score, content) == loose.outcome(js_score, content) == outcome
    assert strict.delivers(js_score, content) is delivered
    assert loose.delivers(js_score, content) is delivered_with_rejected


@pytest.mark.parametrize(
    ("model", "options", "problem"),
    [
        (MODEL, {"ignore_js_quantile": 1.5}, "1.5 is out of range; give 0 to 1"),
        (MODEL, {"ignore_js_quantile": float("nan")}, "nan is out of range"),
        (MODEL, {"ignore_js_quantile": 0.5, "omit_label": True}, "omit_label leaves no label to ignore pixels of"),
        (MARKS, {"ignore_js_quantile": 0.5}, "has task 'keypoints' and no label image; leave it unset"),
    ],
)
def test_pixels_that_cannot_be_ignored(model: object, options: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        terms_of(model, SampleOptions(max_js=1.0, **options))  # type: ignore[arg-type]
    assert caught.value.metadata == {"field": "ignore_js_quantile"}


def test_what_a_decision_needs_is_asked_for_even_if_it_is_not_delivered() -> None:
    where = (Condition("hair", 0.5),)
    assert SampleOptions(omit_image=True, omit_label=True, where=where).outputs(MODEL) == ("label", "js_score")
    assert SampleOptions(omit_image=True, ignore_js_quantile=0.5).outputs(MODEL) == ("label", "js_map", "js_score")
