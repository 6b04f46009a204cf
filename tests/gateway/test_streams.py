"""Streams for training jobs: in order, resumable, alive while nothing is accepted, no further ahead than the window."""

import asyncio
import io
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from PIL import Image

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.support.gateways import Gateway
from tests.support.metrics import DEMAND
from tests.support.waiting import until
from tests.support.wire import info_of

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ALL = pb.SampleOptions(max_js=1e9, image_encoding=pb.ENCODING_RAW, label_encoding=pb.ENCODING_RAW, include_js_map=True)
NONE = pb.SampleOptions(max_js=0)


def stream(gateway: Gateway, model: str = "light", **arguments: object) -> pb.StreamSamplesResponse:
    return gateway.stub.StreamSamples(pb.StreamSamplesRequest(model=model, **arguments))  # type: ignore[arg-type]


async def test_a_heartbeat_says_how_far_a_walk_is_while_nothing_is_accepted(gateway: Gateway) -> None:
    call = stream(gateway, start_seed=100, shard_index=1, shard_count=3, options=NONE)
    beats = [await call.read() for _ in range(3)]
    call.cancel()
    for beat in beats:
        assert not beat.HasField("sample")
        assert beat.rejected_count == len([seed for seed in range(100, beat.next_seed) if seed % 3 == 1])
    assert 100 < beats[0].next_seed < beats[1].next_seed < beats[2].next_seed
    resumed = stream(gateway, start_seed=beats[2].next_seed, shard_index=1, shard_count=3, options=NONE)
    again = await resumed.read()
    resumed.cancel()
    assert again.rejected_count == len([s for s in range(beats[2].next_seed, again.next_seed) if s % 3 == 1])


async def test_a_heartbeat_comes_while_triton_is_slow(gateway: Gateway) -> None:
    messages = [message async for message in stream(gateway, "patient", start_seed=5, count=1, options=ALL)]
    assert len(messages) >= 2 and messages[-1].sample.seed == 5
    assert all(m.next_seed == 5 and not m.HasField("sample") and m.rejected_count == 0 for m in messages[:-1])


async def test_the_last_rejected_seeds_are_told(gateway: Gateway) -> None:
    messages = [message async for message in stream(gateway, start_seed=2**32 - 3, options=NONE)]
    assert not messages[-1].HasField("sample")
    assert (messages[-1].next_seed, messages[-1].rejected_count) == (2**32, 3)


async def test_resuming_from_every_message_gives_each_accepted_seed_once(gateway: Gateway) -> None:
    """The walk is cut after each message; what was delivered is what one walk delivers."""
    everything = [m.sample async for m in stream(gateway, count=40, options=ALL) if m.HasField("sample")]
    gate = pb.SampleOptions(max_js=float(np.median([sample.js_score for sample in everything])))
    want = [sample.seed for sample in everything if sample.js_score <= gate.max_js][:15]
    got, next_seed = [], 0
    while len(got) < len(want):
        call = stream(gateway, start_seed=next_seed, window=3, options=gate)
        message = await call.read()
        call.cancel()
        assert message.next_seed > next_seed or not message.HasField("sample")
        next_seed = message.next_seed
        got += [message.sample.seed] if message.HasField("sample") else []
    assert got == want


@pytest.mark.parametrize("window", [1, 2, 64])
async def test_every_window_gives_the_same_samples(gateway: Gateway, window: int) -> None:
    messages = [m async for m in stream(gateway, count=12, window=window, options=ALL) if m.HasField("sample")]
    alone = await gateway.stub.GetSample(pb.GetSampleRequest(model="light", seed=11, options=ALL))
    assert [message.sample.seed for message in messages] == list(range(12))
    assert messages[11].sample == alone.sample


async def test_a_window_is_bounded(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="window: 65 is out of range; give 1 to 64, or 0") as caught:
        await stream(gateway, window=65, options=ALL).read()
    assert info_of(caught.value).reason == "INVALID_REQUEST"


