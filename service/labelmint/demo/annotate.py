"""Stands in for the annotator of the demo: writes the renderer's exact masks beside what `synth` wrote.

Rules of this file:
- It writes what an annotation tool would write and nothing that a person could not know.

Run it as `python -m labelmint.demo.annotate DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from labelmint.demo import faces
from labelmint.gateway.policy import latent_of
from labelmint.models.annotations import LabelClasses, write_masks

CLASSES = LabelClasses(faces.CLASS_NAMES, faces.PALETTE)


def render_seed(seed: int) -> faces.Faces:
    """The exact face of a seed, batch of one."""
    return faces.render(torch.from_numpy(latent_of(seed, faces.Z_DIM)))


def exact_masks(seeds: Iterable[int]) -> dict[int, npt.NDArray[np.uint8]]:
    return {seed: render_seed(seed).label[0].numpy() for seed in seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    seeds = json.loads((directory / "dataset.json").read_text())["seeds"]
    write_masks(directory, CLASSES, exact_masks(seeds))
    print(f"{directory}: {len(seeds)} masks of {len(faces.CLASS_NAMES)} classes")


if __name__ == "__main__":
    main()
