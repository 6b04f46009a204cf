"""A gateway with an index of seeds: what it lists, and that its streams are those of a gateway without one.

Rules of this file:
- The index is written from what the Triton of the tests gives for each seed of `light`, which has the classes a and b.
- The reference is a gateway without an index before the same Triton.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio

from labelmint.core.served_model import ServedModel
from labelmint.seed_index.layout import Described
from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from tests.support.gateways import Gateway, StartGateway, inferences
from tests.support.seed_index import Columns, real_columns, rows, served, write
from tests.support.wire import info_of

pytestmark = [pytest.mark.triton, pytest.mark.torch]

SEEDS = 384
RANGES = (range(0, 96), range(96, 160), range(200, 320))  # of the files; there is a hole between the last two
LISTED = "/v1/models/light/seeds"


@pytest_asyncio.fixture(scope="module")
async def light(small_triton: TritonServer) -> ServedModel:
    return await served(small_triton.grpc_url, "light")


@pytest_asyncio.fixture(scope="module")
async def columns(small_triton: TritonServer, light: ServedModel) -> Columns:
    return await real_columns(small_triton.grpc_url, light, range(SEEDS), 1.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, light: ServedModel, columns: Columns) -> Path:
    directory = tmp_path_factory.mktemp("index")
    described = Described.of(light, truncation_psi=1.0, class_index=None)
    for number, seeds in enumerate(RANGES):
        write(directory / f"part{number % 2}" / f"{number}.parquet", described, rows(columns, seeds), group=37)
    return directory


@pytest_asyncio.fixture(scope="module")
async def indexed(start_gateway: StartGateway, index: Path) -> AsyncIterator[Gateway]:
    async with start_gateway("--index", str(index)) as running:
        yield running


def scores(columns: Columns) -> npt.NDArray[Any]:
    return columns["score_sum"]


async def listed(gateway: Gateway, options: pb.SampleOptions, **arguments: Any) -> pb.ListSeedsResponse:
    return await gateway.stub.ListSeeds(pb.ListSeedsRequest(model="light", options=options, **arguments))


def seeds_of(page: pb.ListSeedsResponse) -> list[int]:
    bits = np.unpackbits(np.frombuffer(page.delivered, np.uint8), bitorder="little")
    assert not bits[page.seed_count :].any() and bits.sum() == page.delivered_count
    assert len(page.delivered) == (page.seed_count + 7) // 8
    return [page.first_seed + int(place) for place in np.flatnonzero(bits)]


async def delivered(gateway: Gateway, options: pb.SampleOptions, seeds: range) -> list[int]:
    """The seeds of the samples that a stream delivers in a range."""
    options = pb.SampleOptions.FromString(options.SerializeToString())
    options.omit_image = options.omit_label = True
    found: list[int] = []
    call = gateway.stub.StreamSamples(pb.StreamSamplesRequest(model="light", start_seed=seeds.start, options=options))
    async for message in call:
        if message.next_seed > seeds.stop:
            call.cancel()
            break
        if message.HasField("sample"):
            found.append(message.sample.seed)
    return found


def area(low: float, high: float = 1.0) -> pb.Condition:
    return pb.Condition(name="a", min_area=low, max_area=high)


async def test_the_list_of_seeds_is_what_a_stream_delivers(
    gateway: Gateway, indexed: Gateway, columns: Columns
) -> None:
    score, shares = float(np.median(scores(columns))), np.sort(columns["pixels_a"]) / 4096
    for options in (
        pb.SampleOptions(max_js=score),
        pb.SampleOptions(max_js=1e9, where=[area(shares[100], shares[250])]),
        pb.SampleOptions(max_js=score, where=[area(shares[200])], include_rejected=True),
    ):
        for seeds in (range(0, 160), range(5, 158), range(200, 320)):
            page = await listed(indexed, options, start_seed=seeds.start, end_seed=seeds.stop)
            assert (page.first_seed, page.next_seed, page.end_seed) == (seeds.start, seeds.stop, seeds.stop)
            assert seeds_of(page) == await delivered(gateway, options, seeds)
            assert 0 < page.delivered_count < page.seed_count


@dataclass(frozen=True)
class Asked:
    """A random request for a walk."""

    request: pb.StreamSamplesRequest

    @classmethod
    def drawn(cls, draw: random.Random, columns: Columns) -> Asked:
        shares = [int(pixels) / 4096 for pixels in columns["pixels_a"]]
        where: list[pb.Condition] = []
        if draw.random() < 0.6:
            low, high = sorted(draw.sample(shares, 2))
            where = [draw.choice([area(low, high), area(low), area(0.0, high), area(max(shares))])]
            if draw.random() < 0.2:
                where = [pb.Condition(name="b", min_area=draw.choice(shares))]
        gate = draw.choice([1e9, *(float(draw.choice(scores(columns))) for _ in range(3))])
        options = pb.SampleOptions(
            max_js=gate,
            where=where,
            include_rejected=draw.random() < 0.3,
            omit_image=draw.random() < 0.5,
            omit_label=draw.random() < 0.5,
        )
        shards = draw.choice([1, 1, 1, 2, 5])
        return cls(
            pb.StreamSamplesRequest(
                model="light",
                start_seed=draw.choice([0, 0, draw.randrange(200), draw.randrange(300)]),
                shard_count=shards,
                shard_index=draw.randrange(shards),
                options=options,
                count=draw.choice([0, draw.randrange(1, 6), draw.randrange(1, 40)]),
                window=draw.choice([0, 1, 3, 16]),
            )
        )


Told = tuple[list[tuple[int, str]], list[tuple[int, int, int]], str]


async def told(gateway: Gateway, request: pb.StreamSamplesRequest, end: int) -> Told:
    """The samples of a stream, next_seed and the counts of each message with one, and how it ends at the latest at
    `end`: the messages without a sample come when they come, except the last one of a stream that ends by itself."""
    call = gateway.stub.StreamSamples(request)
    samples: list[tuple[int, str]] = []
    counts: list[tuple[int, int, int]] = []
    last: pb.StreamSamplesResponse | None = None
    try:
        async for message in call:
            if message.next_seed > end:
                call.cancel()
                return samples, counts, "beyond"
            last = message
            if message.HasField("sample"):
                content = message.sample.SerializeToString(deterministic=True)
                samples.append((message.sample.seed, hashlib.sha256(content).hexdigest()[:8]))
                counts.append((message.next_seed, message.rejected_count, message.filtered_count))
    except grpc.aio.AioRpcError as error:
        assert last is not None
        counts.append((last.next_seed, last.rejected_count, last.filtered_count))
        return samples, counts, f"{error.details()} {sorted(info_of(error).metadata.items())}"
    return samples, counts, "done"


async def test_a_stream_is_the_same_with_and_without_an_index(
    start_gateway: StartGateway, index: Path, columns: Columns
) -> None:
    draw = random.Random(20)
    ends: list[str] = []
    async with (
        start_gateway("--max-empty-seeds", "60") as plain,
        start_gateway("--max-empty-seeds", "60", "--index", str(index)) as indexed,
    ):
        for _ in range(50):
            request = Asked.drawn(draw, columns).request
            want = await told(plain, request, SEEDS - 20)
            got = await told(indexed, request, SEEDS - 20)
            assert got == want, f"{request}\n{got}\n{want}"
            ends.append(want[2])
        skipped = await indexed.metric('labelmint_index_seeds_total{model="light"}')
        outcomes = [
            [
                await each.metric(f'labelmint_samples_total{{model="light",outcome="{outcome}",version="1"}}')
                for outcome in ("accepted", "rejected", "filtered")
            ]
            for each in (plain, indexed)
        ]
    assert ends.count("done") > 10 and ends.count("beyond") > 5
    assert sum("60 seeds in a row" in end for end in ends) > 3
    assert skipped > 1000
    for one, other in zip(*outcomes, strict=True):  # what is begun ahead of an end differs
        assert abs(one - other) < 0.1 * sum(outcomes[0]), outcomes


async def test_triton_gets_only_what_is_delivered(
    indexed: Gateway, small_triton: TritonServer, columns: Columns
) -> None:
    rare = float(np.sort(columns["pixels_a"])[-12]) / 4096
    fits = [int(seed) for seed, pixels in enumerate(columns["pixels_a"]) if pixels / 4096 >= rare and seed < 160]
    assert len(fits) >= 3
    before = (await inferences(small_triton, "light_generator"))[0]
    options = pb.SampleOptions(max_js=1e9, where=[area(rare)], omit_image=True, omit_label=True)
    request = pb.StreamSamplesRequest(model="light", count=len(fits), options=options, window=16)
    got = [message async for message in indexed.stub.StreamSamples(request)]
    assert [message.sample.seed for message in got if message.HasField("sample")] == fits
    assert (await inferences(small_triton, "light_generator"))[0] - before == len(fits)
    assert got[-1].filtered_count == fits[-1] + 1 - len(fits)
