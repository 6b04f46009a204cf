"""A gateway with an index of seeds: what it lists, and that its streams are those of a gateway without one.

Rules of this file:
- The index is written from what the Triton of the tests gives for each seed of `light`, which has the classes a and b.
- The reference is a gateway without an index before the same Triton.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
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
from tests.support.gateways import Gateway, StartGateway
from tests.support.seed_index import Columns, real_columns, rows, served, write
from tests.support.wire import info_of, problem

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