async def test_a_slow_reader_is_waited_for(gateway: Gateway) -> None:
    """32 KiB a message: beyond the window only the transport's buffers are filled, which this client keeps small."""
    count = 'labelmint_samples_total{model="light",outcome="accepted",version="1"}'
    before, resident = await gateway.metric(count), rss(gateway)
    async with grpc.aio.insecure_channel(gateway.service.grpc, [("grpc.http2.bdp_probe", 0)]) as channel:
        slow = Gateway(gateway.service, pb_grpc.SampleServiceStub(channel), gateway.http)
        call = stream(slow, start_seed=0, window=8, options=ALL)
        while not (message := await call.read()).HasField("sample"):
            pass
        seeds = [message.sample.seed]
        minted = 0.0

        async def stands_still() -> bool:
            nonlocal minted
            last, minted = minted, await gateway.metric(count) - before
            await asyncio.sleep(1.0)
            return minted == last and await gateway.metric(DEMAND) == 0  # what is ready is not owed

        await until(stands_still)
        assert 1 + 8 <= minted <= 1 + 8 + 8
        assert rss(gateway) - resident < 32 << 20
        while len(seeds) < 100:
            message = await call.read()
            if message.HasField("sample"):
                seeds.append(message.sample.seed)
        call.cancel()
    assert seeds == list(range(100))


def rss(gateway: Gateway) -> int:
    """Resident bytes of the gateway's process."""
    return int(Path(f"/proc/{gateway.service.process.pid}/statm").read_text().split()[1]) * 4096


async def test_what_is_omitted_does_not_come_and_the_rest_is_the_same(gateway: Gateway) -> None:
    async def get(options: pb.SampleOptions) -> pb.Sample:
        return (await gateway.stub.GetSample(pb.GetSampleRequest(model="light", seed=3, options=options))).sample

    whole = await get(ALL)
    label_only = await get(pb.SampleOptions(max_js=1e9, omit_image=True, label_encoding=pb.ENCODING_RAW))
    image_only = await get(pb.SampleOptions(max_js=1e9, omit_label=True, image_encoding=pb.ENCODING_RAW))
    score_only = await get(pb.SampleOptions(max_js=1e9, omit_image=True, omit_label=True))
    assert not label_only.HasField("image") and label_only.label == whole.label and not label_only.js_map
    assert not image_only.HasField("label") and image_only.image == whole.image
    assert not score_only.HasField("image") and not score_only.HasField("label")
    assert {sample.js_score for sample in (whole, label_only, image_only, score_only)} == {whole.js_score}


async def test_jpeg_is_the_image_nearly(gateway: Gateway) -> None:
    options = pb.SampleOptions(max_js=1e9, image_encoding=pb.ENCODING_JPEG)
    request = pb.GetSampleRequest(model="light", seed=3, options=options)
    sample = (await gateway.stub.GetSample(request)).sample
    raw = (await gateway.stub.GetSample(pb.GetSampleRequest(model="light", seed=3, options=ALL))).sample
    picture = Image.open(io.BytesIO(sample.image.data))
    assert picture.format == "JPEG" and sample.image.encoding == pb.ENCODING_JPEG
    exact = np.frombuffer(raw.image.data, np.uint8).reshape(64, 64, 3)
    assert np.abs(np.asarray(picture).astype(int) - exact).mean() < 4
    assert sample.label.encoding == pb.ENCODING_PNG
    assert sample == (await gateway.stub.GetSample(request)).sample


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        ({"label_encoding": pb.ENCODING_JPEG}, "label_encoding", "class ids, which JPEG would change"),
        ({"omit_image": True, "image_encoding": pb.ENCODING_PNG}, "image_encoding", "omit_image leaves nothing"),
        ({"omit_label": True, "label_encoding": pb.ENCODING_RAW}, "label_encoding", "omit_label leaves nothing"),
    ],
)
async def test_encodings_of_what_cannot_be_encoded(
    gateway: Gateway, options: dict[str, object], field: str, problem: str
) -> None:
    asked = pb.SampleOptions(max_js=1e9, **options)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError, match=problem) as caught:
        await stream(gateway, options=asked).read()
    assert dict(info_of(caught.value).metadata) == {"field": f"options.{field}", "next_seed": "0"}
