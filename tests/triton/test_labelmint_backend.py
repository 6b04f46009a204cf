"""The labelmint backend in the real Triton, beside the onnxruntime one: the same weights, the same pairs."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from labelmint.core.policy import latent_of
from labelmint.export.repository import export_repository
from labelmint.triton import server as server_module
from labelmint.triton.client import Array, TritonClient
from labelmint.triton.model_config import read_config, write_config
from labelmint.triton.server import KERNEL
from tests.support.inference import OUTPUTS, ask, connected, latents, refused, running
from tests.support.models import random_interpreter, small
from tests.support.processes import refused_start
from tests.support.repositories import copy_model

pytestmark = [pytest.mark.triton, pytest.mark.torch]


POINTS = ("image", "keypoints", "confidence", "js_map", "js_score")
OUTPUTS_OF = {"tiny": OUTPUTS, "native": OUTPUTS, "one_thread": OUTPUTS, "points": POINTS, "native_points": POINTS}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Path:
    directory = Path(shutil.copytree(tiny_repository, tmp_path_factory.mktemp("native") / "repository"))
    generator, interpreter = small()
    torch.manual_seed(2)
    keypoints = random_interpreter(generator, "keypoints")
    for name, weights, file_format in (
        ("native", interpreter, "native"),
        ("points", keypoints, "onnx"),
        ("native_points", keypoints, "native"),
    ):
        export_repository(directory, name, (generator, weights), file_format=file_format)
    copy_model(directory, "native", "one_thread")
    path = directory / "one_thread_style_interpreter" / "config.pbtxt"
    config = read_config(path)
    config.parameters["intra_op_thread_count"].string_value = "1"
    write_config(path, config)
    return directory


@pytest_asyncio.fixture(scope="module")
async def client(repository: Path) -> AsyncIterator[TritonClient]:
    async with running(repository, *OUTPUTS_OF) as server, connected(server) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny", "points"])
async def test_both_formats_give_the_same_pairs(client: TritonClient, model: str) -> None:
    other, outputs = {"tiny": "native", "points": "native_points"}[model], OUTPUTS_OF[model]
    same = total = 0
    for seed in range(64):
        want, got = [await client.infer(name, "1", latents(seed, psi=0.8), outputs=outputs) for name in (model, other)]
        assert got["image"].tobytes() == want["image"].tobytes(), "the generator is the same file"
        np.testing.assert_allclose(got["js_map"], want["js_map"], atol=1e-5)
        np.testing.assert_allclose(got["js_score"], want["js_score"], rtol=1e-4)
        if model == "points":
            np.testing.assert_allclose(got["confidence"], want["confidence"], rtol=1e-5)
        label = outputs[1]
        same += int((got[label] == want[label]).sum())
        total += got[label].size
    assert same / total >= 0.9999


@pytest.mark.parametrize("model", ["native", "native_points"])
async def test_a_seed_is_an_identity_in_any_company(client: TritonClient, model: str) -> None:
    """Alone, in a crowd, as a batch of a client's own, and on one thread: the same bytes."""
    outputs = OUTPUTS_OF[model]
    alone = [await client.infer(model, "1", latents(seed), outputs=outputs) for seed in range(16)]
    crowd = await asyncio.gather(
        *(client.infer(model, "1", latents(seed % 16), outputs=outputs) for seed in range(256))
    )
    rows: dict[str, Array] = {
        "latent": np.concatenate([latent_of(seed, 8) for seed in range(16)]),
        "style_latent": np.concatenate([latent_of(seed + 1, 8) for seed in range(16)]),
        "crossover": np.full((16, 1), 6, np.int32),
        "truncation_psi": np.ones((16, 1), np.float32),
    }
    together = await asyncio.to_thread(ask, client, model, rows, outputs)
    for name in outputs:
        for seed, got in enumerate(crowd):
            assert got[name].tobytes() == alone[seed % 16][name].tobytes(), name
        for seed, row in enumerate(together[name]):
            assert row.tobytes() == alone[seed][name].tobytes(), name
    if model == "native":
        for seed, want in enumerate(alone):
            got = await client.infer("one_thread", "1", latents(seed), outputs=outputs)
            assert all(got[name].tobytes() == want[name].tobytes() for name in outputs)


async def test_only_what_is_requested_is_returned(client: TritonClient) -> None:
    assert set(await client.infer("native", "1", latents(0), outputs=("js_score",))) == {"js_score"}


@pytest.mark.parametrize("model", ["native", "tiny"])
async def test_without_a_whole_kernel_the_model_is_not_loaded(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Nothing else runs in its place then: the gateway has said that the kernel does."""
    damaged = Path(shutil.copytree(KERNEL, tmp_path / "kernel"))
    for library in damaged.glob("*.so"):
        library.write_text("not a library")
    monkeypatch.setattr(server_module, "KERNEL", damaged)
    said = await refused(repository, model, "kernel")
    assert "the compiled kernel cannot be loaded: " in said and "interpreter.x86-64-v" in said


async def test_what_does_not_fit_is_refused(repository: Path, tmp_path: Path) -> None:
    copy_model(repository, "native", "native", tmp_path)
    directory = tmp_path / "native_style_interpreter"
    config = read_config(directory / "config.pbtxt")
    written = (directory / "config.pbtxt").read_bytes()
    config.input[1].dims[0] = 7
    write_config(directory / "config.pbtxt", config)
    said = await refused(tmp_path, "native_style_interpreter")
    assert "reads {'features_4': [4, 4, 4], 'features_8': [8, 8, 8]" in said and "'features_8': [7, 8, 8]" in said
    file = directory / "1" / "interpreter.npz"
    file.write_bytes(file.read_bytes()[:-100])
    said = await refused(tmp_path, "native_style_interpreter")
    assert f"{file} cannot be read as .npz: " in said and "; export the model again" in said
    (directory / "config.pbtxt").write_bytes(written)
    assert f"{file} is cut off or damaged" in refused_start("--model-repository", str(tmp_path))
