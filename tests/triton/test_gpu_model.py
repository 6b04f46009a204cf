"""A model of `--format gpu` in the real Triton, on the CPU: the same files, with Triton's interpreter for the kernel.

Rules of this file:
- The models are as exported, except the instance groups, which ask for a CPU, and the generator's CUDA provider, which
  the pip-installed Triton does not have. The precision is float32.
- Where a fault cannot be provoked in the kernel, an `interpreter.py` of this file lies in its place.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from labelmint.core.policy import latent_of
from labelmint.export.modules import GeneratorStep, StyleInterpreterStep, example_inputs
from labelmint.export.repository import export_repository
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.model_config import read_config, write_config
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2 as messages
from tests.support.inference import OUTPUTS, ask, connected, latents, refused, statistics
from tests.support.models import random_interpreter, small
from tests.support.repositories import copy_model
from tests.support.running import Running, start_before

pytestmark = [pytest.mark.triton, pytest.mark.torch]

POINTS = ("image", "keypoints", "confidence", "js_map", "js_score")
OUTPUTS_OF = {"segments": OUTPUTS, "points": POINTS}
STEP = "segments_style_interpreter"

# Fails for a sample whose first feature is negative; else every output has that feature's value.
STAND_IN = """
import torch

class GpuInterpreter:
    outputs = ("label", "js_map", "js_score")

    def __init__(self, arrays, *, precision, device):
        self.channels = {r: arrays[f"projection_{r}"].shape[1] for r in (4, 8, 16)}

    def run(self, features):
        value = features[0][0, 0, 0]
        if value < 0:
            raise RuntimeError("the first feature is negative")
        label = torch.full((16, 16), int(value), dtype=torch.uint8)
        return {"label": label, "js_map": value.repeat(16, 16), "js_score": value.repeat(1)}
