"""Conditional generators: the mapping of the papers, what `synth` notes, and what `fit` makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.core.policy import latent_of
from labelmint.models.annotations import LabelClasses, write_masks
from labelmint.models.annotations.directory import read_drawn
from labelmint.models.draw import draw, synthesize
from labelmint.models.fit import fit_files
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.store import load_generator, read_notes, save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec
from tests.support.models import conditional_weights, small

pytestmark = pytest.mark.torch

NAMES = ("cat", "dog", "fox")
MASKS = LabelClasses(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))


def array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy().astype(np.float64)


def expected_w(generator: Generator, z: np.ndarray, class_index: int) -> np.ndarray:
    """The formulas, in float64: both halves of the input have a mean square of 1; a class is a one-hot vector."""
    mapping = generator.mapping
    one_hot = np.eye(len(NAMES))[class_index]
    embedded = array(mapping.embed.weight) @ one_hot / np.sqrt(len(NAMES)) + array(mapping.embed.bias)
    x = np.concatenate([half / np.sqrt(np.mean(half**2) + 1e-8) for half in (z, embedded)])
    for layer in mapping.layers:
        rate = generator.spec.mapping_lr_multiplier
        x = array(layer.weight) @ x * rate / np.sqrt(len(x)) + array(layer.bias) * rate
        x = np.where(x < 0, 0.2 * x, x) * np.sqrt(2.0)
    return x


@pytest.fixture
def generator() -> Generator:
    generator, _ = conditional_weights(NAMES)
    torch.manual_seed(7)
    torch.nn.init.normal_(generator.mapping.embed.bias)
    return generator


@torch.no_grad()
def test_the_mapping_is_that_of_the_papers(generator: Generator) -> None:
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    for class_index in range(3):
        w = generator.mapping(z, torch.full((3, 1), class_index, dtype=torch.int32))
        for row, latent in zip(w, array(z), strict=True):
            np.testing.assert_allclose(row, expected_w(generator, latent, class_index), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_both_latents_of_a_mixed_sample_have_the_class(generator: Generator) -> None:
    """With the same latent twice, mixing changes nothing, at any truncation."""
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    classes, psi = torch.tensor([[2], [1]], dtype=torch.int32), torch.tensor([[0.5], [1.0]])
    mixed, unmixed = (
        generator(z, z, torch.full((2, 1), crossover, dtype=torch.int32), psi, "paper", classes)[0]
        for crossover in (3, 6)
    )
    assert torch.equal(mixed, unmixed)


@torch.no_grad()
def test_psi_0_is_one_image_for_all_classes(generator: Generator) -> None:
    images = [draw(generator, seed, 0.0, layout="paper", class_index=seed)[0] for seed in range(3)]
    torch.testing.assert_close(images[0], images[1])
    torch.testing.assert_close(images[0], images[2])


@torch.no_grad()
def test_an_index_that_is_no_class_gives_no_numbers(generator: Generator) -> None:
    z = torch.randn(4, 16)
    w = generator.mapping(z, torch.tensor([[-1], [2], [3], [2**31 - 1]], dtype=torch.int32))
    assert torch.isnan(w).all(dim=1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("class_index", [None, -1, 3])
def test_a_class_that_the_generator_lacks(generator: Generator, class_index: int | None) -> None:
    with pytest.raises(InvalidRequest, match="class_index: this generator draws classes; give one from 0 to 2, "):
        draw(generator, 1, 1.0, layout="paper", class_index=class_index)
    with pytest.raises(InvalidRequest, match="class_index: this generator has no classes; omit class_index"):
        draw(small()[0], 1, 1.0, layout="paper", class_index=0)


def test_what_is_saved_is_read_again(generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator, {})
    loaded = load_generator(path)
    assert loaded.spec == generator.spec and loaded.spec.generator_classes == NAMES
    for class_index in range(3):
        one, other = (draw(each, 5, 0.7, layout="paper", class_index=class_index)[0] for each in (generator, loaded))
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("names", "width", "problem"),
    [
        (("a", "a"), 8, "two generator classes have the name 'a'"),
        (("a", ""), 8, "is not a text of 1 to 200 printable characters"),
        (("a", "b\n"), 8, "is not a text of 1 to 200 printable characters"),
        (("a", 3), 8, "the name 3 of a generator class is not a text"),
        (("x" * 201,), 8, "is not a text of 1 to 200"),
        (("a",), 0, "1 generator classes do not go with an embedding_width of 0"),
        ((), 8, "0 generator classes do not go with an embedding_width of 8"),
        (tuple(map(str, range((1 << 15) + 1))), 8, "at most 32768 classes, not 32769"),
    ],
)
def test_classes_that_cannot_be(names: tuple[str, ...], width: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        StyleGAN2Spec(8, 8, 2, 8, {4: 4, 8: 4}, generator_classes=names, embedding_width=width)


def annotated(tmp_path: Path, generator: Generator, class_indices: list[int] | None) -> tuple[Path, Path]:
    """A generator's file, and six images of its classes with masks."""
    path, directory = tmp_path / "generator.safetensors", tmp_path / "annotations"
    save_generator(path, generator, {})
    synthesize(path, directory, range(6), truncation_psi=0.7, class_indices=class_indices)
    images = read_drawn(directory).images
    masks = {seed: (image.mean(axis=2) > 127).astype(np.uint8) for seed, image in images.items()}
    write_masks(directory, MASKS, masks)
    return path, directory


