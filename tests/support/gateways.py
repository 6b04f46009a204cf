"""A gateway before a Triton of small models, and what its Triton did."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import httpx
import tritonclient.grpc.aio as triton

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service


@dataclass
class Gateway:
    """A gateway before the Triton of small models, and its own channel and client."""

    service: Service
    stub: pb_grpc.SampleServiceStub
    http: httpx.AsyncClient

    async def metric(self, name: str) -> float:
        """The value of one line of /metrics; 0 where there is none."""
        for line in (await self.http.get("/metrics")).text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    async def until(self, name: str, holds: Callable[[float], bool]) -> float:
        """Wait until a metric is as it should be; returns it."""
        for _ in range(300):
            if holds(value := await self.metric(name)):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"{name} stayed {value}")


StartGateway = Callable[..., AbstractAsyncContextManager[Gateway]]


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
