"""The choice of the images to annotate: rare parts occur in it, and it does not depend on the order of chance."""

import pytest
import torch
from demo import choose, faces, metrics

pytestmark = pytest.mark.torch


def test_rare_parts_occur_three_times_where_there_are_as_many() -> None:
    latents = torch.randn(80, faces.Z_DIM, generator=torch.Generator().manual_seed(21))
    visible = torch.stack([choose._areas(z) >= choose.VISIBLE for z in latents.split(1)])  # [N,K]
    chosen = choose.choose(latents, 16)
    assert chosen == sorted(set(chosen)) and len(chosen) == 16
    share = visible.float().mean(dim=0)
    rare = [k for k in range(metrics.NUM_CLASSES) if 0.0 < share[k] < metrics.RARE]
    assert {"glasses", "beard", "hat", "earring"} <= {faces.CLASS_NAMES[k] for k in rare}
    for k in rare:
        assert visible[chosen, k].sum() >= min(3, int(visible[:, k].sum())), faces.CLASS_NAMES[k]


def test_the_chosen_differ_more_than_chance_would_have_it() -> None:
    latents = torch.randn(60, faces.Z_DIM, generator=torch.Generator().manual_seed(22))
    parameters = choose.scene_parameters(latents)
    place = (parameters - parameters.mean(dim=0)) / parameters.std(dim=0).clamp(min=1e-6)

    def nearest(rows: list[int]) -> float:
        distance = torch.cdist(place[rows], place[rows]).fill_diagonal_(float("inf"))
        return float(distance.amin(dim=1).mean())

    assert nearest(choose.choose(latents, 8)) > nearest(list(range(8)))
