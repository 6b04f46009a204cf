"""StyleGAN1 files of DatasetGAN: the official vectors, the average latent beside the file, and damage."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.models.generator import Generator
from tests.checkpoints.conftest import distance, draw
from tests.support.vectors import Vectors, vectors

pytestmark = pytest.mark.torch


# Of the largest value, 4.2: see tests/models/test_stylegan1.py.
IMAGE_TOLERANCE = 5e-6
FEATURE_TOLERANCE = 1e-4
Import = Callable[..., Generator]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def official() -> Vectors:
    return vectors("stylegan1_128")


@pytest.fixture
def state(official: Vectors) -> State:
    """The synthesis of the vectors and, since theirs is of another width, some mapping."""
    names = [name for name in official if name.startswith("param/")]
    state = {name.removeprefix("param/"): torch.from_numpy(official[name].copy()) for name in names}
    rng = torch.Generator().manual_seed(1)
    for index in range(8):
        state[f"g_mapping.dense{index}.weight"] = torch.randn(64, 64, generator=rng) * 100
        state[f"g_mapping.dense{index}.bias"] = torch.randn(64, generator=rng) * 20
    return state


@pytest.fixture
def average(tmp_path: Path) -> Path:
    np.save(tmp_path / "average.npy", np.linspace(-1, 1, 64))
    return tmp_path / "average.npy"


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_official_synthesis(
    official: Vectors, state: State, imported: Import, tmp_path: Path, average: Path, wrapped: bool
) -> None:
    path = tmp_path / "karras2019stylegan.for_g_all.pt"
    torch.save({"g_all": state} if wrapped else state, path, _use_new_zipfile_serialization=wrapped)
    generator = imported(path, average_latent=average)
    # The vectors' noise in place of the importer's.
    for name, value in official.items():
        if name.startswith("noise/"):
            _, r, epilogue = name.removeprefix("noise/").split(".")[:3]
            block = generator.synthesis.blocks[r.split("x")[0]]
            getattr(block, f"epilogue{int(epilogue[3]) - 1}").noise_const.copy_(torch.from_numpy(value[0, 0]))
    image, _ = generator.synthesis(torch.from_numpy(official["ws"]), None)
    assert distance(image, official["img"]) <= IMAGE_TOLERANCE * float(np.abs(official["img"]).max())
    _, features = generator.synthesis(torch.from_numpy(official["ws"][:1]), "release-stylegan1")
    for index, got in enumerate(features.values()):
        want = np.concatenate([official[f"feat/{2 * index:02d}"], official[f"feat/{2 * index + 1:02d}"]], axis=1)
        assert distance(got, want) <= FEATURE_TOLERANCE


@torch.no_grad()
def test_official_mapping_and_truncation(official: Vectors, imported: Import, tmp_path: Path) -> None:
    """The vectors' mapping of 512 before a synthesis of 8 pixels; 4 layers, all of them truncated."""
    state: State = {}
    for index in range(8):
        rng = np.random.RandomState(100 + index)
        state[f"g_mapping.dense{index}.weight"] = torch.from_numpy((rng.randn(512, 512) * 100).astype(np.float32))
        state[f"g_mapping.dense{index}.bias"] = torch.from_numpy((rng.randn(512) * 20).astype(np.float32))
    state |= small_synthesis(512)
    torch.save(state, tmp_path / "network.pt")
    np.save(tmp_path / "average.npy", np.tile(official["mapping/avg_latent"], (18, 1)))
    generator = imported(tmp_path / "network.pt", average_latent=tmp_path / "average.npy")
    z = torch.from_numpy(official["mapping/z"]).float()
    torch.testing.assert_close(generator.mapping(z), torch.from_numpy(official["mapping/w"]), rtol=1e-5, atol=1e-5)
    seen = []
    generator.synthesis.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    draw(generator, z[:1], 0.7, "release-stylegan1")
    want = torch.from_numpy(official["mapping/trunc_max_layer8_psi0.7_seed0"])[:, :4]
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)


def small_synthesis(w_dim: int, resolution: int = 8) -> State:
    rng = torch.Generator().manual_seed(2)

    def block(name: str, second: str) -> State:
        tensors = {f"{name}.{second}.weight": (2, 2, 3, 3), f"{name}.{second}.bias": (2,)}
        for epilogue in ("epi1", "epi2"):
            tensors[f"{name}.{epilogue}.top_epi.noise.weight"] = (2,)
            tensors[f"{name}.{epilogue}.style_mod.lin.weight"] = (4, w_dim)
            tensors[f"{name}.{epilogue}.style_mod.lin.bias"] = (4,)
        return {key: torch.randn(shape, generator=rng) for key, shape in tensors.items()}

    state = block("g_synthesis.blocks.4x4", "conv")
    state["g_synthesis.blocks.4x4.const"] = torch.ones(1, 2, 4, 4)
    state["g_synthesis.blocks.4x4.bias"] = torch.ones(2)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    r = 8
    while r <= resolution:
        state |= block(f"g_synthesis.blocks.{r}x{r}", "conv1")
        up = f"g_synthesis.blocks.{r}x{r}.conv0_up"
        state[f"{up}.weight"], state[f"{up}.bias"] = torch.ones(2, 2, 3, 3), torch.ones(2)
        state[f"{up}.intermediate.kernel"] = (kernel[:, None] * kernel / 16)[None, None]
        r *= 2
    return state | {"g_synthesis.torgb.weight": torch.ones(3, 2, 1, 1), "g_synthesis.torgb.bias": torch.zeros(3)}


