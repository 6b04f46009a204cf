"""Replaces the annotator of the demo: adds the renderer's exact masks or keypoints to a directory of `synth`.

Rules of this file:
- It writes only what an annotation tool would write, so `fit` gets no information that a person could not give.

Run it as `PYTHONPATH=benchmarks python -m demo.annotate DIRECTORY [--task keypoints]`.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from demo import faces
from demo.faces.keypoints import keypoints
from demo.faces.scene import geometry
from labelmint.core.policy import latent_of
from labelmint.models.annotations import LabelClasses, write_keypoints, write_masks

CLASSES = LabelClasses(faces.CLASS_NAMES, faces.PALETTE)


def render_seed(seed: int) -> faces.Faces:
    """Render the exact face of a seed, as a batch of one."""
    return faces.render(torch.from_numpy(latent_of(seed, faces.Z_DIM)))


@functools.cache
def compiled_renderer() -> Callable[[int], faces.Faces]:
    """Return `render_seed` compiled for this machine, for thousands of seeds: compiling takes half a minute."""
    render = torch.compile(faces.render, dynamic=False)
    return lambda seed: render(torch.from_numpy(latent_of(seed, faces.Z_DIM)))


def exact_masks(seeds: Iterable[int]) -> dict[int, npt.NDArray[np.uint8]]:
    return {seed: render_seed(seed).label[0].numpy() for seed in seeds}


def exact_keypoints(seeds: Iterable[int]) -> dict[int, npt.NDArray[np.float32]]:
    """Return float32 [K,3] by seed: x, y in pixels, and 2 (visible) if the point is inside the image, else 0."""
    result = {}
    for seed in seeds:
        scene = geometry(torch.from_numpy(latent_of(seed, faces.Z_DIM)))
        points = keypoints(scene, faces.RESOLUTION)[0].numpy()  # [K,2]
        inside = ((points >= -0.5) & (points <= faces.RESOLUTION - 0.5)).all(axis=1, keepdims=True)  # [K,1]
        result[seed] = np.concatenate([points, 2 * inside], axis=1).astype(np.float32)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--task", choices=("segmentation", "keypoints"), default="segmentation")
    arguments = parser.parse_args()
    seeds = json.loads((arguments.directory / "dataset.json").read_text())["seeds"]
    if arguments.task == "keypoints":
        write_keypoints(
            arguments.directory, faces.KEYPOINT_NAMES, faces.KEYPOINT_PALETTE, keypoints=exact_keypoints(seeds)
        )
    else:
        write_masks(arguments.directory, CLASSES, exact_masks(seeds))
    print(f"{arguments.directory}: annotated {len(seeds)} images for {arguments.task}")


if __name__ == "__main__":
    main()
