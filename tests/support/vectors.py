"""The vectors of tests/data, which the official code of other projects computed."""

import numpy as np

from tests.conftest import ROOT

Vectors = dict[str, np.ndarray]


def vectors(name: str) -> Vectors:
    with np.load(ROOT / "tests" / "data" / f"{name}.npz") as file:
        return dict(file)
