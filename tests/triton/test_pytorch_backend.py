"""The pytorch backend in the real Triton, beside the onnxruntime one: the same weights give the same pairs in both."""

import asyncio
import shutil
import sys
import sysconfig
import venv
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from labelmint.core.policy import latent_of
from labelmint.export.repository import FUSED, export_repository
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import read_config, write_config
from tests.support.inference import OUTPUTS, ask, connected, latents, refused, running, statistics
from tests.support.models import small
from tests.support.repositories import copy_model

pytestmark = [pytest.mark.triton, pytest.mark.torch]


# The same weights: as ONNX, as TorchScript, and as TorchScript whose configuration lets Triton batch the requests.
ENSEMBLES = ("tiny", "scripted", "batched")


class Affine(torch.nn.Module):
    """2 first + second, first - second, and whether torch is in inference mode; fails where `first` is negative."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert bool((first >= 0).all()), "first is negative"
        total = 2 * first + second
        return total, first - second, torch.full_like(total, float(total.is_inference()))


def write_affine(
    repository: Path, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], filename: str, inference_mode: str
) -> None:
    """A model of `Affine`, whose tensors are float32 [1], beside the exported ones."""
    (repository / name / "1").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Affine()), repository / name / "1" / filename)
    config = pb.ModelConfig(name=name, backend="pytorch", max_batch_size=8, default_model_filename=filename)
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1)
    config.parameters["INTRA_OP_THREAD_COUNT"].string_value = "1"
    config.parameters["INTER_OP_THREAD_COUNT"].string_value = "1"
    config.parameters["INFERENCE_MODE"].string_value = inference_mode
    for tensors, names in ((config.input, inputs), (config.output, outputs)):
        for tensor in names:
            tensors.add(name=tensor, data_type=pb.TYPE_FP32, dims=[1])
    write_config(repository / name / "config.pbtxt", config)


# How a configuration may name the tensors of `Affine`: the inputs' names, those of `first` and `second` first, and the
# outputs'. The configuration lists the inputs the other way round unless their order is all that it goes by.
NAMINGS = {
    "by_argument": (("first", "second"), ("sum", "difference", "inference"), "model.pt", "true"),
    "by_index": (("INPUT__0", "INPUT__1"), ("OUTPUT__0", "OUTPUT__1", "OUTPUT__2"), "another.pt", "false"),
    "by_order": (("z", "a__x"), ("sum", "difference", "inference"), "model.pt", "true"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Path:
    directory = Path(shutil.copytree(tiny_repository, tmp_path_factory.mktemp("formats") / "repository"))
    export_repository(directory, "scripted", small(), file_format="torchscript")
    copy_model(directory, "scripted", "batched")
    for step in FUSED:
        config = read_config(directory / f"batched_{step}" / "config.pbtxt")
        config.dynamic_batching.SetInParent()
        write_config(directory / f"batched_{step}" / "config.pbtxt", config)
    for name, (inputs, outputs, filename, inference_mode) in NAMINGS.items():
        if name != "by_order":
            inputs, outputs = inputs[::-1], outputs if name == "by_argument" else outputs[::-1]
        write_affine(directory, name, inputs, outputs, filename, inference_mode)
    return directory


@pytest_asyncio.fixture(scope="module")
async def client(repository: Path) -> AsyncIterator[TritonClient]:
    async with running(repository, *ENSEMBLES, *NAMINGS) as server, connected(server) as client:
        yield client


async def test_both_formats_give_the_same_pairs(client: TritonClient) -> None:
    same = total = 0
    for seed in range(64):
        one = await client.infer("tiny", "1", latents(seed, psi=0.8), outputs=OUTPUTS)
        other = await client.infer("scripted", "1", latents(seed, psi=0.8), outputs=OUTPUTS)
        assert np.abs(one["image"].astype(int) - other["image"]).max() <= 1
        np.testing.assert_allclose(other["js_map"], one["js_map"], atol=1e-5)
        np.testing.assert_allclose(other["js_score"], one["js_score"], rtol=1e-4)
        same += int((one["label"] == other["label"]).sum())
        total += one["label"].size
    assert same / total >= 0.9999


@pytest.mark.parametrize("model", ["scripted", "batched"])
async def test_a_seed_is_an_identity_in_any_company(client: TritonClient, model: str) -> None:
    """Alone, in a crowd, and as a batch of a client's own: the same bytes."""
    alone = [await client.infer(model, "1", latents(seed), outputs=OUTPUTS) for seed in range(16)]
    before = await statistics(client, f"{model}_generator")
    crowd = await asyncio.gather(
        *(client.infer(model, "1", latents(seed % 16), outputs=OUTPUTS) for seed in range(256))
    )
    after = await statistics(client, f"{model}_generator")
    assert after[0] - before[0] == 256
    if model == "scripted":
        assert after[1] - before[1] == 256, "Triton put seeds into one batch"
    else:
        assert after[1] - before[1] < 256, "nothing was batched"
    rows = {
        "latent": np.concatenate([latent_of(seed, 8) for seed in range(16)]),
        "style_latent": np.concatenate([latent_of(seed + 1, 8) for seed in range(16)]),
        "crossover": np.full((16, 1), 6, np.int32),
        "truncation_psi": np.ones((16, 1), np.float32),
    }
    together = await asyncio.to_thread(ask, client, model, rows, OUTPUTS)
    for name in OUTPUTS:
        for seed, got in enumerate(crowd):
            assert got[name].tobytes() == alone[seed % 16][name].tobytes(), name
        for seed, row in enumerate(together[name]):
            assert row.tobytes() == alone[seed][name].tobytes(), name


