"""A gateway before a Triton of small models, and what its Triton did."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import httpx
import tritonclient.grpc.aio as triton

from labelmint.triton.client import TritonClient
from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service
from tests.support.inference import latents
from tests.support.metrics import metric_of
from tests.support.waiting import SECONDS, until


@dataclass
class Gateway:
    """A gateway before the Triton of small models, and its own channel and client."""

    service: Service
    stub: pb_grpc.SampleServiceStub
    http: httpx.AsyncClient

    async def metric(self, name: str) -> float:
        """Return the value of one line of /metrics; 0 if there is none."""
        return await metric_of(self.http, name)

    async def until(self, name: str, holds: Callable[[float], bool]) -> float:
        """Wait until the value of a metric `holds`, and return it."""

        last = 0.0

        async def reached() -> bool:
            nonlocal last
            last = await self.metric(name)
            return holds(last)

        try:
            await until(reached)
        except AssertionError:
            raise AssertionError(f"{name} stayed {last}") from None
        return last


StartGateway = Callable[..., AbstractAsyncContextManager[Gateway]]


async def release(server: TritonServer, count: int) -> None:
    """Fill the batch that `held` holds with `count` samples from here, and wait for its end.

    A batch has 16 samples. If Triton holds more or fewer than 16 - `count`, this fails.
    """
    client = TritonClient(server.grpc_url)
    calls = [client.infer("held", "1", latents(seed), outputs=("js_score",)) for seed in range(count)]
    try:
        await asyncio.wait_for(asyncio.gather(*calls), SECONDS)
    finally:
        await client.close()


async def inferences(server: TritonServer, model: str) -> tuple[int, int]:
    """(samples, executions) of a Triton model so far."""
    connection = triton.InferenceServerClient(server.grpc_url)
    try:
        (entry,) = (await connection.get_inference_statistics(model)).model_stats
        return entry.inference_count, entry.execution_count
    finally:
        await connection.close()


async def minted(server: TritonServer) -> int:
    """How many samples the Triton of `faces` has generated so far."""
    return (await inferences(server, "faces_generator"))[0]
