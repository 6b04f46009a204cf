"""NVlabs StyleGAN2: the official vectors, and every variant against the networks of reference.py."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.models.generator import Generator
from tests.checkpoints.conftest import distance, draw
from tests.support.checkpoints import reference, writers
from tests.support.checkpoints.damage import DAMAGE
from tests.support.checkpoints.writers import reference_of_the_vectors, write_nvlabs
from tests.support.vectors import Vectors, vectors

pytestmark = pytest.mark.torch


IMAGE_TOLERANCE = 1e-5
FEATURE_TOLERANCE = 5e-5
Import = Callable[..., Generator]


@pytest.fixture(scope="module")
def official() -> Vectors:
    return vectors("stylegan2_64")


@pytest.fixture(scope="module")
def official_network() -> reference.Generator:
    return reference_of_the_vectors()


@torch.no_grad()
def test_the_reference_draws_what_the_official_code_draws(
    official: Vectors, official_network: reference.Generator
) -> None:
    image, features = official_network(torch.from_numpy(official["z"]).float(), psi=0.7)
    assert distance(image, official["img/psi0.7"]) <= IMAGE_TOLERANCE
    _, features = official_network(torch.from_numpy(official["z"][:1]).float())
    assert distance(features[64, "conv0"], official["feat/b64.conv0"]) <= FEATURE_TOLERANCE


@pytest.mark.parametrize("protocol", [3, 4])
def test_official_vectors(
    official: Vectors, official_network: reference.Generator, imported: Import, tmp_path: Path, protocol: int
) -> None:
    generator = imported(write_nvlabs(tmp_path / "network.pkl", official_network, protocol))
    z = torch.from_numpy(official["z"]).float()
    for psi in ("1", "0.7"):
        image, _ = draw(generator, z, float(psi), "paper")
        assert distance(image, official[f"img/psi{psi}"]) <= IMAGE_TOLERANCE
    _, features = draw(generator, z[:1], 1.0, "paper")
    for r, got in features.items():
        layers = [f"feat/b{r}.{name}" for name in ("conv0", "conv1") if f"feat/b{r}.{name}" in official]
        assert distance(got, np.concatenate([official[name] for name in layers], axis=1)) <= FEATURE_TOLERANCE


def compare(
    generator: Generator,
    network: reference.Generator,
    psi: float,
    classes: torch.Tensor | None = None,
    class_index: torch.Tensor | None = None,
) -> None:
    """Compare with what the network draws of `classes`; a generator that was imported whole needs the `class_index`."""
    z = torch.randn(2, network.z_dim, generator=torch.Generator().manual_seed(5))
    image, features = draw(generator, z, psi, "paper", class_index)
    with torch.no_grad():
        want, want_features = network.double()(z.double(), classes, psi)
        network.float()
    # Networks of random weights draw images far outside of [-1, 1].
    assert distance(image, want.float()) <= IMAGE_TOLERANCE * max(1.0, float(want.abs().max()))
    for r, got in features.items():
        layers = [want_features[r, name] for name in ("conv0", "conv1") if (r, name) in want_features]
        assert distance(got, torch.cat(layers, dim=1).float()) <= FEATURE_TOLERANCE


VARIANTS: dict[str, dict[str, Any]] = {
    "skip": {},
    "orig": {"architecture": "orig"},
    "resnet": {"architecture": "resnet"},
    "clamped": {"conv_clamp": 0.7},
    "clamped resnet": {"conv_clamp": 0.7, "architecture": "resnet"},
    "float16": {"fp16_from": 8, "conv_clamp": 256},
    "gray": {"img_channels": 1},
    "no noise": {"use_noise": False},
    "3 taps": {"filter": (1, 2, 1)},
    "5 taps": {"filter": (1, 4, 6, 4, 1), "architecture": "resnet"},
    "8 taps": {"filter": (1, 2, 3, 4, 4, 3, 2, 1), "architecture": "resnet"},
    "lopsided": {"filter": (1, 2, 3, 5)},
    "uneven taps": {"filter": (0.1, 0.37, 0.33, 0.2)},
    "narrow mapping": {"mapping": {"layer_features": 20, "num_layers": 4}},
    "one mapping layer": {"mapping": {"num_layers": 1, "lr_multiplier": 1.0}},
    "wide latents": {"z_dim": 40},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(imported: Import, tmp_path: Path, name: str) -> None:
    torch.manual_seed(sum(name.encode()))
    network = reference.Generator(**VARIANTS[name])
    generator = imported(write_nvlabs(tmp_path / "network.pkl", network))
    compare(generator, network, 1.0)
    compare(generator, network, 0.6)


def test_what_was_changed_is_noted(imported: Import, notes: Callable[[], dict], tmp_path: Path) -> None:
    network = reference.Generator(fp16_from=8, use_noise=False, mapping={"w_avg_beta": None})
    generator = imported(write_nvlabs(tmp_path / "network.pkl", network))
    said = notes()
    assert said["float16_resolutions_in_float32"] == [8, 16]
    assert said["layers_without_noise"][0] == "synthesis.blocks.4.conv1" and len(said["layers_without_noise"]) == 5
    assert said["average_latent"] == "measured"
    assert said["format"] == "nvlabs-stylegan2" and said["source"] == "network.pkl"
    # The measured average is that of many other latents, too.
    z = torch.randn(20_000, network.z_dim, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        w = network.mapping(z, None)
    assert distance(generator.mapping.w_avg, w.mean(dim=0)) < 0.05 * float(w.std())


@pytest.mark.parametrize("mapping", [{}, {"embed_features": 7}, {"num_layers": 1}, {"w_avg_beta": None}])
def test_each_class_of_a_conditional_generator(imported: Import, tmp_path: Path, mapping: dict) -> None:
    torch.manual_seed(4)
    network = reference.Generator(c_dim=5, mapping=mapping)
    path = write_nvlabs(tmp_path / "network.pkl", network)
    for class_index in (0, 3):
        generator = imported(path, class_index=class_index)
        classes = torch.eye(5, dtype=torch.float64)[[class_index] * 2]
        compare(generator, network, 1.0, classes)
        if "w_avg_beta" not in mapping:
            compare(generator, network, 0.5, classes)


@pytest.mark.parametrize("mapping", [{}, {"embed_features": 7}, {"num_layers": 1}, {"w_avg_beta": None}])
def test_a_conditional_generator_is_imported_whole(
    imported: Import, notes: Callable[[], dict], tmp_path: Path, mapping: dict
) -> None:
    torch.manual_seed(4)
    network = reference.Generator(c_dim=5, mapping=mapping)
    network.mapping.embed.weight_gain *= 2
    generator = imported(write_nvlabs(tmp_path / "network.pkl", network))
    assert generator.spec.generator_classes == ("class 0", "class 1", "class 2", "class 3", "class 4")
    assert "class_index" not in notes()
    for class_index in range(5):
        classes = torch.eye(5, dtype=torch.float64)[[class_index] * 2]
        drawn = torch.full((2, 1), class_index, dtype=torch.int32)
        compare(generator, network, 1.0, classes, drawn)
        if "w_avg_beta" not in mapping:
            compare(generator, network, 0.5, classes, drawn)
    if "w_avg_beta" in mapping:  # the measured average is that of other latents of all classes, too
        z = torch.randn(20_000, network.z_dim, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            w = network.mapping(z, torch.eye(5)[torch.arange(20_000) % 5])
        assert distance(generator.mapping.w_avg, w.mean(dim=0)) < 0.05 * float(w.std())


@pytest.mark.parametrize("content", ['["a", "b", "ö"]', '{"1": "b", "0": "a", "2": "ö"}'])
def test_names_of_classes(imported: Import, tmp_path: Path, content: str) -> None:
    path = write_nvlabs(tmp_path / "network.pkl", reference.Generator(c_dim=3))
    (tmp_path / "names.json").write_text(content)
    assert imported(path, class_names=tmp_path / "names.json").spec.generator_classes == ("a", "b", "ö")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('["a", "b"]', "class_names: the file names 2 classes; this generator has 3"),
        ('["a", "b", "a"]', r"names.json cannot be used: two generator classes have the name 'a'"),
        ('["a", "b", ""]', "names.json cannot be used: the name '' of a generator class is not a text"),
        ('["a", "b", 3]', "names.json cannot be read: .*name all classes in order"),
        ('{"0": "a", "1": "b", "3": "c"}', "names.json has 3 names, but none for class 2; name all classes in order"),
        ('"a"', "names.json cannot be read: .*name all classes in order"),
    ],
)
def test_names_that_do_not_fit(imported: Import, tmp_path: Path, content: str, problem: str) -> None:
    path = write_nvlabs(tmp_path / "network.pkl", reference.Generator(c_dim=3))
    (tmp_path / "names.json").write_text(content)
    with pytest.raises((InvalidRequest, UnusableFile), match=problem):
        imported(path, class_names=tmp_path / "names.json")
    assert not (tmp_path / "imported.safetensors").exists()


def test_options_of_classes_where_they_do_not_apply(imported: Import, tmp_path: Path) -> None:
    conditional = write_nvlabs(tmp_path / "conditional.pkl", reference.Generator(c_dim=5))
    (tmp_path / "names.json").write_text('["a"]')
    with pytest.raises(InvalidRequest, match="class_names: does not apply with --class-index"):
        imported(conditional, class_index=1, class_names=tmp_path / "names.json")
    with pytest.raises(InvalidRequest, match="class_names: this generator has no classes"):
        imported(write_nvlabs(tmp_path / "plain.pkl", reference.Generator()), class_names=tmp_path / "names.json")
    for index in (5, -1):
        with pytest.raises(InvalidRequest, match=f"class_index: .* from 0 to 4, not {index}"):
            imported(conditional, class_index=index)
    with pytest.raises(InvalidRequest, match="class_index: this generator has no classes"):
        imported(write_nvlabs(tmp_path / "plain.pkl", reference.Generator()), class_index=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(imported: Import, tmp_path: Path, name: str) -> None:
    damage, problem = DAMAGE[name]
    torch.manual_seed(1)
    network = reference.Generator(img_channels=4 if name == "four channels" else 3)
    if damage is not None:
        with torch.no_grad():
            damage(network)
    path = write_nvlabs(tmp_path / "network.pkl", network)
    with pytest.raises(UnusableFile, match=re.escape(problem)):
        imported(path)
    assert list(tmp_path.iterdir()) == [path]


class _TorchPickle:
    """`torch.save` with NVlabs' way of writing modules."""

    Pickler = writers._Pickler
    dump = staticmethod(pickle.dump)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("alone", [True, False])
