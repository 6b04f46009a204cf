"""Load: bounded admission, fair turns, and work that ends with its client, counted in a real Triton's executions."""

import asyncio
from collections.abc import Awaitable

import grpc
import grpc.aio
import httpx
import pytest

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from tests.support.gateways import Gateway, StartGateway, inferences, release
from tests.support.metrics import DEMAND, IN_TRITON, REST_IN_FLIGHT
from tests.support.waiting import until
from tests.support.wire import info_of, pause_of, problem

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ANY = pb.SampleOptions(max_js=1e9)
SLOTS = 4  # of narrow_gateway
WAITING = 'labelmint_queue_depth_samples{kind="request"}'
STREAMS_WAITING = 'labelmint_queue_depth_samples{kind="stream"}'
BATCH = 16


def get(gateway: Gateway, seed: int, model: str = "held", timeout: float | None = None) -> Awaitable[pb.Sample]:
    return gateway.stub.GetSample(pb.GetSampleRequest(model=model, seed=seed, options=ANY), timeout=timeout)


async def held(server: TritonServer) -> int:
    """How many samples Triton has taken up of `held`."""
    return (await inferences(server, "held_generator"))[0]


async def check_only_slots_ran(gateway: Gateway, server: TritonServer, before: int) -> None:
    """Triton got as many samples as there are slots, and gets no more when their slots are free.

    If it got more or fewer, `release` fails.
    """
    await release(server, BATCH - SLOTS)
    await gateway.until(IN_TRITON, lambda samples: samples == 0)
    assert await gateway.metric(DEMAND) == 0
    assert (await get(gateway, 0, "light")).sample.seed == 0  # whatever was still on its way has passed
    assert await held(server) - before == BATCH


async def test_concurrent_requests_are_batched(gateway: Gateway, small_triton: TritonServer) -> None:
    samples, executions = await inferences(small_triton, "patient_generator")
    await asyncio.gather(*(get(gateway, seed, "patient") for seed in range(32)))
    after = await inferences(small_triton, "patient_generator")
    assert after[0] - samples == 32
    assert after[1] - executions <= 8


async def test_a_single_request_passes_four_greedy_streams(narrow_gateway: Gateway, small_triton: TritonServer) -> None:
    """In the order of arrival 4 x 64 samples would be minted before it; counted, not timed."""
    calls = [
        narrow_gateway.stub.StreamSamples(
            pb.StreamSamplesRequest(model="light", start_seed=1000 * index, window=64, options=ANY)
        )
        for index in range(4)
    ]
    delivered = [0] * 4

    async def greedy(index: int) -> None:
        async for message in calls[index]:
            delivered[index] += message.HasField("sample")

    readers = [asyncio.create_task(greedy(index)) for index in range(4)]
    try:
        await until(lambda: min(delivered) > 0)
        await narrow_gateway.until(DEMAND, lambda demand: demand > 0)
        growth = []
        for seed in range(9):
            before = (await inferences(small_triton, "light_generator"))[0]
            await get(narrow_gateway, seed, "light")
            growth.append((await inferences(small_triton, "light_generator"))[0] - before)
        assert sorted(growth)[4] <= 64, growth
        assert max(delivered) <= 3 * min(delivered) + 128, "the streams share fairly"
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def test_what_waits_for_a_client_that_left_is_never_run(
    narrow_gateway: Gateway, small_triton: TritonServer
) -> None:
    before = await held(small_triton)
    asked = [asyncio.ensure_future(get(narrow_gateway, seed)) for seed in range(20)]
    await narrow_gateway.until(WAITING, lambda depth: depth == 20 - SLOTS)
    await narrow_gateway.until(DEMAND, lambda demand: demand == 20)
    await narrow_gateway.until(IN_TRITON, lambda samples: samples == SLOTS)
    for call in asked:
        call.cancel()
    await narrow_gateway.until(DEMAND, lambda demand: demand == 0)
    await narrow_gateway.until(WAITING, lambda depth: depth == 0)
    await asyncio.gather(*asked, return_exceptions=True)
    await check_only_slots_ran(narrow_gateway, small_triton, before)


