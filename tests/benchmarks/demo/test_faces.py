"""The renderer: exact, pure, and separable into geometry and appearance."""

import pytest
import torch
from demo import faces

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return torch.randn(64, faces.Z_DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def batch(z: torch.Tensor) -> faces.Faces:
    return faces.render(z)


def test_shapes_and_ranges(batch: faces.Faces) -> None:
    assert batch.image.shape == (64, 3, 128, 128) and batch.image.dtype == torch.float32
    assert float(batch.image.min()) >= -1.0 and float(batch.image.max()) <= 1.0
    assert batch.label.shape == (64, 128, 128) and batch.label.dtype == torch.uint8
    assert batch.keypoints.shape == (64, len(faces.KEYPOINT_NAMES), 2)


def test_every_face_has_every_part_and_some_are_small(batch: faces.Faces) -> None:
    areas = torch.stack([torch.bincount(label.flatten().long(), minlength=12) for label in batch.label])  # [B,K]
    # Hair may hide an ear and a mouth may be shut; all other parts are always seen.
    for index, name in enumerate(faces.CLASS_NAMES):
        seen = float((areas[:, index] > 0).float().mean())
        assert seen == 1.0 or (name in ("ear", "mouth") and seen > 0.9), (name, seen)
    eye = faces.CLASS_NAMES.index("eye")
    smallest = [min(region_sizes(label == eye)) for label in batch.label]
    assert sum(size < 20 for size in smallest) > len(smallest) / 2


def region_sizes(mask: torch.Tensor) -> list[int]:
    """Sizes of the 4-connected regions of a mask, in pixels."""
    left = {(int(y), int(x)) for y, x in mask.nonzero()}
    sizes = []
    while left:
        frontier = [left.pop()]
        size = 0
        while frontier:
            y, x = frontier.pop()
            size += 1
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            frontier.extend(near)
        sizes.append(size)
    return sizes


def test_a_face_does_not_depend_on_its_batch(z: torch.Tensor, batch: faces.Faces) -> None:
    alone = faces.render(z[5:6])
    assert torch.equal(alone.label[0], batch.label[5])
    torch.testing.assert_close(alone.image[0], batch.image[5], atol=1e-6, rtol=0)


def test_scale_of_the_latent_does_not_matter(z: torch.Tensor, batch: faces.Faces) -> None:
    scaled = faces.render(z * 3.0)
    assert float((scaled.label == batch.label).float().mean()) > 0.9999


def test_style_changes_colours_and_keeps_geometry(z: torch.Tensor, batch: faces.Faces) -> None:
    mixed = faces.render(z, z.flip(0))
    assert torch.equal(mixed.label, batch.label)
    assert torch.equal(mixed.keypoints, batch.keypoints)
    assert float((mixed.image - batch.image).abs().mean()) > 0.1


def test_keypoints_lie_on_their_parts(batch: faces.Faces) -> None:
    near = {"left_eye": ("eye", "iris"), "right_eye": ("eye", "iris"), "nose_tip": ("nose",)}
    for name, parts in near.items():
        index = faces.KEYPOINT_NAMES.index(name)
        ids = {faces.CLASS_NAMES.index(part) for part in parts}
        for label, points in zip(batch.label, batch.keypoints, strict=True):
            x, y = (round(float(value)) for value in points[index])
            window = label[y - 2 : y + 3, x - 2 : x + 3].flatten().tolist()
            assert ids.intersection(window), name


def test_pose_is_moderate(batch: faces.Faces) -> None:
    nose = batch.keypoints[:, faces.KEYPOINT_NAMES.index("nose_tip"), 0]
    assert float((nose - 63.5).abs().max()) < 0.15 * 128
