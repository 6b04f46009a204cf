"""The onnxruntime backend in the real Triton, on a model small enough to ask it a thousand times."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
import tritonclient.grpc.aio as triton

from labelmint.calibrate import calibrate_repository
from labelmint.core.errors import InferenceFailed
from labelmint.core.policy import latent_of
from labelmint.models.draw import draw
from labelmint.models.generator import to_uint8
from labelmint.triton.client import Latents, TritonClient
from labelmint.triton.model_config import read_config
from labelmint.triton.server import TritonServer
from tests.support.inference import OUTPUTS, connected, latents, running, statistics
from tests.support.models import small
from tests.support.repositories import copy_model, hold
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Path:
    """Of the weights `small`. What is asked of `held` waits for its first step until a batch of 16 is full."""
    directory = Path(shutil.copytree(tiny_repository, tmp_path_factory.mktemp("tiny") / "repository"))
    copy_model(directory, "tiny", "held")
    hold(directory, "held_generator", seconds=600.0)
    return directory


@pytest_asyncio.fixture(scope="module")
async def server(repository: Path) -> AsyncIterator[TritonServer]:
    async with running(repository, "tiny", "tiny_staged", "held") as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def client(server: TritonServer) -> AsyncIterator[TritonClient]:
    async with connected(server) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny", "tiny_staged"])
async def test_served_equals_torch(client: TritonClient, model: str) -> None:
    generator, interpreter = small()
    for seed in range(5):
        got = await client.infer(model, "1", Latents(latent_of(seed, 8), latent_of(seed, 8), 6, 0.7), outputs=OUTPUTS)
        image, features = draw(generator, seed, 0.7, layout="paper")
        with torch.no_grad():
            label, js_map, js_score = interpreter(features)
        assert np.abs(got["image"].astype(int) - to_uint8(image)[0].numpy()).max() <= 1
        assert (got["label"] == label[0].numpy()).mean() >= 0.99
        np.testing.assert_allclose(got["js_map"], js_map[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(got["js_score"], js_score[0].numpy(), rtol=1e-4)


async def test_crossover_takes_the_second_latent(client: TritonClient) -> None:
    generator, _ = small()
    for crossover in (0, 3, 6):
        got = await client.infer("tiny", "1", latents(3, crossover=crossover), outputs=("image",))
        one, two = (torch.from_numpy(latent_of(seed, 8)) for seed in (3, 4))
        with torch.no_grad():
            want, _ = generator(one, two, torch.tensor([[crossover]], dtype=torch.int32), torch.ones(1, 1), "paper")
        assert np.abs(got["image"].astype(int) - to_uint8(want)[0].numpy()).max() <= 1


async def test_only_what_is_requested_is_returned(client: TritonClient) -> None:
    assert set(await client.infer("tiny", "1", latents(0), outputs=("js_score",))) == {"js_score"}
    with pytest.raises(InferenceFailed, match="unexpected inference output 'nonesuch'"):
        await client.infer("tiny", "1", latents(0), outputs=("nonesuch",))


async def test_concurrent_requests_are_batched_and_answers_do_not_show_it(client: TritonClient) -> None:
    alone = [await client.infer("tiny", "1", latents(seed), outputs=OUTPUTS) for seed in range(16)]
    before = await statistics(client, "tiny_generator")
    crowd = await asyncio.gather(
        *(client.infer("tiny", "1", latents(seed % 16), outputs=OUTPUTS) for seed in range(256))
    )
    after = await statistics(client, "tiny_generator")
    assert after[0] - before[0] == 256
    assert after[1] - before[1] < 256, "nothing was batched"
    for seed, got in enumerate(crowd):
        for name in OUTPUTS:
            assert got[name].tobytes() == alone[seed % 16][name].tobytes(), name


async def test_a_cancelled_request_is_not_run(client: TritonClient, server: TritonServer) -> None:
    """Other clients of a Triton do cancel. Here long before the answer: in that moment it would be Triton's end.

    Then others come until Triton's batches are full and all are answered.
    """
    connection = triton.InferenceServerClient(client.url)
    before = await statistics(client, "held_style_interpreter")
    rows = {"latent": 8, "style_latent": 8}
    inputs = [triton.InferInput(name, [1, size], "FP32") for name, size in rows.items()]
    inputs += [triton.InferInput("crossover", [1, 1], "INT32"), triton.InferInput("truncation_psi", [1, 1], "FP32")]
    asked = latents(0)
    numbers = np.array([[asked.crossover]], np.int32), np.array([[asked.truncation_psi]], np.float32)
    for tensor, content in zip(inputs, (asked.latent, asked.style_latent, *numbers), strict=True):
        tensor.set_data_from_numpy(content)
    calls = [asyncio.ensure_future(connection.infer("held", inputs)) for _ in range(8)]
    await until(lambda: pending(server, "held_generator", 8))
    for call in calls[::2]:
        call.cancel()
    others: list[asyncio.Future[object]] = []

    async def all_answered() -> bool:
        if not all(call.done() for call in (*calls, *others)):
            others.append(asyncio.ensure_future(connection.infer("held", inputs)))
            await asyncio.wait(others, timeout=0.05)
        return all(call.done() for call in (*calls, *others))

    await until(all_answered)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    await connection.close()
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    alone = await client.infer("tiny", "1", asked, outputs=("label",))
    for outcome in outcomes[1::2]:
        assert isinstance(outcome, triton.InferResult)
        label = outcome.as_numpy("label")
        assert label is not None and label.tobytes() == alone["label"].tobytes()
    answered = 4 + len(await asyncio.gather(*others))

    async def told() -> bool:
        return (await statistics(client, "held_style_interpreter"))[0] - before[0] >= answered

    await until(told)
    assert (await statistics(client, "held_style_interpreter"))[0] - before[0] == answered


async def pending(server: TritonServer, step: str, count: int) -> bool:
    """Whether so many requests wait in Triton's queue of a step."""
    async with httpx.AsyncClient() as http:
        lines = (await http.get(server.metrics_url)).text.splitlines()
    (line,) = [line for line in lines if line.startswith(f'nv_inference_pending_request_count{{model="{step}"')]
    return float(line.rsplit(" ", 1)[1]) == count


async def test_calibrate_writes_both_ensembles(repository: Path, client: TritonClient) -> None:
    (calibration,) = await calibrate_repository(
        repository, "tiny", first_seed=0, count=1000, truncation_psi=0.9, executor="onnxruntime"
    )
    scores = sorted(
        [
            float((await client.infer("tiny", "1", Latents(z, z, 6, 0.9), outputs=("js_score",)))["js_score"][0])
            for z in (latent_of(seed, 8) for seed in range(1000))
        ]
    )
    assert calibration.quantiles[0] == scores[0] and calibration.quantiles[-1] == scores[-1]
    assert sum(score <= calibration.threshold for score in scores) / 1000 == pytest.approx(0.9, abs=0.002)
    for name in ("tiny", "tiny_staged"):
        config = read_config(repository / name / "config.pbtxt")
        assert config.parameters["calibration"].string_value == calibration.to_json()
        assert "calibration.kernel" not in config.parameters
