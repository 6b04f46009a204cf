"""The kernel in the place of ONNX Runtime, in the real Triton: the same repository, the same pairs."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from labelmint.calibrate import calibrate_repository
from labelmint.core.executor import executor_of
from labelmint.core.policy import latent_of
from labelmint.core.served_model import read_served_model
from labelmint.export.repository import export_repository
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.kernel_steps import describe
from labelmint.triton.model_config import config_text, read_config, write_config
from tests.support.inference import OUTPUTS, ask, connected, latents, running
from tests.support.models import random_interpreter, small
from tests.support.repositories import accept

pytestmark = [pytest.mark.triton, pytest.mark.torch]

POINTS = ("image", "keypoints", "confidence", "js_map", "js_score")
OUTPUTS_OF = {"tiny": OUTPUTS, "points": POINTS, "plain": OUTPUTS}
INTERPRETER = "tiny_style_interpreter"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Path:
    """`plain` has a step that the kernel does not recognise."""
    directory = Path(shutil.copytree(tiny_repository, tmp_path_factory.mktemp("both") / "repository"))
    generator, interpreter = small()
    torch.manual_seed(2)
    export_repository(directory, "points", (generator, random_interpreter(generator, "keypoints")), staged=False)
    export_repository(directory, "plain", (generator, interpreter), staged=False)
    path = directory / "plain_style_interpreter" / "1" / "model.onnx"
    data = path.read_bytes()
    assert data.count(b"style_interpreter") == 1
    path.write_bytes(data.replace(b"style_interpreter", b"other_interpreter"))
    accept(directory, "plain")
    return directory


@pytest_asyncio.fixture(scope="module")
async def clients(repository: Path) -> AsyncIterator[dict[str, TritonClient]]:
    async with (
        running(repository, *OUTPUTS_OF, executor="kernel") as one,
        running(repository, *OUTPUTS_OF) as other,
        connected(one) as kernel,
        connected(other) as onnxruntime,
    ):
        yield {"kernel": kernel, "onnxruntime": onnxruntime}


async def test_triton_says_what_runs_each_interpreter(clients: dict[str, TritonClient]) -> None:
    for name, client in clients.items():
        configs = await client.model_configs()
        found = {
            model: executor_of(next(iter(configs[f"{model}_style_interpreter", "1"].values()))) for model in OUTPUTS_OF
        }
        assert {model: (each.name, each.home) for model, each in found.items()} == {
            "tiny": (name, "onnxruntime"),
            "points": (name, "onnxruntime"),
            "plain": ("onnxruntime", "onnxruntime"),
        }


@pytest.mark.parametrize("model", ["tiny", "points"])
async def test_both_executors_give_the_same_pairs(clients: dict[str, TritonClient], model: str) -> None:
    outputs = OUTPUTS_OF[model]
    same = total = 0
    differs = False
    for seed in range(64):
        kernel, onnx = [
            await clients[name].infer(model, "1", latents(seed, psi=0.8), outputs=outputs)
            for name in ("kernel", "onnxruntime")
        ]
        assert kernel["image"].tobytes() == onnx["image"].tobytes(), "the generator is the same file"
        np.testing.assert_allclose(kernel["js_map"], onnx["js_map"], atol=1e-5)
        np.testing.assert_allclose(kernel["js_score"], onnx["js_score"], rtol=1e-4)
        differs |= kernel["js_map"].tobytes() != onnx["js_map"].tobytes()
        if model == "points":
            np.testing.assert_allclose(kernel["confidence"], onnx["confidence"], rtol=1e-5)
        same += int((kernel[outputs[1]] == onnx[outputs[1]]).sum())
        total += kernel[outputs[1]].size
    assert same / total >= 0.9999
    assert differs, "the last digits show that they are two"


def inputs_of(seeds: range) -> dict[str, Array]:
    return {
        "latent": np.concatenate([latent_of(seed, 8) for seed in seeds]).astype(np.float32),
        "style_latent": np.concatenate([latent_of(seed + 1, 8) for seed in seeds]).astype(np.float32),
        "crossover": np.full((len(seeds), 1), 3, np.int32),
        "truncation_psi": np.full((len(seeds), 1), 0.7, np.float32),
    }


async def test_a_sample_does_not_depend_on_its_batch(clients: dict[str, TritonClient]) -> None:
    client = clients["kernel"]
    alone = [await asyncio.to_thread(ask, client, "tiny", inputs_of(range(s, s + 1)), OUTPUTS) for s in range(12)]
    together = await asyncio.to_thread(ask, client, "tiny", inputs_of(range(12)), OUTPUTS)
    crowd = await asyncio.gather(
        *(asyncio.to_thread(ask, client, "tiny", inputs_of(range(s, s + 1)), OUTPUTS) for s in range(12))
    )
    for seed in range(12):
        for name in OUTPUTS:
            want = alone[seed][name][0].tobytes()
            assert together[name][seed].tobytes() == want and crowd[seed][name][0].tobytes() == want, (seed, name)


async def test_a_feature_that_is_not_a_number_spoils_its_own_sample_only(clients: dict[str, TritonClient]) -> None:
    rng = np.random.default_rng(0)
    config = (await clients["kernel"].model_configs())[INTERPRETER, "1"]
    dims = {tensor.name: tuple(tensor.dims) for tensor in next(iter(config.values())).input}
    features = {name: rng.standard_normal((3, *shape)).astype(np.float32) for name, shape in dims.items()}
    outputs = ("label", "js_map", "js_score")
    whole = await asyncio.to_thread(ask, clients["kernel"], INTERPRETER, features, outputs)
    features["features_8"][1, 0, 2, 2] = np.nan
    for client in clients.values():
        spoiled = await asyncio.to_thread(ask, client, INTERPRETER, features, outputs)
        assert np.isnan(spoiled["js_score"][1]).all() and np.isfinite(spoiled["js_score"][[0, 2]]).all()
    spoiled = await asyncio.to_thread(ask, clients["kernel"], INTERPRETER, features, outputs)
    for row in (0, 2):
        assert all(spoiled[name][row].tobytes() == whole[name][row].tobytes() for name in outputs)


@pytest.mark.parametrize("model", ["tiny", "plain"])
async def test_a_calibration_is_that_of_the_executor_that_ran(
    repository: Path, tmp_path: Path, clients: dict[str, TritonClient], model: str
) -> None:
    """Of `plain`, the kernel was asked for, and ONNX Runtime ran."""
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    path = copy / model / "config.pbtxt"
    before = read_config(path)
    before.parameters["calibration" if model == "tiny" else "calibration.kernel"].string_value = "another executor's"
    path.write_text(config_text(before))
    (calibration,) = await calibrate_repository(copy, model, 0, count=1000, truncation_psi=0.9)
    written = {key: value.string_value for key, value in read_config(path).parameters.items() if "calibration" in key}
    mine, other = ("calibration.kernel", "calibration") if model == "tiny" else ("calibration", "calibration.kernel")
    assert written == {mine: calibration.to_json(), other: "another executor's"}
    scores = [
        (await clients["kernel"].infer(model, "1", Latents(z, z, 6, 0.9), outputs=("js_score",)))["js_score"][0]
        for z in (latent_of(seed, 8) for seed in range(1000))
    ]
    assert (calibration.quantiles[0], calibration.quantiles[-1]) == (min(scores), max(scores))


async def test_weights_that_change_after_the_check_are_not_loaded(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    async with running(copy, "tiny", executor="kernel") as server, connected(server) as client:
        directory = copy / INTERPRETER / "1"
        model = read_served_model(read_config(copy / "tiny" / "config.pbtxt"), "1")
        found = describe(directory, read_config(copy / INTERPRETER / "config.pbtxt"), model)
        data = bytearray((directory / "model.onnx").read_bytes())
        data[found["slices"]["weight2"]["offset"]] ^= 1
        (directory / "model.onnx").write_bytes(data)
        await client.unload("tiny")
        with pytest.raises(Exception, match="describes other weights than its model has now"):
            await client.load("tiny")


async def test_the_threads_of_the_step_are_honoured(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    path = copy / INTERPRETER / "config.pbtxt"
    config = read_config(path)
    config.parameters["intra_op_thread_count"].string_value = "1"
    write_config(path, config)
    async with running(copy, "tiny", executor="kernel") as server, connected(server) as client:
        found = next(iter((await client.model_configs())[INTERPRETER, "1"].values()))
        assert found.parameters["intra_op_thread_count"].string_value == "1"
        await client.infer("tiny", "1", latents(0), outputs=OUTPUTS)
