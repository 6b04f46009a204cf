"""The generator against vectors that the official code computed (tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.models.generator import Generator, to_uint8
from labelmint.models.stylegan2 import StyleGAN2Spec

pytestmark = pytest.mark.torch


IMAGE_TOLERANCE = 1e-5
FEATURE_TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent.parent / "data" / "stylegan2_64.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def generator(vectors: dict[str, np.ndarray]) -> Generator:
    channels = {r: len(vectors[f"param/synthesis.b{r}.conv1.bias"]) for r in (4, 8, 16, 32, 64)}
    built = Generator(StyleGAN2Spec(z_dim=64, w_dim=64, mapping_layers=8, resolution=64, channels=channels))
    state = {}
    for key, value in vectors.items():
        if key.startswith("param/") and not key.endswith("resample_filter"):
            state[our_name(key.removeprefix("param/"))] = torch.from_numpy(value)
    built.load_state_dict(state)  # strict: nothing missing, nothing left over
    return built.eval()


def our_name(official: str) -> str:
    part = official.split(".")
    if part[0] == "mapping":
        return official if part[1] == "w_avg" else f"mapping.layers.{part[1].removeprefix('fc')}.{part[2]}"
    if part[2] == "const":
        return "synthesis.const"
    rest = ".".join(part[2:]).replace("torgb", "to_rgb")
    return f"synthesis.blocks.{part[1].removeprefix('b')}.{rest}"


def assert_close(got: torch.Tensor, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got - torch.from_numpy(want)).abs().max()) <= tolerance


@torch.no_grad()
def inputs(generator: Generator, vectors: dict[str, np.ndarray], psi: float) -> tuple[torch.Tensor, ...]:
    z = torch.from_numpy(vectors["z"]).float()
    crossover = torch.full((len(z), 1), generator.spec.num_ws, dtype=torch.int32)
    return z, z, crossover, torch.full((len(z), 1), psi)


@pytest.mark.parametrize("psi", ["1", "0.7"])
@torch.no_grad()
def test_images_and_latents(generator: Generator, vectors: dict[str, np.ndarray], psi: str) -> None:
    z, _, crossover, truncation = inputs(generator, vectors, float(psi))
    w = generator.mapping.truncate(generator.mapping(z), truncation)
    assert_close(w[:, None].expand(-1, generator.spec.num_ws, -1), vectors[f"w/psi{psi}"], IMAGE_TOLERANCE)
    image, _ = generator(z, z, crossover, truncation, "paper")
    assert_close(image, vectors[f"img/psi{psi}"], IMAGE_TOLERANCE)


@torch.no_grad()
def test_features_in_the_order_of_the_layout(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    z, style, crossover, psi = (tensor[:1] for tensor in inputs(generator, vectors, 1.0))
    _, features = generator(z, style, crossover, psi, "paper")
    assert list(features) == [4, 8, 16, 32, 64]
    for r, got in features.items():
        layers = [f"feat/b{r}.{name}" for name in ("conv0", "conv1") if f"feat/b{r}.{name}" in vectors]
        want = np.concatenate([vectors[name] for name in layers], axis=1)
        assert_close(got, want, FEATURE_TOLERANCE)


@torch.no_grad()
def test_editgan_layout_adds_the_constant(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    arguments = tuple(tensor[:1] for tensor in inputs(generator, vectors, 1.0))
    _, paper = generator(*arguments, "paper")
    _, editgan = generator(*arguments, "editgan-stylegan2")
    torch.testing.assert_close(editgan[4], torch.cat([generator.synthesis.const[None], paper[4]], dim=1))
    with pytest.raises(ValueError, match=r"unknown feature layout 'papre'; known: paper, editgan-stylegan2"):
        generator(*arguments, "papre")


@torch.no_grad()
def test_truncation_cutoff(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    z = torch.from_numpy(vectors["z"][:1]).float()
    w = generator.mapping(z)
    below = torch.arange(generator.spec.num_ws)[None, :, None] < 4
    ws = torch.where(below, generator.mapping.truncate(w, 0.5)[:, None], w[:, None])
    assert_close(ws, vectors["extra/ws_psi0.5_cutoff4"], IMAGE_TOLERANCE)
    image, _ = generator.synthesis(ws, None)
    assert_close(image, vectors["extra/img_psi0.5_cutoff4"], IMAGE_TOLERANCE)


@torch.no_grad()
def test_style_mixing_by_crossover(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    """The reference takes layers 0 to 3 from seed 1 and the others from seed 0: a crossover at layer 4."""
    z = torch.from_numpy(vectors["z"]).float()
    seeds = list(vectors["seeds"])
    first, second = z[seeds.index(0)][None], z[seeds.index(1)][None]
    crossover = torch.tensor([[4]], dtype=torch.int32)
    image, _ = generator(second, first, crossover, torch.ones(1, 1), "paper")
    assert_close(image, vectors["extra/img_mix_row0_col1_styles0-3"], IMAGE_TOLERANCE)


@torch.no_grad()
def test_without_noise(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    strengths = {name: p.clone() for name, p in generator.named_parameters() if name.endswith("noise_strength")}
    try:
        for name, parameter in generator.named_parameters():
            if name in strengths:
                parameter.zero_()
        image, _ = generator(*(tensor[:1] for tensor in inputs(generator, vectors, 1.0)), "paper")
        assert_close(image, vectors["extra/img_noise_none"], IMAGE_TOLERANCE)
    finally:
        for name, parameter in generator.named_parameters():
            if name in strengths:
                parameter.copy_(strengths[name])


@torch.no_grad()
def test_uint8_truncates_as_the_official_scripts_do(vectors: dict[str, np.ndarray]) -> None:
    got = to_uint8(torch.from_numpy(vectors["img/psi1"])).numpy()
    np.testing.assert_array_equal(got, vectors["extra/uint8_psi1"])


def test_spec_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="power of two of at least 8, not 48"):
        StyleGAN2Spec(8, 8, 2, 48, {4: 8})
    with pytest.raises(ValueError, match=r"resolutions \[4, 8\], not \[4\]"):
        StyleGAN2Spec(8, 8, 2, 8, {4: 8})
