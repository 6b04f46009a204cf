"""gRPC over a real service, through the generated stub."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from labelmint.gateway.grpc import reflection
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service
from tests.support.metrics import GRPC_IN_FLIGHT, IN_TRITON, metric
from tests.support.waiting import until
from tests.support.wire import LOOSE, RAW, info_of

pytestmark = pytest.mark.triton


Stub = pb_grpc.SampleServiceStub


async def test_a_pair_in_raw_bytes(stub: Stub) -> None:
    options = pb.SampleOptions()
    options.CopyFrom(RAW)
    options.include_js_map = True
    sample = (await stub.GetSample(pb.GetSampleRequest(model="faces", seed=7, options=options))).sample
    image = np.frombuffer(sample.image.data, np.uint8).reshape(sample.image.height, sample.image.width, 3)
    label = np.frombuffer(sample.label.data, np.uint8).reshape(sample.label.height, sample.label.width)
    js_map = np.frombuffer(sample.js_map, "<f4").reshape(label.shape)
    assert image.shape == (128, 128, 3) and label.max() < 12
    assert float(js_map.sum()) == pytest.approx(sample.js_score, rel=1e-4)
    assert sample.accepted == (sample.js_score <= sample.threshold)
    assert sample.image.encoding == sample.label.encoding == pb.ENCODING_RAW


async def test_models(stub: Stub) -> None:
    model = (await stub.GetModel(pb.GetModelRequest(model="faces"))).model
    models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [entry.name for entry in models] == sorted(entry.name for entry in models)
    assert model in models and model.task == "segmentation" and not model.keypoint_classes
    assert [entry.name for entry in model.classes][:2] == ["background", "hair"]
    assert len(model.calibration.quantiles) == 101 and model.resolution == 128


async def test_a_batch_has_an_outcome_for_every_seed(stub: Stub) -> None:
    request = pb.BatchGetSamplesRequest(model="faces", seeds=[5, 4, 6], options=pb.SampleOptions(max_js=0))
    outcomes = (await stub.BatchGetSamples(request)).outcomes
    assert [outcome.rejection.seed for outcome in outcomes] == [5, 4, 6]
    assert all(outcome.WhichOneof("outcome") == "rejection" for outcome in outcomes)


async def collect(stub: Stub, **arguments: object) -> list[pb.StreamSamplesResponse]:
    request = pb.StreamSamplesRequest(model="faces", **arguments)  # type: ignore[arg-type]
    messages = [message async for message in stub.StreamSamples(request)]
    return [message for message in messages if message.HasField("sample")]  # a slow machine has heartbeats between


async def test_a_stream_walks_in_order_and_counts_its_holes(stub: Stub) -> None:
    everything = await collect(stub, start_seed=100, count=12, options=LOOSE)
    assert [message.sample.seed for message in everything] == list(range(100, 112))
    scores = sorted(message.sample.js_score for message in everything)
    gate = pb.SampleOptions(max_js=scores[7])
    kept = [message.sample.seed for message in everything if message.sample.js_score <= scores[7]]
    some = await collect(stub, start_seed=100, count=len(kept), options=gate)
    assert [message.sample.seed for message in some] == kept
    for message in some:
        holes = message.sample.seed + 1 - 100 - (kept.index(message.sample.seed) + 1)
        assert message.rejected_count == holes
        assert message.next_seed == message.sample.seed + 1


async def test_a_stream_resumes_from_next_seed(stub: Stub) -> None:
    whole = await collect(stub, start_seed=200, count=8, options=LOOSE)
    first = await collect(stub, start_seed=200, count=3, options=LOOSE)
    rest = await collect(stub, start_seed=first[-1].next_seed, count=5, options=LOOSE)
    assert [m.sample for m in first + rest] == [m.sample for m in whole]


async def test_shards_part_a_walk(stub: Stub) -> None:
    shards = await asyncio.gather(
        *(collect(stub, start_seed=300, count=3, shard_index=k, shard_count=3, options=LOOSE) for k in range(3))
    )
    seeds = [[message.sample.seed for message in shard] for shard in shards]
    assert all(seed % 3 == k for k, shard in enumerate(seeds) for seed in shard)
    assert sorted(seed for shard in seeds for seed in shard) == list(range(300, 309))


async def test_a_walk_ends_at_the_last_seed(stub: Stub) -> None:
    messages = await collect(stub, start_seed=2**32 - 2, options=LOOSE)
    assert [message.sample.seed for message in messages] == [2**32 - 2, 2**32 - 1]
    assert messages[-1].next_seed == 2**32
    assert await collect(stub, start_seed=2**32, options=LOOSE) == []


async def test_leaving_a_stream_stops_it(stub: Stub, http: httpx.Client) -> None:
    call = stub.StreamSamples(pb.StreamSamplesRequest(model="faces", start_seed=0, options=LOOSE))
    async for _ in call:
        break
    assert metric(http, GRPC_IN_FLIGHT) >= 1
    call.cancel()
    for gauge in (GRPC_IN_FLIGHT, IN_TRITON):
        await until(lambda gauge=gauge: metric(http, gauge) == 0)  # type: ignore[misc]


async def test_rejection_carries_the_evidence(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetSample(pb.GetSampleRequest(model="faces", seed=7, options=pb.SampleOptions(max_js=0)))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    info = info_of(caught.value)
    assert info.reason == "SAMPLE_REJECTED"
    assert info.metadata["threshold"] == "0.0" and float(info.metadata["js_score"]) > 0


@pytest.mark.parametrize(
    ("request_", "code", "reason", "metadata"),
    [
        (pb.GetSampleRequest(model="cats", seed=1), "NOT_FOUND", "MODEL_NOT_FOUND", {"model": "cats"}),
        (pb.GetSampleRequest(seed=1), "NOT_FOUND", "MODEL_NOT_FOUND", {"model": ""}),
        (pb.GetSampleRequest(model="faces", seed=2**32), "INVALID_ARGUMENT", "INVALID_REQUEST", {"field": "seed"}),
        (
            pb.GetSampleRequest(model="faces", options=pb.SampleOptions(truncation_psi=-1)),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            {"field": "truncation_psi"},
        ),
        (
            pb.GetSampleRequest(model="faces", options=pb.SampleOptions(truncation_psi=0.3)),
            "INVALID_ARGUMENT",
            "UNCALIBRATED",
            {"field": "truncation_psi"},
        ),
        (
            pb.GetSampleRequest(model="faces", options=pb.SampleOptions(image_encoding=17)),  # type: ignore[arg-type]
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            {"field": "options.image_encoding"},
        ),
        (
            pb.GetSampleRequest(model="faces", options=pb.SampleOptions(max_quantile=float("nan"))),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            {"field": "max_quantile"},
        ),
    ],
)
async def test_bad_input(
    stub: Stub, request_: pb.GetSampleRequest, code: str, reason: str, metadata: dict[str, str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetSample(request_)
    assert caught.value.code().name == code
    info = info_of(caught.value)
    assert (info.reason, dict(info.metadata)) == (reason, metadata)
    assert "Traceback" not in str(caught.value.details())


async def test_batch_and_stream_refuse_what_cannot_be(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="65 given; a batch takes 1 to 64"):
        await stub.BatchGetSamples(pb.BatchGetSamplesRequest(model="faces", seeds=range(65)))
    with pytest.raises(grpc.aio.AioRpcError, match="shard_index: 2 is out of range; give 0 to 1"):
        await collect(stub, shard_index=2, shard_count=2)


async def test_a_name_too_long_for_the_trailers_is_still_not_found(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetSample(pb.GetSampleRequest(model="x" * 20_000, seed=7))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert info_of(caught.value).metadata["model"] == "x" * 64 + "..."


async def test_health_and_reflection(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "labelmint.v1.SampleService"):

            async def serves(name: str = name) -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                return answer.status == health_pb2.HealthCheckResponse.SERVING

            await until(serves)
        older = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [answer async for answer in older.ServerReflectionInfo(iter([request]))]
        names = {entry.name for entry in answer.list_services_response.service}
        assert {"labelmint.v1.SampleService", "grpc.health.v1.Health"} <= names


def ask_v1(channel: grpc.aio.Channel, **asked: object) -> AsyncIterator[Message]:
    """As a client of grpc.reflection.v1 does: by its own messages, made of its own description."""
    service = reflection.SERVICE
    request, response = (
        GetMessageClass(each) for each in (service.methods[0].input_type, service.methods[0].output_type)
    )
    call = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", request.SerializeToString, response.FromString
    )
    return aiter(call(iter([request(**asked)])))


async def test_reflection_v1_describes_everything_itself_included(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        listing = [answer async for answer in ask_v1(channel, list_services="")]
        names = {entry.name for entry in listing[0].list_services_response.service}  # type: ignore[attr-defined]
        assert names == {
            "labelmint.v1.SampleService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for name in names:
            (answer,) = [answer async for answer in ask_v1(channel, file_containing_symbol=name)]
            files = answer.file_descriptor_response.file_descriptor_proto  # type: ignore[attr-defined]
            described = [descriptor_pb2.FileDescriptorProto.FromString(each) for each in files]
            assert name in {f"{file.package}.{each.name}" for file in described for each in file.service}