def test_noise_is_the_same_each_time_and_noted(
    state: State, imported: Import, notes: Callable[[], dict], tmp_path: Path, average: Path
) -> None:
    torch.save(state, tmp_path / "network.pt")
    first, again = (imported(tmp_path / "network.pt", average_latent=average) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    noise = first.synthesis.blocks["64"].epilogue1.noise_const
    assert 0.9 < float(noise.std()) < 1.1
    assert notes()["noise"] == "drawn" and notes()["average_latent"] == "average.npy"
    assert torch.equal(first.mapping.w_avg, torch.linspace(-1, 1, 64, dtype=torch.float64).float())


@pytest.mark.parametrize(("resolution", "cutoff"), [(8, 8), (128, 8), (256, 7)])
def test_truncation_is_that_of_datasetgan(
    imported: Import, tmp_path: Path, average: Path, resolution: int, cutoff: int
) -> None:
    state = small_synthesis(64, resolution)
    state |= {"g_mapping.dense0.weight": torch.ones(64, 64), "g_mapping.dense0.bias": torch.ones(64)}
    torch.save(state, tmp_path / "network.pt")
    generator = imported(tmp_path / "network.pt", average_latent=average)
    assert generator.spec.resolution == resolution and generator.spec.truncation_cutoff == cutoff


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda s: s.pop("g_synthesis.torgb.bias"), "lacks the tensor g_synthesis.torgb.bias"),
        (lambda s: s.pop("g_mapping.dense0.weight"), "lacks the tensor g_mapping.dense0.weight"),
        (lambda s: s.pop("g_mapping.dense7.bias"), "lacks the tensor g_mapping.dense7.bias"),
        (lambda s: s.pop("g_synthesis.blocks.4x4.const"), "lacks the tensor g_synthesis.blocks.4x4.const"),
        (
            lambda s: s.pop("g_synthesis.blocks.32x32.conv1.weight"),
            "lacks the tensor g_synthesis.blocks.32x32.conv1.weight",
        ),
        (
            lambda s: s.update({"truncation.avg_latent": torch.zeros(64)}),
            "unexpected tensor truncation.avg_latent",
        ),
        (
            lambda s: s["g_synthesis.blocks.8x8.conv0_up.intermediate.kernel"].fill_(1 / 9),
            "a blur other than [1,2,1] in g_synthesis.blocks.8x8",
        ),
        (
            lambda s: s.update({"g_synthesis.blocks.8x8.conv1.bias": torch.ones(31)}),
            "g_synthesis.blocks.8x8.conv1.bias of shape (31,), expected (32,)",
        ),
    ],
)
def test_damage_is_named(
    state: State, imported: Import, tmp_path: Path, average: Path, damage: Callable[[State], object], problem: str
) -> None:
    damage(state)
    torch.save(state, tmp_path / "network.pt")
    with pytest.raises(UnusableFile, match=re.escape(problem)):
        imported(tmp_path / "network.pt", average_latent=average)
    assert {path.name for path in tmp_path.iterdir()} == {"network.pt", "average.npy"}


def test_average_latent_is_needed_and_checked(state: State, imported: Import, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "network.pt")
    with pytest.raises(InvalidRequest, match=r"average_latent: .* name the .npy file"):
        imported(tmp_path / "network.pt")
    path = tmp_path / "average.npy"
    with pytest.raises(UnusableFile, match="does not exist"):
        imported(tmp_path / "network.pt", average_latent=path)
    rows = np.ones((12, 64))
    rows[3, 5] = 2.0
    for array, problem in (
        (np.ones(63), "not an average latent"),
        (np.ones(64, int), "not an average latent"),
        (np.ones((0, 64)), "not an average latent"),
        (np.full(64, np.nan), "NaN, infinity or rows that differ"),
        (rows, "NaN, infinity or rows that differ"),
    ):
        np.save(path, array)
        with pytest.raises(UnusableFile, match=problem):
            imported(tmp_path / "network.pt", average_latent=path)
    np.save(path, np.array([object()] * 64), allow_pickle=True)
    with pytest.raises(UnusableFile, match="is not a NumPy array"):
        imported(tmp_path / "network.pt", average_latent=path)
    np.save(path, np.ones(64))
    header = path.read_bytes()
    for content in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04rest", header.replace(b"(64,)", b"(64,(")):
        path.write_bytes(content)
        with pytest.raises(UnusableFile, match="is not a NumPy array"):
            imported(tmp_path / "network.pt", average_latent=path)