"""


def rehearse(repository: Path, name: str) -> None:
    """Change the configurations of an exported GPU model so that the pip-installed Triton runs it on a CPU."""
    for step in ("generator", "style_interpreter"):
        path = repository / f"{name}_{step}" / "config.pbtxt"
        config = read_config(path)
        (group,) = config.instance_group
        assert group.kind == pb.ModelInstanceGroup.KIND_GPU and list(group.gpus) == [0] and group.count == 1
        group.kind = pb.ModelInstanceGroup.KIND_CPU
        del group.gpus[:]
        config.ClearField("optimization")
        write_config(path, config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu")
    generator, interpreter = small()
    torch.manual_seed(2)
    for name, weights in (("segments", interpreter), ("points", random_interpreter(generator, "keypoints"))):
        export_repository(directory, name, (generator, weights), file_format="gpu", precision="float32")
    return directory


@pytest.fixture(scope="module")
def repository(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(exported, tmp_path_factory.mktemp("rehearsed") / "repository"))
    for name in OUTPUTS_OF:
        rehearse(directory, name)
    copy_model(directory, "segments", "stand_in")
    step = directory / "stand_in_style_interpreter"
    (step / "1" / "interpreter.py").write_text(STAND_IN)
    config = read_config(step / "config.pbtxt")
    config.dynamic_batching.max_queue_delay_microseconds = 300_000  # several requests in one call of the model
    write_config(step / "config.pbtxt", config)
    return directory


@pytest_asyncio.fixture(scope="module")
async def server(repository: Path) -> AsyncIterator[TritonServer]:
    started = TritonServer(repository, [*OUTPUTS_OF, "stand_in"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        await started.start()
    try:
        await wait_until_ready(started)
        yield started
    finally:
        await started.stop()


@pytest_asyncio.fixture(scope="module")
async def client(server: TritonServer) -> AsyncIterator[TritonClient]:
    async with connected(server) as client:
        yield client


def in_torch(name: str, seed: int) -> dict[str, Array]:
    """What torch computes for the seed with the weights of the model."""
    generator, interpreter = small()
    if name == "points":
        torch.manual_seed(2)
        interpreter = random_interpreter(generator, "keypoints")
    asked = latents(seed)
    crossover, psi = torch.tensor([[asked.crossover]], dtype=torch.int32), torch.tensor([[asked.truncation_psi]])
    with torch.no_grad():
        image, *features = GeneratorStep(generator, interpreter)(
            torch.from_numpy(asked.latent), torch.from_numpy(asked.style_latent), crossover, psi
        )
        found = (image, *StyleInterpreterStep(interpreter)(*features))
    return {output: tensor[0].numpy() for output, tensor in zip(OUTPUTS_OF[name], found, strict=True)}


@pytest.mark.parametrize("model", OUTPUTS_OF)
async def test_a_pair_is_what_torch_computes(client: TritonClient, model: str) -> None:
    same = total = 0
    for seed in range(16):
        got, want = await client.infer(model, "1", latents(seed), outputs=OUTPUTS_OF[model]), in_torch(model, seed)
        assert np.abs(got["image"].astype(int) - want["image"]).max() <= 1
        np.testing.assert_allclose(got["js_map"], want["js_map"], atol=1e-5)
        np.testing.assert_allclose(got["js_score"], want["js_score"], rtol=1e-4)
        label = OUTPUTS_OF[model][1]
        assert got[label].dtype == want[label].dtype
        same += int((got[label] == want[label]).sum())
        total += want[label].size
    assert same / total >= 0.999


@pytest.mark.parametrize("model", OUTPUTS_OF)
async def test_a_sample_is_the_same_alone_in_a_crowd_and_in_a_batch(client: TritonClient, model: str) -> None:
    outputs = OUTPUTS_OF[model]
    alone = [await client.infer(model, "1", latents(seed), outputs=outputs) for seed in range(4)]
    crowd = await asyncio.gather(*(client.infer(model, "1", latents(seed % 4), outputs=outputs) for seed in range(16)))
    for seed, got in enumerate(crowd):
        assert all(got[name].tobytes() == alone[seed % 4][name].tobytes() for name in outputs)
    _, interpreter = small()
    step = StyleInterpreterStep(interpreter)
    features = {spec.name: x.numpy() for spec, x in zip(step.inputs, example_inputs(step, 3), strict=True)}
    if model == "segments":
        together = await asyncio.to_thread(ask, client, STEP, features, outputs[1:])
        for row in range(3):
            one = {name: array[row : row + 1] for name, array in features.items()}
            got = await asyncio.to_thread(ask, client, STEP, one, outputs[1:])
            assert all(got[name].tobytes() == together[name][row : row + 1].tobytes() for name in outputs[1:])


async def test_only_what_is_requested_is_returned(client: TritonClient) -> None:
    assert set(await client.infer("segments", "1", latents(0), outputs=("js_score",))) == {"js_score"}


async def test_a_gateway_serves_it_as_any_other(server: TritonServer, client: TritonClient, tmp_path: Path) -> None:
    running = Running(await start_before(tmp_path / "log", server), tmp_path)
    try:
        model = (await running.stub.GetModel(messages.GetModelRequest(model="segments"))).model
        assert model.executor == "python"
        sample = await running.sample(7, model="segments")
        z = latent_of(7, 8)
        want = await client.infer("segments", "1", Latents(z, z, 6, 1.0), outputs=OUTPUTS)
        assert sample.label.data == want["label"].tobytes() and sample.js_map == want["js_map"].tobytes()
    finally:
        await running.close()


def features_of(value: float, batch: int = 1) -> dict[str, Array]:
    _, interpreter = small()
    specs = StyleInterpreterStep(interpreter).inputs
    return {spec.name: np.full((batch, *spec.shape), value, np.float32) for spec in specs}


async def test_a_request_that_fails_affects_no_other(client: TritonClient) -> None:
    step, values = "stand_in_style_interpreter", [1.0, -1.0, 2.0, 3.0]
    before = await statistics(client, step)
    answers = await asyncio.gather(
        *(asyncio.to_thread(ask, client, step, features_of(value), ("label", "js_score")) for value in values),
        return_exceptions=True,
    )
    executions = (await statistics(client, step))[1] - before[1]
    assert executions < len(values), "the requests came to the model one by one, so the test shows nothing"
    for value, answer in zip(values, answers, strict=True):
        if value < 0:
            assert isinstance(answer, InferenceServerException)
            assert "gpu: the first feature is negative" in answer.message()
        else:
            assert not isinstance(answer, BaseException), answer
            assert (answer["label"] == value).all() and answer["js_score"] == value


async def test_features_of_a_wrong_shape_are_refused_and_the_model_serves_on(client: TritonClient) -> None:
    wrong = features_of(1.0) | {"features_8": np.ones((1, 8, 4, 4), np.float32)}
    with pytest.raises(InferenceServerException, match="features_8"):
        await asyncio.to_thread(ask, client, STEP, wrong, ("label",))
    await client.infer("segments", "1", latents(0), outputs=("label",))


async def test_on_a_machine_without_a_gpu_it_is_refused_in_one_line(exported: Path, repository: Path) -> None:
    said = await refused(exported, STEP)
    print(said)
    assert STEP in said and "gpu" in said.lower() and "\n" not in said
    said = await refused(repository, STEP)
    assert "runs on GPUs only" in said and "`--format onnx`" in said and "\n" not in said


async def test_what_does_not_fit_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    copy_model(repository, "segments", "segments", tmp_path)
    directory = tmp_path / STEP
    config = read_config(directory / "config.pbtxt")
    written = (directory / "config.pbtxt").read_bytes()
    config.input[1].dims[0] = 7
    write_config(directory / "config.pbtxt", config)
    said = await refused(tmp_path, STEP)
    assert "reads {'features_4': [4, 4, 4]" in said and "'features_8': [7, 8, 8]" in said
    (directory / "config.pbtxt").write_bytes(written)
    file = directory / "1" / "interpreter.npz"
    file.write_bytes(file.read_bytes()[:-100])
    said = await refused(tmp_path, STEP)
    assert f"{file} cannot be run (" in said and "; export the model again" in said