async def test_what_waits_until_its_deadline_is_never_run(narrow_gateway: Gateway, small_triton: TritonServer) -> None:
    before = await held(small_triton)
    asked = [asyncio.ensure_future(get(narrow_gateway, seed)) for seed in range(SLOTS)]
    await narrow_gateway.until(IN_TRITON, lambda samples: samples == SLOTS)
    late = (get(narrow_gateway, seed, timeout=1.0) for seed in range(20))
    outcomes = await asyncio.gather(*late, return_exceptions=True)
    codes = [outcome.code() for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 20
    await narrow_gateway.until(DEMAND, lambda demand: demand == SLOTS)
    assert not any(call.done() for call in asked)
    await check_only_slots_ran(narrow_gateway, small_triton, before)
    assert [answer.sample.seed for answer in await asyncio.gather(*asked)] == list(range(SLOTS))


async def test_http_clients_that_disconnect_take_their_work_along(
    narrow_gateway: Gateway, small_triton: TritonServer
) -> None:
    before = await held(small_triton)
    async with httpx.AsyncClient(base_url=narrow_gateway.service.http, timeout=60.0) as leaving:
        batch = leaving.post("/v1/models/held/samples:batchGet", json={"seeds": list(range(10)), "max_js": 1e9})
        singles = [leaving.get(f"/v1/models/held/samples/{seed}?max_js=1e9") for seed in range(10)]
        asked = [asyncio.create_task(request) for request in (batch, *singles)]
        await narrow_gateway.until(WAITING, lambda depth: depth == 20 - SLOTS)
        for request in asked:
            request.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    await narrow_gateway.until(DEMAND, lambda demand: demand == 0)
    await narrow_gateway.until(REST_IN_FLIGHT, lambda count: count == 1)  # this one
    await check_only_slots_ran(narrow_gateway, small_triton, before)
    log = narrow_gateway.service.log.read_text().splitlines()
    assert [line for line in log if "error" in line.lower()] == []


async def test_a_stream_that_ends_takes_its_work_along(narrow_gateway: Gateway, small_triton: TritonServer) -> None:
    before = await held(small_triton)
    request = pb.StreamSamplesRequest(model="held", window=40, options=ANY)
    left = narrow_gateway.stub.StreamSamples(request)
    await narrow_gateway.until(STREAMS_WAITING, lambda depth: depth == 40 - SLOTS)
    await narrow_gateway.until(DEMAND, lambda demand: demand == 40)
    left.cancel()
    await narrow_gateway.until(DEMAND, lambda demand: demand == 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in narrow_gateway.stub.StreamSamples(request, timeout=1.0):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await narrow_gateway.until(DEMAND, lambda demand: demand == 0)
    await check_only_slots_ran(narrow_gateway, small_triton, before)


async def test_nothing_is_called_off_in_triton(narrow_gateway: Gateway, small_triton: TritonServer) -> None:
    """Triton 2.51 may end when a call is cancelled, so clients and deadlines that leave are kept from it."""
    before = await called_off(small_triton)
    left = [asyncio.ensure_future(get(narrow_gateway, seed)) for seed in range(SLOTS // 2)]
    late = [asyncio.ensure_future(get(narrow_gateway, seed, timeout=5.0)) for seed in range(SLOTS // 2)]
    await narrow_gateway.until(IN_TRITON, lambda samples: samples == SLOTS)
    for call in left:
        call.cancel()
    await asyncio.gather(*left, *late, return_exceptions=True)
    await narrow_gateway.until(DEMAND, lambda demand: demand == 0)
    assert await narrow_gateway.metric(IN_TRITON) == SLOTS, "they keep their slots"
    await release(small_triton, BATCH - SLOTS)
    await narrow_gateway.until(IN_TRITON, lambda samples: samples == 0)
    assert await called_off(small_triton) == before
    assert (await get(narrow_gateway, 0, "light")).sample.seed == 0


async def called_off(server: TritonServer) -> list[str]:
    """What Triton counts as cancelled."""
    async with httpx.AsyncClient() as client:
        lines = (await client.get(server.metrics_url)).text.splitlines()
    counters = [line for line in lines if line.startswith("nv_inference_request_failure") and "CANCELED" in line]
    assert counters
    return counters


async def test_what_is_owed_to_a_bounded_stream_is_what_remains(
    narrow_gateway: Gateway, small_triton: TritonServer
) -> None:
    request = pb.StreamSamplesRequest(model="held", count=3, window=40, options=ANY)
    call = narrow_gateway.stub.StreamSamples(request)
    await narrow_gateway.until(IN_TRITON, lambda samples: samples == 3)
    assert await narrow_gateway.metric(DEMAND) == 3
    await release(small_triton, BATCH - 3)
    seeds = [message.sample.seed async for message in call if message.HasField("sample")]
    assert seeds == [0, 1, 2]
    await narrow_gateway.until(DEMAND, lambda demand: demand == 0)


async def test_admission_is_bounded_and_says_when_to_come_back(
    start_gateway: StartGateway, small_triton: TritonServer
) -> None:
    limits = ("--max-in-flight", "5", "--max-streams", "2", "--max-window", "3", "--triton-slots", "1")
    async with start_gateway(*limits) as bounded:
        held = [asyncio.ensure_future(get(bounded, seed)) for seed in range(5)]
        await bounded.until(DEMAND, lambda demand: demand == 5)
        with pytest.raises(grpc.aio.AioRpcError, match="5 samples are in flight and the limit is 5") as caught:
            await get(bounded, 5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert info_of(caught.value).reason == "OVERLOADED" and pause_of(caught.value) == 1
        refused = await bounded.http.get("/v1/models/held/samples/5?max_js=1e9")
        problem(refused, 429, "OVERLOADED")
        assert refused.headers["retry-after"] == "1"
        request = pb.StreamSamplesRequest(model="held", options=ANY)
        streams = [bounded.stub.StreamSamples(request) for _ in range(2)]
        await bounded.until(DEMAND, lambda demand: demand == 5 + 2 * 3)  # the default window is the largest here
        with pytest.raises(grpc.aio.AioRpcError, match="2 streams are open, which is the limit") as caught:
            await bounded.stub.StreamSamples(request).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and pause_of(caught.value) == 1
        for call in (*held, *streams):
            call.cancel()
        await bounded.until(DEMAND, lambda demand: demand == 0)
        await release(small_triton, BATCH - 1)
        assert (await get(bounded, 5, "light")).sample.seed == 5
        # A batch beyond the limit goes through when it is alone: it could never be admitted otherwise.
        batch = pb.BatchGetSamplesRequest(model="light", seeds=range(8), options=ANY)
        assert len((await bounded.stub.BatchGetSamples(batch)).outcomes) == 8


@pytest.mark.parametrize("model", ["first", "second"])
async def test_a_full_queue_in_triton_is_overload_and_nothing_hangs(gateway: Gateway, model: str) -> None:
    """One sample has room in the queue of that step; the others are refused in Triton, and soon."""
    outcomes = await asyncio.gather(*(get(gateway, seed, model) for seed in range(8)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert 0 < len(refused) < 8
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert info_of(error).reason == "OVERLOADED" and pause_of(error) == 1
        assert "Triton's queue is full" in str(error.details())
    assert (await get(gateway, 1, model)).sample.seed == 1