def test_files_of_torch_save(imported: Import, tmp_path: Path, new_format: bool, protocol: int, alone: bool) -> None:
    network = reference.Generator()
    with writers.nvlabs_modules():
        torch.save(
            network if alone else {"G_ema": network},
            tmp_path / "network.pt",
            _TorchPickle,
            protocol,
            _use_new_zipfile_serialization=new_format,
        )
    compare(imported(tmp_path / "network.pt"), network, 1.0)


def test_a_bare_state_dict_is_named(imported: Import, tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": value for name, value in reference.Generator().state_dict().items()}
    torch.save(state, tmp_path / "network.pt")
    with pytest.raises(UnusableFile, match="bare state dict of an NVlabs generator.*import the network-snapshot"):
        imported(tmp_path / "network.pt")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_read(imported: Import, tmp_path: Path, dtype: torch.dtype) -> None:
    """Tensors without dimensions (the noise's strength) among them."""
    torch.manual_seed(6)
    network = reference.Generator().to(dtype)
    generator = imported(write_nvlabs(tmp_path / "network.pkl", network))
    ours, theirs = generator.synthesis.blocks["8"].conv1, network.synthesis.b8.conv1
    assert torch.equal(ours.noise_strength, theirs.noise_strength.float())
    assert torch.equal(ours.weight, theirs.weight.float())


def test_gains_decide_not_the_arguments(imported: Import, tmp_path: Path) -> None:
    """The same network written with other gains draws the same."""
    torch.manual_seed(2)
    network = reference.Generator()
    for layer in (network.synthesis.b8.torgb, network.synthesis.b8.conv0.affine, network.mapping.fc1):
        layer.weight_gain = layer.weight_gain * 4
        layer.weight.data /= 4
    network.mapping.fc1.bias_gain *= 2
    network.mapping.fc1.bias.data /= 2
    compare(imported(write_nvlabs(tmp_path / "network.pkl", network)), network, 1.0)
