"""A gateway with an index of seeds: what it lists, and that its streams are those of a gateway without one.

Rules of this file:
- The index is written from what the Triton of the tests gives for each seed of `light`, which has the classes a and b.
- The reference is a gateway without an index before the same Triton.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
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
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import start_service
from tests.support.gateways import Gateway, StartGateway, inferences
from tests.support.inference import running
from tests.support.seed_index import Columns, real_columns, rows, served, write
from tests.support.wire import info_of, problem
from tests.torture import grpc_messages

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


Told = tuple[list[tuple[int, bool]], list[tuple[int, int, int]], str]


async def told(gateway: Gateway, request: pb.StreamSamplesRequest, end: int) -> Told:
    """The seeds of a stream and their verdicts, next_seed and the counts of each message with a sample, and its end.

    The stream ends at the latest at `end`. The messages without a sample come when they come, except the last one of a
    stream that ends by itself. What Triton computes is not compared: the index has no part in it.
    """
    call = gateway.stub.StreamSamples(request)
    samples: list[tuple[int, bool]] = []
    counts: list[tuple[int, int, int]] = []
    last: pb.StreamSamplesResponse | None = None
    try:
        async for message in call:
            if message.next_seed > end:
                call.cancel()
                return samples, counts, "beyond"
            last = message
            if message.HasField("sample"):
                samples.append((message.sample.seed, message.sample.accepted))
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
        for _ in range(25):
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
    assert ends.count("done") > 5 and ends.count("beyond") > 2
    assert sum("60 seeds in a row" in end for end in ends) > 1
    assert skipped > 500
    for one, other in zip(*outcomes, strict=True):  # what is begun ahead of an end differs
        assert abs(one - other) < 0.1 * sum(outcomes[0]), outcomes


async def settled(server: TritonServer) -> int:
    """How many samples of `light` Triton has generated, once those that earlier tests began have ended."""
    while True:
        before = (await inferences(server, "light_generator"))[0]
        await asyncio.sleep(1.0)
        if (await inferences(server, "light_generator"))[0] == before:
            return before


async def test_triton_gets_only_what_is_delivered(
    indexed: Gateway, small_triton: TritonServer, columns: Columns
) -> None:
    rare = float(np.sort(columns["pixels_a"])[-12]) / 4096
    fits = [int(seed) for seed, pixels in enumerate(columns["pixels_a"]) if pixels / 4096 >= rare and seed < 160]
    assert len(fits) >= 3
    before = await settled(small_triton)
    options = pb.SampleOptions(max_js=1e9, where=[area(rare)], omit_image=True, omit_label=True)
    request = pb.StreamSamplesRequest(model="light", count=len(fits), options=options, window=16)
    got = [message async for message in indexed.stub.StreamSamples(request)]
    assert [message.sample.seed for message in got if message.HasField("sample")] == fits
    assert (await inferences(small_triton, "light_generator"))[0] - before == len(fits)
    assert got[-1].filtered_count == fits[-1] + 1 - len(fits)


async def test_pages_of_a_list(indexed: Gateway, gateway: Gateway, columns: Columns) -> None:
    options = pb.SampleOptions(max_js=float(np.median(scores(columns))))
    whole = await listed(indexed, options, start_seed=3)
    assert (whole.first_seed, whole.end_seed, whole.next_seed) == (3, 160, 160), "the run ends at the hole"
    found, at = [], 3
    while at < 160:
        page = await listed(indexed, options, start_seed=at, end_seed=160, page_size=33)
        assert (page.first_seed, page.seed_count) == (at, min(33, 160 - at)) and page.end_seed == 160
        found += seeds_of(page)
        at = page.next_seed
    assert found == seeds_of(whole)
    empty = await listed(indexed, options, start_seed=160, end_seed=160)
    assert (empty.seed_count, empty.delivered, empty.next_seed) == (0, b"", 160)
    model = (await gateway.stub.GetModel(pb.GetModelRequest(model="light"))).model
    assert whole.model_digest == model.digest


WRONG = [
    ({"start_seed": 0, "end_seed": 161}, {}, "NOT_INDEXED", "seed 160 is not in the index"),
    ({"start_seed": 170}, {}, "NOT_INDEXED", "seed 170 is not in the index"),
    ({"start_seed": 150, "end_seed": 250}, {}, "NOT_INDEXED", "labelmint index light --seeds 160:250"),
    ({"end_seed": 9}, {"truncation_psi": 0.5}, "NOT_INDEXED", "truncation_psi 0.5; indexed: light with digest"),
    ({"end_seed": 9}, {"style_seed": 1, "crossover": 2}, "NOT_INDEXED", "unmixed samples only"),
    ({"start_seed": 9, "end_seed": 8}, {}, "INVALID_REQUEST", "end_seed"),
    ({"end_seed": 2**32 + 1}, {}, "INVALID_REQUEST", "end_seed"),
    ({"page_size": 2**23 + 1}, {}, "INVALID_REQUEST", "page_size"),
]


@pytest.mark.parametrize(("seeds", "options", "reason", "told"), WRONG)
async def test_what_cannot_be_listed(
    indexed: Gateway, seeds: dict[str, int], options: dict[str, float], reason: str, told: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=told) as refused:
        await listed(indexed, pb.SampleOptions(max_js=9.0, **options), **seeds)  # type: ignore[arg-type]
    info = info_of(refused.value)
    assert info.reason == reason
    if "seed 1" in told:
        assert json.loads(info.metadata["indexed"]) == [[0, 160], [200, 320]]
    answer = await indexed.http.get(LISTED, params={"max_js": 9.0, **seeds, **options})
    problem(answer, 422 if reason == "NOT_INDEXED" else 400, reason)
    assert reason != "NOT_INDEXED" or told in answer.json()["detail"]


async def test_a_gateway_without_an_index_says_how_to_make_one(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"--index\); run `labelmint index light --seeds 5:10 --trunc"):
        await listed(gateway, pb.SampleOptions(max_js=1.0), start_seed=5, end_seed=10)


async def test_the_list_over_rest(indexed: Gateway, columns: Columns) -> None:
    low = float(np.median(columns["pixels_a"])) / 4096
    asked = {"max_js": 1e9, "where": f"a:{low!r}..", "start_seed": 1, "end_seed": 150, "page_size": 100}
    answer = await indexed.http.get(LISTED, params=asked)
    options = pb.SampleOptions(max_js=1e9, where=[area(low)])
    page = await listed(indexed, options, start_seed=1, end_seed=150, page_size=100)
    body = answer.json()
    assert base64.b64decode(body.pop("delivered")) == page.delivered
    assert body == {each.name: value for each, value in page.ListFields() if each.name != "delivered"}
    again = await indexed.http.get(LISTED, params=asked, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    revision = (await indexed.http.get("/v1/models/light")).json()["revision"]
    pinned = await indexed.http.get(LISTED, params={**asked, "revision": revision})
    assert "immutable" in pinned.headers["cache-control"]
    del asked["end_seed"]
    unbounded = await indexed.http.get(LISTED, params={**asked, "revision": revision})
    assert unbounded.headers["cache-control"] == "public, no-cache", "an index may grow"
    assert (await indexed.http.get(LISTED, params={**asked, "revision": "0" * 16})).status_code == 409


def spread(columns: Columns, described: Described, count: int, place: int) -> dict[str, npt.NDArray[Any]]:
    """Columns of `count` seeds that are all rejected but for `place`."""
    far: dict[str, npt.NDArray[Any]] = {name: np.zeros(count, column.dtype) for name, column in columns.items()}
    far["seed"] = np.arange(count, dtype=np.uint32)
    far[described.score_column][:] = np.nan
    far[described.score_column][place] = 1.0
    return far


async def test_a_class_that_one_seed_in_a_million_has_comes_at_once(
    start_gateway: StartGateway, light: ServedModel, columns: Columns, tmp_path: Path
) -> None:
    described = Described.of(light, truncation_psi=1.0, class_index=None)
    place = 999_123
    write(tmp_path / "index" / "far.parquet", described, spread(columns, described, 1_000_000, place))
    tokens = tmp_path / "tokens"
    tokens.write_text(f"me {hashlib.sha256(b'mine').hexdigest()}\n")
    arguments = ("--index", str(tmp_path / "index"), "--tokens-file", str(tokens))
    token = [("authorization", "Bearer mine")]
    options = pb.SampleOptions(max_js=1e9, omit_image=True)
    async with start_gateway(*arguments) as far:
        request = pb.StreamSamplesRequest(model="light", count=1, options=options)
        begun = time.monotonic()
        messages = [message async for message in far.stub.StreamSamples(request, metadata=token)]
        assert time.monotonic() - begun < 5.0
        assert [m.sample.seed for m in messages if m.HasField("sample")] == [place]
        assert messages[-1].rejected_count == place and messages[-1].next_seed == place + 1
        far.http.headers["authorization"] = "Bearer mine"
        assert await far.metric('labelmint_caller_samples_total{caller="me"}') == 1, "skipped seeds are not charged"
        assert await far.metric('labelmint_index_seeds_total{model="light"}') == place
        assert await far.metric('labelmint_samples_total{model="light",outcome="rejected",version="1"}') == place
        assert await far.metric('labelmint_js_score_nats_count{model="light",version="1"}') == 0
        await far.stub.ListSeeds(pb.ListSeedsRequest(model="light", options=options), metadata=token)
        begun = time.monotonic()
        page = await far.stub.ListSeeds(pb.ListSeedsRequest(model="light", options=options), metadata=token)
        assert time.monotonic() - begun < 1.0
        assert (page.seed_count, seeds_of(page)) == (1_000_000, [place])
        assert await far.metric('labelmint_caller_samples_total{caller="me"}') == 1, "listing is not charged"


def remove(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [remove, damage])
async def test_the_gateway_goes_on_without_a_file_that_it_cannot_read_any_more(
    start_gateway: StartGateway, gateway: Gateway, index: Path, columns: Columns, tmp_path: Path, change: Any
) -> None:
    copied = Path(shutil.copytree(index, tmp_path / "index"))
    options = pb.SampleOptions(max_js=float(np.median(scores(columns))), omit_image=True, omit_label=True)
    async with start_gateway("--index", str(copied)) as running:
        change(copied / "part1" / "1.parquet")
        request = pb.StreamSamplesRequest(model="light", options=options, window=4)
        assert await told(running, request, 330) == await told(gateway, request, 330)
        with pytest.raises(grpc.aio.AioRpcError, match="seed 96 is not in the index, which has the seeds 0 to 95, 200"):
            await listed(running, options, end_seed=160)
        assert await told(running, request, 200) == await told(gateway, request, 200)
        log = running.service.log.read_text()
        assert log.count("going on without a file of the index") == 1 and "1.parquet" in log


async def test_an_index_of_another_digest_is_never_used(
    start_gateway: StartGateway, light: ServedModel, columns: Columns, tmp_path: Path
) -> None:
    other = Described.of(replace(light, digest="0" * 64), truncation_psi=1.0, class_index=None)
    write(tmp_path / "index" / "other.parquet", other, columns)
    options = pb.SampleOptions(max_js=1e9, omit_image=True)
    async with start_gateway("--index", str(tmp_path / "index")) as running:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="has no samples of model 'light'") as refused:
                await listed(running, options)
            assert info_of(refused.value).reason == "NOT_INDEXED"
        request = pb.StreamSamplesRequest(model="light", count=3, options=options)
        samples = [message.sample.seed async for message in running.stub.StreamSamples(request)]
        assert samples == [0, 1, 2]
        log = running.service.log.read_text()
        assert log.count("not using the index") == 1 and "digest 000000000000" in log


def test_a_gateway_with_its_own_triton_refuses_an_index_of_another_digest(
    light: ServedModel, columns: Columns, light_repository: Path, tmp_path: Path
) -> None:
    other = Described.of(replace(light, digest="0" * 64), truncation_psi=1.0, class_index=None)
    write(tmp_path / "index" / "other.parquet", other, columns)
    refused = serve("--model-repository", str(light_repository), "--index", str(tmp_path / "index"))
    assert refused.returncode == 2
    assert refused.stderr.count("describes model") == 1
    line = refused.stderr.splitlines()[-1]
    assert line.startswith(f"labelmint: {tmp_path / 'index'} describes model 'light' with digest 000000000000...")
    (tmp_path / "index" / "text.parquet").write_text("no Parquet")
    refused = serve("--model-repository", str(light_repository), "--index", str(tmp_path / "index"))
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and "text.parquet" in line


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labelmint.cli", "serve", "--http-port", "0", "--grpc-port", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_missing_package_gets_one_line_of_advice(index: Path) -> None:
    script = (
        "import sys; sys.modules['pyarrow'] = None; from labelmint.cli import main; "
        f"sys.argv = ['labelmint', 'serve', '--http-port', '0', '--grpc-port', '0', '--index', {str(index)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "labelmint: an index of seeds needs pyarrow; run `pip install '.[index]'` in a clone of labelmint\n",
    )


async def test_keypoints(tmp_path: Path) -> None:
    from labelmint.export.repository import export_repository  # here: most tests need no torch
    from tests.support.models import random_interpreter, small

    generator, _ = small()
    export_repository(tmp_path / "repository", "points", (generator, random_interpreter(generator, "keypoints")))
    async with running(tmp_path / "repository", "points") as server:
        model = await served(server.grpc_url, "points")
        columns = await real_columns(server.grpc_url, model, range(64), 1.0)
        described = Described.of(model, truncation_psi=1.0, class_index=None)
        write(tmp_path / "index" / "points.parquet", described, columns, group=20)
        score, confidence = (columns[name].astype(np.float64) for name in ("score_sum", "confidence_b"))
        most, low = float(np.median(score)), min(1.0, float(np.median(confidence)))
        want = np.flatnonzero((score <= most) & (confidence >= low)).tolist()
        arguments = ("--triton-url", server.grpc_url, "--index", str(tmp_path / "index"))
        service = await asyncio.to_thread(start_service, tmp_path / "serve.log", *arguments, repository=tmp_path)
        try:
            async with grpc.aio.insecure_channel(service.grpc) as channel:
                stub = pb_grpc.SampleServiceStub(channel)
                options = pb.SampleOptions(max_js=most, where=[pb.Condition(name="b", min_confidence=low)])
                page = await stub.ListSeeds(pb.ListSeedsRequest(model="points", options=options))
                assert seeds_of(page) == want and 0 < len(want) < 64
                before = (await inferences(server, "points_generator"))[0]
                request = pb.StreamSamplesRequest(model="points", count=len(want), options=options)
                samples = [message.sample async for message in stub.StreamSamples(request)]
                assert [sample.seed for sample in samples] == want
                assert (await inferences(server, "points_generator"))[0] - before == len(want)
        finally:
            assert await asyncio.to_thread(service.stop) == 0


async def test_spoiled_messages_are_their_senders_error(indexed: Gateway) -> None:
    """tests/gateway/test_abuse.py sends them to a gateway that refuses to list seeds, because it has no index."""
    outcomes = {outcome.attack: outcome for outcome in await grpc_messages.fuzz(indexed.service, "light", 150)}
    assert not any(outcome.findings for outcome in outcomes.values())
    assert " OK " in f" {outcomes['messages to labelmint.v1.SampleService/ListSeeds'].note}"