async def test_only_what_is_requested_is_returned(client: TritonClient) -> None:
    assert set(await client.infer("scripted", "1", latents(0), outputs=("js_score",))) == {"js_score"}


@pytest.mark.parametrize("model", NAMINGS)
async def test_a_configuration_means_what_it_means_to_the_native_backend(client: TritonClient, model: str) -> None:
    """Names of tensors and of the file, and the parameters."""
    (first, second), outputs, _, inference_mode = NAMINGS[model]
    arrays = {first: np.full((2, 1), 5.0, np.float32), second: np.full((2, 1), 3.0, np.float32)}
    got = await asyncio.to_thread(ask, client, model, arrays, outputs)
    want = (13.0, 2.0, float(inference_mode == "true"))
    assert [got[name].tolist() for name in outputs] == [[[value], [value]] for value in want]


async def test_a_failure_touches_no_other_request(client: TritonClient) -> None:
    def one(value: float) -> float | str:
        arrays = {"first": np.full((1, 1), value, np.float32), "second": np.zeros((1, 1), np.float32)}
        try:
            return float(ask(client, "by_argument", arrays, ("sum",))["sum"][0, 0])
        except InferenceServerException as error:
            return str(error)

    values = [float(value) * (-1 if value % 5 == 0 else 1) for value in range(1, 65)]
    answers = await asyncio.gather(*(asyncio.to_thread(one, value) for value in values))
    for value, answer in zip(values, answers, strict=True):
        if value < 0:
            assert isinstance(answer, str) and "pytorch: " in answer and "first is negative" in answer
        else:
            assert answer == 2 * value


async def test_a_configuration_that_does_not_fit_the_file_is_refused(tmp_path: Path) -> None:
    write_affine(tmp_path, "affine", ("first",), ("sum",), "model.pt", "true")
    said = await refused(tmp_path, "affine")
    assert "takes 2 inputs ['first', 'second'], its config.pbtxt names 1: ['first']" in said


async def test_without_torch_the_start_says_what_to_install(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment of its own, which has all that ours has save torch."""
    venv.create(tmp_path / "environment")
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "environment")}, scheme="venv")
    (Path(paths["purelib"]) / "ours.pth").write_text(sysconfig.get_paths()["purelib"])
    (Path(paths["purelib"]) / "torch.py").write_text("raise ModuleNotFoundError('No module', name='torch')")
    monkeypatch.setattr(sys, "executable", str(Path(paths["scripts"]) / "python3"))
    said = await refused(repository, "scripted")
    assert "torch is not installed; run `pip install '.[torchscript]'` in a clone of labelmint" in said
    assert "onnxruntime" not in said
