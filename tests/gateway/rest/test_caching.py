"""What caches may keep: validators that cost no inference, revisions, and the gateway's own memory of samples."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import httpx
import pytest
import pytest_asyncio

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service
from tests.support.gateways import minted
from tests.support.metrics import metric_of
from tests.support.running import start_before
from tests.support.wire import RAW

pytestmark = pytest.mark.triton


SAMPLE = "/v1/models/faces/samples/7"
FORMS = ("", ".npz", "/image.png", "/label.png", "/overlay.png", "/uncertainty.png")
TAR = "/v1/models/faces/samples.tar?count=2"


@pytest_asyncio.fixture(scope="module")
async def keeping(faces_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A gateway that remembers as much as a few hundred samples take."""
    service = await start_before(
        tmp_path_factory.mktemp("keeping") / "serve.log", faces_triton, "--cache-bytes", "20000000"
    )
    yield service
    assert await asyncio.to_thread(service.stop) == 0


@pytest_asyncio.fixture(scope="module")
async def forgetful(
    faces_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway as it is by default: it keeps nothing."""
    service = await start_before(tmp_path_factory.mktemp("forgetful") / "serve.log", faces_triton)
    async with httpx.AsyncClient(base_url=service.http, timeout=60.0) as client:
        yield client
    assert await asyncio.to_thread(service.stop) == 0


async def test_what_a_client_holds_is_not_minted_again(
    forgetful: httpx.AsyncClient, faces_triton: TritonServer
) -> None:
    paths = [*(SAMPLE + form for form in FORMS), TAR]
    answers = [await forgetful.get(path) for path in paths]
    assert [answer.status_code for answer in answers] == [200] * len(paths)
    tags = [answer.headers["etag"] for answer in answers]
    assert len(set(tags)) == len(tags) and all(tag.startswith('"') for tag in tags)
    before = await minted(faces_triton)
    for path, tag in zip(paths, tags, strict=True):
        for held in (tag, f'"other", {tag}', f"W/{tag}"):
            answer = await forgetful.get(path, headers={"If-None-Match": held})
            assert (answer.status_code, answer.content) == (304, b""), path
            assert answer.headers["etag"] == tag and answer.headers["cache-control"] == "public, no-cache"
    assert await minted(faces_triton) == before
    for path, tag, answer in zip(paths, tags, answers, strict=True):
        again = await forgetful.get(path, headers={"If-None-Match": '"other"'})
        assert (again.status_code, again.headers["etag"], again.content) == (200, tag, answer.content), path
    assert await minted(faces_triton) > before


async def test_every_option_has_a_validator_of_its_own(forgetful: httpx.AsyncClient) -> None:
    queries = (
        "",
        "?max_js=1000",
        "?max_js=1001",
        "?max_quantile=1",
        "?max_js=1000&truncation_psi=0.5",
        "?max_js=1000&style_seed=1&crossover=7",
        "?max_js=1000&style_seed=1&crossover=6",
        "?max_js=1000&encoding=raw",
        "?max_js=1000&include_rejected=true",
    )
    tags = {(await forgetful.get(f"{SAMPLE}{query}")).headers["etag"] for query in queries}
    tags.add((await forgetful.get("/v1/models/faces/samples/8?max_js=1000")).headers["etag"])
    assert len(tags) == len(queries) + 1


async def test_any_tag_stands_for_an_accepted_sample_only(forgetful: httpx.AsyncClient) -> None:
    any_tag = {"If-None-Match": "*"}
    for path in (SAMPLE, f"{SAMPLE}/image.png", TAR):
        assert (await forgetful.get(path, headers=any_tag)).status_code == 304
    assert (await forgetful.get(f"{SAMPLE}?max_js=0", headers=any_tag)).status_code == 422


async def test_only_a_pinned_revision_is_immutable(forgetful: httpx.AsyncClient) -> None:
    revision = (await forgetful.get("/v1/models/faces")).json()["revision"]
    for path in (SAMPLE, f"{SAMPLE}/image.png", TAR):
        plain = await forgetful.get(path)
        pinned = await forgetful.get(path, params={**httpx.URL(path).params, "revision": revision})
        assert plain.headers["cache-control"] == "public, no-cache"
        assert pinned.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert pinned.headers["etag"] == plain.headers["etag"] and pinned.content == plain.content
        other = await forgetful.get(path, params={**httpx.URL(path).params, "revision": "0" * 16})
        assert other.status_code == 409 and other.headers["cache-control"] == "no-store"
        body = other.json()
        assert body["reason"] == "REVISION_CHANGED" and body["metadata"] == {"model": "faces", "revision": revision}


async def test_a_rejection_lasts_as_long_as_a_sample_and_no_other_error_does(forgetful: httpx.AsyncClient) -> None:
    revision = (await forgetful.get("/v1/models/faces")).json()["revision"]
    plain = await forgetful.get(SAMPLE, params={"max_js": 0})
    pinned = await forgetful.get(SAMPLE, params={"max_js": 0, "revision": revision})
    assert plain.status_code == pinned.status_code == 422
    assert plain.headers["cache-control"] == "public, no-cache"
    assert pinned.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert "etag" not in plain.headers
    for path, status in ((f"{SAMPLE}?psi=1", 400), ("/v1/models/cats", 404), ("/nowhere", 404)):
        answer = await forgetful.get(path)
        assert (answer.status_code, answer.headers["cache-control"]) == (status, "no-store")


async def test_head_says_what_get_says(forgetful: httpx.AsyncClient) -> None:
    for path in (
        *(SAMPLE + form for form in FORMS),
        f"{SAMPLE}?max_js=0",
        f"{SAMPLE}?psi=1",
        TAR,
        "/v1/models",
        "/docs",
    ):
        get, head = await forgetful.get(path), await forgetful.head(path)
        assert head.status_code == get.status_code and head.content == b"", path
        differing = {"date", "transfer-encoding", "x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in differing} == {
            k: v for k, v in get.headers.items() if k not in differing
        }, path


async def test_head_of_an_archive_checks_and_mints_nothing(
    forgetful: httpx.AsyncClient, faces_triton: TritonServer
) -> None:
    before = await minted(faces_triton)
    assert (await forgetful.head(TAR)).status_code == 200
    for query in ("shard_index=1", "max_js=1&max_quantile=0.5", "count=0", "crossover=1"):
        assert (await forgetful.head(f"/v1/models/faces/samples.tar?{query}")).status_code == 400, query
    assert await minted(faces_triton) == before


async def test_a_range_is_not_served_in_parts(forgetful: httpx.AsyncClient) -> None:
    for path in (f"{SAMPLE}/image.png", f"{SAMPLE}.npz", TAR):
        whole = await forgetful.get(path)
        asked = await forgetful.get(path, headers={"Range": "bytes=10-20"})
        assert asked.status_code == 200 and asked.headers["accept-ranges"] == "none"
        assert asked.content == whole.content


async def test_kept_samples_are_the_same_over_every_door(keeping: Service, faces_triton: TritonServer) -> None:
    """The second epoch runs without Triton, whatever gate and form it asks for, and says the same bytes."""
    async with (
        httpx.AsyncClient(base_url=keeping.http, timeout=60.0) as http,
        grpc.aio.insecure_channel(keeping.grpc) as channel,
    ):
        stub = pb_grpc.SampleServiceStub(channel)

        async def epoch() -> list[object]:
            stream = stub.StreamSamples(pb.StreamSamplesRequest(model="faces", start_seed=500, count=6, options=RAW))
            streamed = [answer.sample for answer in [m async for m in stream] if answer.HasField("sample")]
            body = {"seeds": list(range(500, 506)), "max_js": 1e9}
            batch = (await http.post("/v1/models/faces/samples:batchGet", json=body)).content
            single = (await http.get("/v1/models/faces/samples/503?max_js=1e9")).content
            tar = (await http.get("/v1/models/faces/samples.tar?start_seed=500&count=6&max_js=1e9")).content
            return [streamed, batch, single, tar]

        first = await epoch()
        before, hits = await minted(faces_triton), await metric_of(http, "labelmint_cache_hits_total")
        assert await epoch() == first
        assert (await http.get("/v1/models/faces/samples/503?max_js=0")).status_code == 422
        assert await minted(faces_triton) == before
        assert await metric_of(http, "labelmint_cache_hits_total") >= hits + 20
        assert await metric_of(http, "labelmint_cache_misses_total") >= 6
        assert 0 < await metric_of(http, "labelmint_cache_bytes") <= 20_000_000


async def test_what_was_kept_with_more_outputs_shows_only_what_is_asked(
    keeping: Service, faces_triton: TritonServer
) -> None:
    async with grpc.aio.insecure_channel(keeping.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        with_map = pb.SampleOptions()
        with_map.CopyFrom(RAW)
        with_map.include_js_map = True
        first = (await stub.GetSample(pb.GetSampleRequest(model="faces", seed=600, options=RAW))).sample
        before = await minted(faces_triton)
        more = (await stub.GetSample(pb.GetSampleRequest(model="faces", seed=600, options=with_map))).sample
        assert more.js_map and await minted(faces_triton) == before + 1
        again = (await stub.GetSample(pb.GetSampleRequest(model="faces", seed=600, options=RAW))).sample
        assert again == first and not again.js_map
        assert await minted(faces_triton) == before + 1


async def test_equal_requests_at_one_time_are_minted_once(keeping: Service, faces_triton: TritonServer) -> None:
    async with httpx.AsyncClient(base_url=keeping.http, timeout=60.0) as http:
        before = await minted(faces_triton)
        answers = await asyncio.gather(*(http.get("/v1/models/faces/samples/700?max_js=1e9") for _ in range(8)))
        assert {answer.status_code for answer in answers} == {200} and len({answer.content for answer in answers}) == 1
        assert await minted(faces_triton) == before + 1


async def test_memory_is_bounded_and_the_oldest_goes(faces_triton: TritonServer, tmp_path: Path) -> None:
    """Room for two samples of 128 x 128: three are asked for, then the first again."""
    service = await start_before(tmp_path / "serve.log", faces_triton, "--cache-bytes", "150000")
    try:
        async with httpx.AsyncClient(base_url=service.http, timeout=60.0) as http:
            for seed in (800, 801, 802):
                assert (await http.get(f"/v1/models/faces/samples/{seed}?max_js=1e9")).status_code == 200
            before = await minted(faces_triton)
            await http.get("/v1/models/faces/samples/802?max_js=1e9")
            assert await minted(faces_triton) == before
            await http.get("/v1/models/faces/samples/800?max_js=1e9")
            assert await minted(faces_triton) == before + 1
            assert await metric_of(http, "labelmint_cache_bytes") <= 150_000
    finally:
        assert await asyncio.to_thread(service.stop) == 0
