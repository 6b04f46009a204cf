"""Streams whose next sample is always ready, as with a Triton that is faster than the reader, over real gRPC: they
expire, are paced and end at the close as any other, with the seed to resume at.

A source stands in for the sampling core, or an instant Triton below it: no Triton here is fast enough.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry

from labelmint.core.task import SEGMENTATION
from labelmint.gateway.grpc.interceptors import AccessInterceptor
from labelmint.gateway.grpc.service import SampleService
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sample import Delivery
from labelmint.gateway.sampling.sampler import Limits, Sampler, SamplingCore
from labelmint.triton.client import Latents, TritonClient
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.support.served import MODEL
from tests.support.waiting import SECONDS, until

pytestmark = pytest.mark.triton


TOKEN = "for-tests"


class Model:
    name = "endless"
    task = SEGMENTATION


class Endless:
    """A sampling core that has every sample ready, each of them rejected: a message is what the cursor is."""

    async def find(self, name: str, version: str, owed: int = 1) -> Model:
        return Model()

    def owed_at_first(self, window: int, count: int) -> int:
        return 1

    async def walk(self, model: Any, walk: Any, *_: Any, **__: Any) -> AsyncGenerator[Delivery, None]:
        for seed in walk.seeds():
            yield Delivery(None, seed + 1, seed + 1 - walk.start)


class InstantTriton(TritonClient):
    """Has every sample ready."""

    async def infer(self, _: str, __: str, ___: Latents, *, outputs: Sequence[str], **____: Any) -> Any:
        assert outputs == ("js_score",)
        return {"js_score": np.zeros(1, np.float32)}


def core(catalog: Catalog, triton: TritonClient, metrics: Metrics) -> Sampler:
    """The real sampling core; everything that it samples is accepted."""
    catalog._models, catalog._failure = {("endless", 1): replace(MODEL, name="endless")}, None
    limits = Limits(
        max_in_flight=10, triton_slots=10, max_streams=10, max_window=10, max_empty_seeds=10, capacity_wait_seconds=0.0
    )
    return Sampler(catalog, triton, metrics, cache=SampleCache(0, metrics), limits=limits)


@asynccontextmanager
async def serving(
    max_stream_seconds: float, tokens: Tokens | None = None
) -> AsyncIterator[tuple[grpc.aio.Server, Lifecycle, pb_grpc.SampleServiceStub]]:
    metrics = Metrics(CollectorRegistry())
    triton = InstantTriton("127.0.0.1:1")
    catalog = Catalog(triton, "fused")
    lifecycle = Lifecycle(catalog, max_stream_seconds, False)
    server = grpc.aio.server(interceptors=[] if tokens is None else [AccessInterceptor(tokens, metrics)])
    sampler = Endless() if tokens is None else core(catalog, triton, metrics)  # tokens: the core paces
    service = SampleService(SamplingCore(sampler, metrics, lifecycle))  # type: ignore[arg-type]
    pb_grpc.add_SampleServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield server, lifecycle, pb_grpc.SampleServiceStub(channel)
    finally:
        await server.stop(None)
        await triton.close()


def begin(stub: pb_grpc.SampleServiceStub, start_seed: int = 0) -> Any:
    options = pb.SampleOptions(omit_image=True, omit_label=True, max_js=1e9)
    request = pb.StreamSamplesRequest(model="endless", start_seed=start_seed, options=options)
    return stub.StreamSamples(request, metadata=(("authorization", f"Bearer {TOKEN}"),))


class Reading:
    """A stream that is read to its end. `seen` is the last seed of the cursor that came."""

    def __init__(self, call: Any) -> None:
        self.seen = 0
        self._call = call

    async def to_its_end(self) -> tuple[int, str, int]:
        """Return what `seen` is then, the reason of the end and where it says to resume."""
        try:
            await asyncio.wait_for(self._read(), SECONDS)
        except asyncio.TimeoutError:
            pytest.fail(f"the stream still runs, at seed {self.seen}")
        except grpc.aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata() or ())
            assert "grpc-status-details-bin" in trailers, f"cut without a word: {error.details()}"
            info = error_details_pb2.ErrorInfo()
            assert status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details[0].Unpack(info)
            return self.seen, info.reason, int(info.metadata["next_seed"])
        raise AssertionError("the walk has seeds for hours")

    async def _read(self) -> None:
        async for message in self._call:
            assert message.next_seed > self.seen
            self.seen = message.next_seed


def slow_tokens(directory: Path, samples_per_second: float) -> Tokens:
    path = directory / "tokens"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    path.write_text(f"training {digest} samples_per_second={samples_per_second}\n")
    return Tokens(path)


async def test_it_expires() -> None:
    """Each next one goes on where the last one ended; a busy machine may need several for the first seeds."""
    async with serving(0.5) as (_, _, stub):
        resumes = [0]

        async def went_on_twice() -> bool:
            seen, reason, resume = await Reading(begin(stub, resumes[-1])).to_its_end()
            assert reason == "STREAM_EXPIRED" and resume == (seen or resumes[-1])
            resumes.append(resume)
            return len(set(resumes)) > 2

        await until(went_on_twice)
        assert resumes == sorted(resumes)


@pytest.mark.parametrize("streams", [1, 8])
async def test_the_close_ends_it_where_it_can_be_resumed(streams: int) -> None:
    async with serving(0.0) as (server, lifecycle, stub):
        readings = [Reading(begin(stub)) for _ in range(streams)]
        ends = [asyncio.create_task(reading.to_its_end()) for reading in readings]
        await until(lambda: all(reading.seen for reading in readings))
        lifecycle.close()
        await server.stop(SECONDS)
        for seen, reason, resume in await asyncio.gather(*ends):
            assert reason == "SERVER_DRAINING" and resume == seen > 0


async def test_a_reader_who_pauses_is_told_too() -> None:
    """It expired while the reader took nothing; what was on its way still comes, and then the end."""
    async with serving(0.3) as (_, _, stub):
        call = begin(stub)
        await call.wait_for_connection()
        await asyncio.sleep(1.0)
        seen, reason, resume = await Reading(call).to_its_end()
        assert reason == "STREAM_EXPIRED" and resume == seen


@pytest.mark.parametrize("end", ["STREAM_EXPIRED", "SERVER_DRAINING"])
async def test_a_paced_one_ends_while_it_is_paced(end: str, tmp_path: Path) -> None:
    """At a sample in 100 s the second one is nowhere near. The first one comes within the five seconds."""
    async with serving(5.0 if end == "STREAM_EXPIRED" else 0.0, slow_tokens(tmp_path, 0.01)) as (_, lifecycle, stub):
        reading = Reading(begin(stub))
        ending = asyncio.create_task(reading.to_its_end())
        await until(lambda: reading.seen == 1)
        if end == "SERVER_DRAINING":
            lifecycle.close()
        assert await ending == (1, end, 1)
