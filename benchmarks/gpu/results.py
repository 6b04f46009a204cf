"""The results file of a run: it names every figure from the start, so that a partial run says what is missing and why.

Rules of this file:
- A figure that was not measured is `{"missing": "why"}`. Before a run reaches a figure, that is NOT_REACHED.
- The file is written aside and renamed after each change, so a killed run leaves a valid file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import resuming

from gpu.arms import arms_of
from gpu.cases import cases_of

Figures = dict[str, Any]
FORMAT = 1
NOT_REACHED = "the run ended before this"
OUT_OF_TIME = "out of time"


class Results:
    """The figures of one run and their file."""

    def __init__(self, path: Path, *, device: str, tiny: bool, minutes: float) -> None:
        self.path = path
        planned = {
            case.name: {
                "resolution": case.resolution,
                "classes": case.classes,
                "batches": list(case.batches),
                "arms": {part: {arm: {"missing": NOT_REACHED} for arm in arms} for part, arms in arms_of().items()},
            }
            for case in cases_of(tiny)
        }
        self.figures: Figures = {
            "format": FORMAT,
            "complete": False,
            "settings": {"device": device, "tiny": tiny, "minutes": minutes},
            "machine": {"missing": NOT_REACHED},
            "cases": planned,
            "soak": {"missing": NOT_REACHED},
            "service": {"missing": NOT_REACHED},
        }

    def write(self) -> None:
        resuming.write(self.path, self.figures)

    def arm(self, case: str, part: str, arm: str) -> Figures:
        return self.figures["cases"][case]["arms"][part][arm]  # type: ignore[no-any-return]

    def put(self, case: str, part: str, arm: str, *, figures: Figures) -> None:
        self.figures["cases"][case]["arms"][part][arm] = figures
        self.write()

    def explain(self, case: str, why: str) -> None:
        """State why the case's figures that are still missing were not measured."""
        for arms in self.figures["cases"][case]["arms"].values():
            for figures in arms.values():
                if figures.get("missing") == NOT_REACHED:
                    figures["missing"] = why
        self.write()
