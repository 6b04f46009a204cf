"""rosinality StyleGAN2: the official vectors, training files, and damage."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.core.errors import UnusableFile
from labelmint.models.generator import Generator
from tests.checkpoints.conftest import distance, draw
from tests.support.vectors import Vectors, vectors

pytestmark = pytest.mark.torch


IMAGE_TOLERANCE = 1e-5
FEATURE_TOLERANCE = 5e-5
Import = Callable[..., Generator]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def official() -> Vectors:
    return vectors("rosinality_64")


@pytest.fixture
def state(official: Vectors) -> State:
    names = [name for name in official if name.startswith("param/")]
    return {name.removeprefix("param/"): torch.from_numpy(official[name].copy()) for name in names}


@pytest.mark.parametrize("new_format", [True, False])
def test_official_vectors(
    official: Vectors, state: State, imported: Import, notes: Callable[[], dict], tmp_path: Path, new_format: bool
) -> None:
    content = {"g_ema": state, "latent_avg": torch.from_numpy(official["latent_avg"])}
    torch.save(content, tmp_path / "network.pt", _use_new_zipfile_serialization=new_format)
    generator = imported(tmp_path / "network.pt")
    assert notes()["noise"] == "file" and notes()["average_latent"] == "file"
    z = torch.from_numpy(official["z"])
    for psi in ("1", "0.7"):
        image, _ = draw(generator, z, float(psi), "paper")
        assert distance(image, official[f"img/psi{psi}"]) <= IMAGE_TOLERANCE
    _, features = draw(generator, z[list(official["seeds"]).index(0)][None], 1.0, "paper")
    for index, (r, got) in enumerate(features.items()):
        layers = ["conv1"] if r == 4 else [f"convs.{2 * index - 2}", f"convs.{2 * index - 1}"]
        want = np.concatenate([official[f"feat/{name}"] for name in layers], axis=1)
        assert distance(got, want) <= FEATURE_TOLERANCE


@torch.no_grad()
def test_style_mixing(official: Vectors, state: State, imported: Import, tmp_path: Path) -> None:
    torch.save({"g_ema": state, "latent_avg": torch.from_numpy(official["latent_avg"])}, tmp_path / "network.pt")
    generator = imported(tmp_path / "network.pt")
    seeds = list(official["seeds"])
    first, second = (torch.from_numpy(official["z"][seeds.index(seed)][None]) for seed in (0, 1))
    image, _ = generator(first, second, torch.tensor([[4]], dtype=torch.int32), torch.ones(1, 1), "paper")
    assert distance(image, official["extra/img_mix_inject4"]) <= IMAGE_TOLERANCE


def test_training_file(
    official: Vectors, state: State, imported: Import, notes: Callable[[], dict], tmp_path: Path
) -> None:
    """Both networks, both optimizers, the command line, and no average latent."""
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.0, 0.99))
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "g": state,
        "d": network.state_dict(),
        "g_ema": state,
        "g_optim": optimizer.state_dict(),
        "d_optim": optimizer.state_dict(),
        "args": argparse.Namespace(size=64, path="data", wandb=False, betas=[0.0, 0.99]),
        "ada_aug_p": 0.25,
    }
    torch.save(content, tmp_path / "training.pt")
    generator = imported(tmp_path / "training.pt", "rosinality-stylegan2")
    assert notes()["average_latent"] == "measured"
    image, _ = draw(generator, torch.from_numpy(official["z"]), 1.0, "paper")
    assert distance(image, official["img/psi1"]) <= IMAGE_TOLERANCE
    z = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        w = generator.mapping(z)
    assert distance(generator.mapping.w_avg, w.mean(dim=0)) < 0.05 * float(w.std())


def test_file_without_noise_gets_the_same_noise_each_time(
    state: State, imported: Import, notes: Callable[[], dict], tmp_path: Path
) -> None:
    torch.save({"g_ema": {k: v for k, v in state.items() if not k.startswith("noises.")}}, tmp_path / "old.pt")
    first, again = imported(tmp_path / "old.pt"), imported(tmp_path / "old.pt")
    assert notes()["noise"] == "drawn"
    noise = first.synthesis.blocks["8"].conv1.noise_const
    assert torch.equal(noise, again.synthesis.blocks["8"].conv1.noise_const)
    assert 0.7 < float(noise.std()) < 1.3 and not torch.equal(noise, first.synthesis.blocks["8"].conv0.noise_const)


def test_half_precision_is_read(state: State, imported: Import, tmp_path: Path) -> None:
    torch.save({"g_ema": {name: value.half() for name, value in state.items()}}, tmp_path / "half.pt")
    got = imported(tmp_path / "half.pt").synthesis.const
    assert torch.equal(got.detach(), state["input.input"].half().float()[0])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda s: s.pop("convs.3.noise.weight"), "lacks the tensor convs.3.noise.weight"),
        (lambda s: s.pop("convs.7.conv.weight"), "lacks the tensor convs.7.conv.weight"),
        (lambda s: s.pop("noises.noise_3"), "lacks the tensor noises.noise_3"),
        (lambda s: s.pop("style.1.weight"), "lacks the tensor style.1.weight"),
        (lambda s: s.pop("input.input"), "lacks the tensor input.input"),
        (lambda s: s.pop("to_rgbs.2.upsample.kernel"), "lacks the tensor to_rgbs.2.upsample.kernel"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected tensor extra"),
        (
            lambda s: s.update({"style.8.weight": torch.ones(64, 65)}),
            "style.8.weight of shape (64, 65), expected (64, 64)",
        ),
        (lambda s: s.update({"input.input": torch.ones(2, 64, 4, 4)}), "input.input of shape (2, 64, 4, 4), expected"),
        (
            lambda s: s.update({"noises.noise_0": torch.ones(1, 1, 8, 8)}),
            "noises.noise_0 of shape (1, 1, 8, 8), expected",
        ),
        (lambda s: s.update({"input.input": [1.0]}), "input.input that is not a tensor"),
        (lambda s: s["convs.2.conv.blur.kernel"].fill_(0.25), "a different filter in convs.2.conv.blur.kernel than in"),
        (lambda s: s["convs.2.conv.blur.kernel"].mul_(0.5), "not a separable filter of sum 4"),
        (lambda s: s["convs.2.activate.bias"].fill_(torch.inf), "NaN or infinity in convs.2.activate.bias"),
    ],
)
def test_damage_is_named(
    state: State, imported: Import, tmp_path: Path, damage: Callable[[State], object], problem: str
) -> None:
    damage(state)
    torch.save({"g_ema": state}, tmp_path / "network.pt")
    with pytest.raises(UnusableFile, match=re.escape(problem)):
        imported(tmp_path / "network.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt"]


def test_average_latent_of_another_size(state: State, imported: Import, tmp_path: Path) -> None:
    torch.save({"g_ema": state, "latent_avg": torch.zeros(63)}, tmp_path / "network.pt")
    with pytest.raises(UnusableFile, match=r"latent_avg of shape \(63,\), expected \(64,\)"):
        imported(tmp_path / "network.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bare", [True, False])
def test_wrappers_and_bare_states_are_read(
    state: State, imported: Import, tmp_path: Path, prefix: str, bare: bool
) -> None:
    wrapped = {prefix + name: value for name, value in state.items()}
    torch.save(wrapped if bare else {"g_ema": wrapped}, tmp_path / "network.pt", pickle_protocol=5)
    assert torch.equal(imported(tmp_path / "network.pt").synthesis.const.detach(), state["input.input"][0])


def test_average_latent_of_one_row(state: State, imported: Import, tmp_path: Path) -> None:
    average = torch.randn(1, 64)
    torch.save({"g_ema": state, "latent_avg": average}, tmp_path / "network.pt")
    assert torch.equal(imported(tmp_path / "network.pt").mapping.w_avg, average[0])
