"""A small generator, and labels that are written in its features."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.annotate.estimate import Estimate, estimate
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, LabelClasses, write_keypoints, write_masks
from labelmint.models.draw import draw, synthesize
from labelmint.models.generator import Generator
from labelmint.models.quick import quick_spec
from labelmint.models.store import save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec

SPEC = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=32, channels={4: 8, 8: 8, 16: 8, 32: 8})
CLASSES = LabelClasses(("dark", "<bright>", "spot"), ((0, 0, 0), (255, 255, 255), (200, 0, 0)))


@dataclass(frozen=True)
class Truth:
    """The generator, and what is true of its images."""

    generator: Generator

    def features(self, seed: int) -> dict[int, torch.Tensor]:
        return draw(self.generator, seed, 1.0, layout="paper")[1]

    def feature(self, seed: int, channel: int = 0) -> np.ndarray:
        return self.features(seed)[16][0, channel].repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()

    def mask(self, seed: int) -> np.ndarray:
        """Bright where one feature is large, and spots where another is, in a part of the images only."""
        mask = (self.feature(seed) > 0.0).astype(np.uint8)
        if seed % 2:
            mask[self.feature(seed, 1) > 1.5] = 2
        return mask

    def estimate(self, dataset: AnnotatedDataset) -> Estimate:
        return estimate(quick_spec(self.generator, dataset, "paper"), dataset, self.features)

    def peak(self, seed: int) -> np.ndarray:
        """The keypoint float32 [1,3]: where the first feature is largest."""
        y, x = np.unravel_index(self.feature(seed).argmax(), (32, 32))
        return np.array([[x, y, 2]], np.float32)

    def dataset(self, seeds: range, change: Callable[[np.ndarray], np.ndarray] = lambda mask: mask) -> AnnotatedDataset:
        masks = {seed: change(self.mask(seed)) for seed in seeds}
        images = {seed: np.zeros((32, 32, 3), np.uint8) for seed in seeds}
        return AnnotatedDataset("segmentation", 1.0, CLASSES.names, CLASSES.palette, images, masks)

    def points(self, seeds: range) -> AnnotatedDataset:
        images = {seed: np.zeros((32, 32, 3), np.uint8) for seed in seeds}
        return AnnotatedDataset(
            "keypoints", 1.0, ("peak",), ((255, 0, 0),), images, {seed: self.peak(seed) for seed in seeds}
        )


@pytest.fixture(scope="session")
def truth() -> Truth:
    torch.manual_seed(0)
    return Truth(Generator(SPEC).eval())


@pytest.fixture
def directory(tmp_path: Path, truth: Truth) -> Path:
    """generator.safetensors, and the directory `parts` with six annotated images, for both tasks."""
    save_generator(tmp_path / "generator.safetensors", truth.generator, {})
    synthesize(tmp_path / "generator.safetensors", tmp_path / "parts", range(6), truncation_psi=1.0)
    write_masks(tmp_path / "parts", CLASSES, {seed: truth.mask(seed) for seed in range(6)})
    write_keypoints(
        tmp_path / "parts", ("peak",), ((255, 0, 0),), keypoints={seed: truth.peak(seed) for seed in range(6)}
    )
    return tmp_path


def rows_only(mask: np.ndarray) -> np.ndarray:
    """A mask of which every fourth row is drawn."""
    sparse = np.full_like(mask, UNDRAWN)
    sparse[::4] = mask[::4]
    return sparse