def fitted(path: Path, directory: Path) -> Path:
    out = directory.parent / "interpreter.safetensors"
    fit_files(path, directory, out, layout="paper", heads=2, steps=5)
    return out


def test_the_images_have_the_classes_in_turn_and_fit_draws_them_again(
    generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, directory = annotated(tmp_path, generator, [2, 0])
    assert "6 images of seeds 0 to 5 of class 2, 0 in turn, ready" in capsys.readouterr().out
    drawn = read_drawn(directory)
    assert drawn.class_indices == {0: 2, 1: 0, 2: 2, 3: 0, 4: 2, 5: 0}
    for seed, image in drawn.images.items():
        z = torch.from_numpy(latent_of(seed, 16))
        classes = torch.tensor([[drawn.class_indices[seed]]], dtype=torch.int32)
        with torch.no_grad():
            want, _ = generator(z, z, torch.tensor([[6]], dtype=torch.int32), torch.tensor([[0.7]]), "paper", classes)
        assert np.array_equal(image, to_uint8(want)[0].numpy())
    notes = read_notes(fitted(path, directory))
    assert notes["seeds"] == list(range(6)) and notes["class_indices"] == [2, 0, 2, 0, 2, 0]


def test_an_image_of_another_class_is_not_fitted(generator: Generator, tmp_path: Path) -> None:
    path, directory = annotated(tmp_path, generator, [2, 0])
    described = json.loads((directory / "dataset.json").read_text())
    described["class_indices"][3] = 1
    (directory / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UnusableFile, match=r"0000000003.png.* is not the image that .* makes for seed 3 and class 1"):
        fitted(path, directory)


@pytest.mark.parametrize(
    ("class_indices", "problem"),
    [
        ([], "dataset.json.* does not fit the generator .*0 to 2, none was given.*labelmint synth"),
        ([0, 1, 2, 0, 1, 3], "dataset.json.* does not fit the generator .*0 to 2, not 3"),
        ([0, 1], "dataset.json.* has 6 seeds but 2 class_indices"),
        ([0, 1, 2, 0, 1, -1], "dataset.json.* cannot be read: class_indices.5"),
    ],
)
def test_a_directory_whose_classes_do_not_fit(
    generator: Generator, tmp_path: Path, class_indices: list[int], problem: str
) -> None:
    path, directory = annotated(tmp_path, generator, [2, 0])
    described = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps(described | {"class_indices": class_indices}))
    with pytest.raises(UnusableFile, match=problem):
        fitted(path, directory)


def test_a_directory_without_classes_keeps_its_bytes(tmp_path: Path) -> None:
    _, directory = annotated(tmp_path, small()[0], None)
    assert set(json.loads((directory / "dataset.json").read_text())) == {"generator_sha256", "truncation_psi", "seeds"}


@pytest.mark.parametrize(
    ("class_indices", "problem"),
    [
        (None, "0 to 2, none was given"),
        ([0, 3], "0 to 2, not 3"),
        ([0, 1, 2, 0, 1], "5 classes need more than 4 images"),
    ],
)
def test_synth_of_classes_that_cannot_be(
    generator: Generator, tmp_path: Path, class_indices: list[int] | None, problem: str
) -> None:
    save_generator(tmp_path / "g.safetensors", generator, {})
    with pytest.raises(InvalidRequest, match=problem):
        synthesize(
            tmp_path / "g.safetensors", tmp_path / "out", range(4), truncation_psi=1.0, class_indices=class_indices
        )
    assert not (tmp_path / "out").exists()
