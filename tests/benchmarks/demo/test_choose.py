"""The choice of the images to annotate: rare parts occur in it, and the images differ."""

import pytest
import torch
from demo import choose, faces, metrics

pytestmark = pytest.mark.torch


def test_rare_parts_occur_three_times_where_there_are_as_many() -> None:
    latents = torch.randn(80, faces.Z_DIM, generator=torch.Generator().manual_seed(21))
    visible = torch.stack([metrics.areas(faces.render(z).label) >= choose.VISIBLE for z in latents.split(1)])  # [N,K]
    chosen = choose.choose(latents, 16)
    assert chosen == sorted(set(chosen)) and len(chosen) == 16
    for name in faces.RARE_PARTS:
        has = visible[:, faces.CLASS_NAMES.index(name)]
        assert has[chosen].sum() >= min(3, int(has.sum())), name


def test_the_chosen_differ_more_than_chance_would_have_it() -> None:
    latents = torch.randn(60, faces.Z_DIM, generator=torch.Generator().manual_seed(22))
    parameters = choose.scene_parameters(latents)
    place = (parameters - parameters.mean(dim=0)) / parameters.std(dim=0).clamp(min=1e-6)

    def nearest(rows: list[int]) -> float:
        distance = torch.cdist(place[rows], place[rows]).fill_diagonal_(float("inf"))
        return float(distance.amin(dim=1).mean())

    assert nearest(choose.choose(latents, 8)) > nearest(list(range(8)))
