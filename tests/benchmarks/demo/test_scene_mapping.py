"""The mapping network's first fit: what w knows of the scene, and what it starts with."""

import dataclasses

import pytest
import torch
from demo import faces, train_generator
from demo.scene_mapping import fit_mapping, scene_parameters

from labelmint.models.generator import Mapping

pytestmark = pytest.mark.torch

SPEC = dataclasses.replace(train_generator.SPEC, w_dim=64, mapping_layers=2, mapping_width=256)


def fitted(steps: int) -> tuple[Mapping, float]:
    torch.manual_seed(0)
    mapping = Mapping(SPEC)
    return mapping, fit_mapping(mapping, steps=steps)


@pytest.fixture(scope="module")
def mapping() -> Mapping:
    return fitted(300)[0]


def test_it_learns_more_with_more_steps() -> None:
    missed = [fitted(steps)[1] for steps in (1, 60)]
    assert missed[1] < 0.6 < missed[0]


def test_the_scene_can_be_read_from_w_of_new_latents(mapping: Mapping) -> None:
    """A linear map from w, fitted to one half, predicts the head's place in the other half."""
    z = torch.randn(4000, faces.Z_DIM, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        w = mapping(z)
    wanted = scene_parameters(z)[:, :1]  # shift_x
    design = torch.cat([w, torch.ones(len(w), 1)], dim=1)
    solution = torch.linalg.lstsq(design[:2000], wanted[:2000]).solution
    missed = (design[2000:] @ solution - wanted[2000:]).square().mean() / wanted[2000:].var()
    assert missed < 0.15


def test_w_has_a_mean_square_of_one(mapping: Mapping) -> None:
    with torch.no_grad():
        w = mapping(torch.randn(4000, faces.Z_DIM, generator=torch.Generator().manual_seed(12)))
    assert abs(float(w.square().mean()) - 1.0) < 0.05


def test_two_fits_give_the_same_weights() -> None:
    (first, _), (second, _) = fitted(5), fitted(5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_parameters_depend_on_their_half_of_the_latent() -> None:
    z = torch.randn(2, faces.Z_DIM, generator=torch.Generator().manual_seed(13))
    other = z.clone()
    other[:, faces.GEOMETRY_DIMS :] = z[:, faces.GEOMETRY_DIMS :].flip(1)  # the same mean square
    changed = (scene_parameters(z) != scene_parameters(other)).any(dim=0)
    geometry = len(dataclasses.fields(faces.scene.Geometry))
    torch.testing.assert_close(scene_parameters(z)[:, :geometry], scene_parameters(other)[:, :geometry])
    assert changed[geometry:].float().mean() > 0.9
