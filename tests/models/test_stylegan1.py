"""The StyleGAN1 generator against vectors that DatasetGAN's released code computed (tests/data/README.md)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.models.generator import Generator
from labelmint.models.layout import channels_of
from labelmint.models.stylegan1 import StyleGAN1Spec

pytestmark = pytest.mark.torch


# Of the largest value, 4.2. The reference itself stands 4e-6 from a double-precision run of the same network.
IMAGE_TOLERANCE = 5e-6
FEATURE_TOLERANCE = 1e-4
LEVELS = (4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent.parent / "data" / "stylegan1_128.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def generator(vectors: dict[str, np.ndarray]) -> Generator:
    """The synthesis of the vectors; their mapping is another one, tested apart."""
    channels = {r: len(vectors[f"param/g_synthesis.blocks.{r}x{r}.epi2.top_epi.noise.weight"]) for r in LEVELS}
    built = Generator(StyleGAN1Spec(z_dim=8, w_dim=64, mapping_layers=1, resolution=128, channels=channels))
    state = {name: value for name, value in built.state_dict().items() if name.startswith("mapping.")}
    for key, value in vectors.items():
        if key.startswith("param/") and not key.endswith("kernel"):
            state[our_name(key.removeprefix("param/g_synthesis."))] = torch.from_numpy(value).squeeze(0)
        elif key.startswith("noise/"):
            name = our_name(key.removeprefix("noise/")).replace("noise_strength", "noise_const")
            state[name] = torch.from_numpy(value[0, 0])
    state["synthesis.to_rgb.weight"] = torch.from_numpy(vectors["param/g_synthesis.torgb.weight"])
    built.load_state_dict(state)  # strict: nothing missing, nothing left over
    return built.eval()


def our_name(official: str) -> str:
    part = official.split(".")
    if part[0] == "torgb":
        return f"synthesis.to_rgb.{part[1]}"
    r = part[1].split("x")[0]
    if part[2] in ("const", "bias"):
        return f"synthesis.{'const' if part[2] == 'const' else 'const_bias'}"
    if part[2].startswith("epi"):
        epilogue = f"synthesis.blocks.{r}.epilogue{int(part[2][3]) - 1}"
        return f"{epilogue}.noise_strength" if part[3] == "top_epi" else f"{epilogue}.affine.{part[5]}"
    conv = {"conv0_up": "conv0", "conv": "conv1", "conv1": "conv1"}[part[2]]
    return f"synthesis.blocks.{r}.{conv}.{part[3]}"


@torch.no_grad()
def test_images(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    image, _ = generator.synthesis(torch.from_numpy(vectors["ws"]), None)
    want = torch.from_numpy(vectors["img"])
    assert float((image - want).abs().max() / want.abs().max()) <= IMAGE_TOLERANCE


@torch.no_grad()
def test_features_in_the_order_of_the_released_code(generator: Generator, vectors: dict[str, np.ndarray]) -> None:
    _, features = generator.synthesis(torch.from_numpy(vectors["ws"][:1]), "release-stylegan1")
    assert {r: x.shape[1] for r, x in features.items()} == channels_of("release-stylegan1", generator.spec.taps)
    assert sum(x.shape[1] for x in features.values()) == 352
    for index, r in enumerate(LEVELS):
        want = np.concatenate([vectors[f"feat/{2 * index:02d}"], vectors[f"feat/{2 * index + 1:02d}"]], axis=1)
        assert float((features[r] - torch.from_numpy(want)).abs().max()) <= FEATURE_TOLERANCE


@torch.no_grad()
def test_mapping_and_truncation(vectors: dict[str, np.ndarray]) -> None:
    """The port's mapping has its gain before the activation: ours with biases divided by sqrt 2."""
    spec = StyleGAN1Spec(
        z_dim=512,
        w_dim=512,
        mapping_layers=8,
        resolution=1024,
        channels={2**i: 1 for i in range(2, 11)},
        truncation_cutoff=8,
    )
    generator = Generator(spec).eval()
    for index, layer in enumerate(generator.mapping.layers):
        rng = np.random.RandomState(100 + index)
        layer.weight.copy_(torch.from_numpy((rng.randn(512, 512) * 100).astype(np.float32)))
        layer.bias.copy_(torch.from_numpy((rng.randn(512) * 20).astype(np.float32)) / math.sqrt(2.0))
    z = torch.from_numpy(vectors["mapping/z"]).float()
    w = generator.mapping(z)
    torch.testing.assert_close(w, torch.from_numpy(vectors["mapping/w"]), rtol=1e-5, atol=1e-5)
    generator.mapping.w_avg.copy_(torch.from_numpy(vectors["mapping/avg_latent"]))
    seen = []
    generator.synthesis.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    crossover = torch.tensor([[spec.num_ws]], dtype=torch.int32)
    generator(z[:1], z[:1], crossover, torch.tensor([[0.7]]), "paper")
    want = torch.from_numpy(vectors["mapping/trunc_max_layer8_psi0.7_seed0"])
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)


def test_layouts_of_the_other_architecture_are_refused(generator: Generator) -> None:
    with pytest.raises(
        ValueError, match=r"'editgan-stylegan2' reads the layers const, conv0, conv1; this generator has adain0"
    ):
        channels_of("editgan-stylegan2", generator.spec.taps)
