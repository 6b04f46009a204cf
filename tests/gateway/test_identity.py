"""A seed is an identity: one SHA-256, however it is asked for; and both pipelines say the same."""

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator

import grpc.aio
import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import start_service
from tests.support.wire import RAW

pytestmark = pytest.mark.triton


SEED = 7
Stub = pb_grpc.SampleServiceStub


def digest(image: bytes, label: bytes) -> str:
    return hashlib.sha256(image + label).hexdigest()


async def over_grpc(stub: Stub) -> str:
    sample = (await stub.GetSample(pb.GetSampleRequest(model="faces", seed=SEED, options=RAW))).sample
    return digest(sample.image.data, sample.label.data)


async def in_a_batch(stub: Stub, size: int) -> str:
    """The seed among `size - 1` others, at a place that moves with the size."""
    others = list(range(1000, 1000 + size - 1))
    seeds = [*others[: size // 2], SEED, *others[size // 2 :]]
    request = pb.BatchGetSamplesRequest(model="faces", seeds=seeds, options=RAW)
    (sample,) = [o.sample for o in (await stub.BatchGetSamples(request)).outcomes if o.sample.seed == SEED]
    return digest(sample.image.data, sample.label.data)


def over_rest(http: httpx.Client) -> str:
    query = {"max_quantile": 1, "include_rejected": True}
    body = http.get(f"/v1/models/faces/samples/{SEED}", params=query).json()
    parts = [np.asarray(Image.open(io.BytesIO(base64.b64decode(body[part]["data"])))) for part in ("image", "label")]
    return digest(*(part.tobytes() for part in parts))


async def test_one_digest_over_both_doors_alone_and_in_batches(stub: Stub, http: httpx.Client) -> None:
    digests = [over_rest(http) for _ in range(30)]
    digests += [await over_grpc(stub) for _ in range(30)]
    digests += [await in_a_batch(stub, size) for size in range(1, 17)]
    # Many at once: Triton's batcher puts them together as it likes.
    digests += await asyncio.gather(*(over_grpc(stub) for _ in range(24)))
    assert len(digests) == 100
    assert len(set(digests)) == 1


async def test_one_digest_under_load(stub: Stub) -> None:
    """Two streams fill the batches in which the seed is asked for, alone, in a batch and in a stream of its own."""
    alone = await over_grpc(stub)
    calls = [
        stub.StreamSamples(pb.StreamSamplesRequest(model="faces", start_seed=start, window=16, options=RAW))
        for start in (5000, 6000)
    ]

    async def drain(call: AsyncIterator[pb.StreamSamplesResponse]) -> None:
        async for _ in call:
            pass

    readers = [asyncio.create_task(drain(call)) for call in calls]
    try:
        digests = await asyncio.gather(*(over_grpc(stub) for _ in range(8)), *(in_a_batch(stub, 4) for _ in range(2)))
        request = pb.StreamSamplesRequest(model="faces", start_seed=SEED, count=1, options=RAW)
        streamed = [m.sample async for m in stub.StreamSamples(request) if m.HasField("sample")]
        digests += [digest(sample.image.data, sample.label.data) for sample in streamed]
        assert not any(reader.done() for reader in readers), "the load went on"
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    assert len(digests) == 11 and set(digests) == {alone}


@pytest_asyncio.fixture(scope="module")
async def staged(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stub]:
    running = start_service(tmp_path_factory.mktemp("staged") / "serve.log", "--pipeline", "staged")
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        yield pb_grpc.SampleServiceStub(channel)
    assert running.stop() == 0


async def test_staged_and_fused_agree(stub: Stub, staged: Stub) -> None:
    model = (await staged.GetModel(pb.GetModelRequest(model="faces"))).model
    assert model.pipeline == "staged"
    assert model.digest != (await stub.GetModel(pb.GetModelRequest(model="faces"))).model.digest
    same = total = 0
    for seed in range(12):
        request = pb.GetSampleRequest(model="faces", seed=seed, options=RAW)
        one = (await stub.GetSample(request)).sample
        other = (await staged.GetSample(request)).sample
        assert one.image.data == other.image.data
        labels = [np.frombuffer(sample.label.data, np.uint8) for sample in (one, other)]
        same += int((labels[0] == labels[1]).sum())
        total += labels[0].size
        assert other.js_score == pytest.approx(one.js_score, rel=1e-4)
    assert same / total >= 0.9999


async def test_staged_batches_keep_the_identity_too(staged: Stub) -> None:
    digests = {await over_grpc(staged), *(await asyncio.gather(*(over_grpc(staged) for _ in range(4))))}
    digests |= {await in_a_batch(staged, size) for size in (2, 5)}
    assert len(digests) == 1
