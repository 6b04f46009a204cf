"""A real Triton, and requests to it below the gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from labelmint.core.errors import TritonUnavailable
from labelmint.core.executor import ONNXRUNTIME, Choice
from labelmint.core.policy import latent_of
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.server import TritonServer, wait_until_ready

OUTPUTS = ("image", "label", "js_map", "js_score")


@asynccontextmanager
async def running(repository: Path, *models: str, executor: Choice = ONNXRUNTIME) -> AsyncIterator[TritonServer]:
    """A Triton that has these models ready, until the end of the block."""
    server = TritonServer(repository, models, executor=executor)
    await server.start()
    try:
        await wait_until_ready(server)
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: TritonServer) -> AsyncIterator[TritonClient]:
    client = TritonClient(server.grpc_url)
    try:
        yield client
    finally:
        await client.close()


def latents(seed: int, psi: float = 1.0, crossover: int = 6) -> Latents:
    return Latents(latent_of(seed, 8), latent_of(seed + 1, 8), crossover, psi)


async def statistics(client: TritonClient, model: str) -> tuple[int, int]:
    """(samples, executions) of a Triton model so far."""
    connection = triton_aio.InferenceServerClient(client.url)
    try:
        (entry,) = (await connection.get_inference_statistics(model)).model_stats
        return entry.inference_count, entry.execution_count
    finally:
        await connection.close()


def ask(client: TritonClient, model: str, inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
    """A request of the batch that the arrays have, as any client of Triton may send it."""
    tensors = []
    for name, array in inputs.items():
        tensors.append(triton.InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "FP32"))
        tensors[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(client.url) as connection:
        answer = connection.infer(model, tensors, outputs=[triton.InferRequestedOutput(name) for name in outputs])
    return {name: answer.as_numpy(name) for name in outputs}


async def refused(repository: Path, model: str, executor: Choice = ONNXRUNTIME) -> str:
    """What is said of a Triton that must not become ready."""
    server = TritonServer(repository, [model], executor=executor)
    try:
        await server.start()
        with pytest.raises(TritonUnavailable) as raised:
            await wait_until_ready(server)
        return raised.value.message
    finally:
        await server.stop()
