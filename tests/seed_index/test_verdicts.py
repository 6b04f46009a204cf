"""The verdicts on an index are those on the samples, also where a bound is met exactly."""

import random
from typing import Any

import numpy as np
import pytest

from labelmint.core.content import Condition
from labelmint.core.policy import SampleOptions, terms_of
from labelmint.core.served_model import ServedModel
from labelmint.core.task import KEYPOINTS
from labelmint.seed_index.layout import Described
from labelmint.seed_index.verdicts import DELIVERED, FILTERED, REJECTED, columns_for, verdicts
from tests.support.seed_index import some_columns
from tests.support.served import MODEL

pytestmark = pytest.mark.unit

NOSE = MODEL.__class__(**{**MODEL.__dict__, "task": KEYPOINTS, "label_names": ("nose", "chin")})


def labels_of(model: ServedModel, described: Described, columns: dict[str, Any], row: int) -> dict[str, Any]:
    """The label outputs of a sample that has the values of a row."""
    values = [columns[described.label_column(name)][row] for name in model.label_names]
    if model.task is KEYPOINTS:
        return {"confidence": np.array(values, np.float32)}
    label = np.full(model.resolution**2, 7, np.uint8)
    label[: values[0]], label[values[0] : values[0] + values[1]] = 0, 1
    return {"label": label.reshape(model.resolution, -1)}


@pytest.mark.parametrize("model", [MODEL, NOSE], ids=["areas", "confidences"])
def test_a_verdict_is_that_of_the_sample(model: ServedModel) -> None:
    described = Described.of(model, truncation_psi=1.0, class_index=None)
    columns = some_columns(described, range(0, 300), 1)
    score = columns[described.score_column]
    score[7], score[8] = np.nan, np.inf
    first, second = (columns[described.label_column(name)] for name in model.label_names)
    if model is NOSE:
        first[9] = np.nan
    else:
        second[:] = np.minimum(second, model.resolution**2 - first)
    draw, seen = random.Random(3), np.zeros(8, int)
    for _ in range(40):
        scale = model.resolution**2 if model is MODEL else 1
        low, high = sorted(float(first[draw.randrange(10, 300)]) / scale for _ in range(2))
        where = [Condition(model.label_names[0], low, draw.choice([None, high]))]
        if draw.random() < 0.4:
            where.append(
                Condition(model.label_names[1], None, max(1 - low, float(second[draw.randrange(300)]) / scale))
            )
        options = SampleOptions(
            max_js=float(score[draw.randrange(10, 300)]),
            include_rejected=draw.random() < 0.4,
            where=tuple(where[: draw.randrange(3)]),
        )
        terms = terms_of(model, options)
        found = verdicts(described, terms, {name: columns[name] for name in columns_for(described, terms)})
        for row, verdict in enumerate(found.tolist()):
            content = terms.conditions.measured(labels_of(model, described, columns, row))
            outcome = terms.outcome(float(score[row]), content)
            assert (verdict & REJECTED > 0, verdict & FILTERED > 0) == (outcome == "rejected", outcome == "filtered")
            assert (verdict & DELIVERED > 0) == terms.delivers(float(score[row]), content)
            seen[verdict] += 1
    assert set(np.flatnonzero(seen)) == {DELIVERED, REJECTED, FILTERED, REJECTED | DELIVERED}
