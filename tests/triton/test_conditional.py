"""A conditional generator in the real Triton: the class is an input, and nothing else of a batch changes a sample."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from labelmint.core.executor import Choice
from labelmint.core.policy import latent_of
from labelmint.core.task import IMAGE
from labelmint.models.draw import draw
from labelmint.models.generator import to_uint8
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.server import TritonServer
from tests.support.inference import OUTPUTS, connected, running, statistics
from tests.support.models import conditional_weights, export_conditional

pytestmark = [pytest.mark.triton, pytest.mark.torch]

# The format of the steps, and what runs the interpreter.
WAYS: dict[str, tuple[str, Choice]] = {
    "onnxruntime": ("onnx", "onnxruntime"),
    "kernel": ("onnx", "kernel"),
    "torchscript": ("torchscript", "onnxruntime"),
}
SEEDS, CLASSES = range(4), range(3)
PAIRS = tuple(itertools.product(SEEDS, CLASSES))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    found = {file_format: tmp_path_factory.mktemp(file_format) for file_format in ("onnx", "torchscript")}
    for file_format, directory in found.items():
        export_conditional(directory, file_format=file_format)
    yield found


@pytest_asyncio.fixture(scope="module", params=WAYS)
async def server(request: pytest.FixtureRequest, repositories: dict[str, Path]) -> AsyncIterator[TritonServer]:
    file_format, executor = WAYS[request.param]
    async with running(repositories[file_format], "kinds", "kinds_staged", executor=executor) as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def client(server: TritonServer) -> AsyncIterator[TritonClient]:
    async with connected(server) as client:
        yield client


def inputs(seed: int, class_index: int | None, *, style_seed: int | None = None) -> Latents:
    style, crossover = (seed, 6) if style_seed is None else (style_seed, 3)
    return Latents(latent_of(seed, 16), latent_of(style, 16), crossover, 0.8, class_index)


async def made(client: TritonClient, latents: Latents, model: str = "kinds") -> dict[str, Array]:
    return await client.infer(model, "1", latents, outputs=OUTPUTS)


@pytest.mark.parametrize("model", ["kinds", "kinds_staged"])
async def test_served_equals_torch(client: TritonClient, model: str) -> None:
    generator, interpreter = conditional_weights()
    for seed, class_index in PAIRS:
        got = await made(client, inputs(seed, class_index), model)
        image, features = draw(generator, seed, 0.8, layout="paper", class_index=class_index)
        with torch.no_grad():
            label, _, js_score = interpreter(features)
        assert np.abs(got[IMAGE.name].astype(int) - to_uint8(image)[0].numpy()).max() <= 1
        assert (got["label"] == label[0].numpy()).mean() >= 0.99
        np.testing.assert_allclose(got["js_score"], js_score[0].numpy(), rtol=1e-4)


async def test_mixed_samples_have_one_class(client: TritonClient) -> None:
    generator, _ = conditional_weights()
    one, two = (torch.from_numpy(latent_of(seed, 16)) for seed in (3, 4))
    crossover, psi = torch.tensor([[3]], dtype=torch.int32), torch.tensor([[0.8]])
    for class_index in CLASSES:
        got = await made(client, inputs(3, class_index, style_seed=4))
        with torch.no_grad():
            want, _ = generator(one, two, crossover, psi, "paper", torch.tensor([[class_index]], dtype=torch.int32))
        assert np.abs(got["image"].astype(int) - to_uint8(want)[0].numpy()).max() <= 1


async def test_classes_differ_and_a_crowd_of_other_classes_changes_nothing(client: TritonClient) -> None:
    alone = {pair: await made(client, inputs(*pair)) for pair in PAIRS}
    for seed in SEEDS:
        assert len({alone[seed, class_index]["image"].tobytes() for class_index in CLASSES}) == len(CLASSES)
    before = await statistics(client, "kinds_generator")
    asked = PAIRS * 12
    crowd = await asyncio.gather(*(made(client, inputs(*pair)) for pair in asked))
    after = await statistics(client, "kinds_generator")
    assert after[0] - before[0] == len(asked)
    for pair, got in zip(asked, crowd, strict=True):
        for name in OUTPUTS:
            assert got[name].tobytes() == alone[pair][name].tobytes(), (pair, name)


async def test_an_index_that_is_no_class_has_no_score_and_spoils_no_neighbour(client: TritonClient) -> None:
    """The gateway refuses it. Other clients of Triton get no number that could pass for one."""
    alone = await made(client, inputs(1, 2))
    wrong = (-1, 3, 2**31 - 1, -(2**31))
    crowd = await asyncio.gather(*(made(client, inputs(1, index)) for index in (*wrong, 2) * 4))
    for index, got in zip((*wrong, 2) * 4, crowd, strict=True):
        assert bool(np.isnan(got["js_score"][0])) == (index != 2), index
        if index == 2:
            assert all(got[name].tobytes() == alone[name].tobytes() for name in OUTPUTS)


async def test_a_request_without_a_class_is_refused(client: TritonClient) -> None:
    with pytest.raises(Exception, match="expected 5 inputs but got 4 inputs"):
        await made(client, inputs(1, None))
