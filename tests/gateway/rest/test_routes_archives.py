"""samples.tar, read by tarfile and by WebDataset; and what becomes of it when it cannot end well."""

import asyncio
import hashlib
import io
import json
import socket
import tarfile
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import webdataset
from PIL import Image

from labelmint.triton.server import TritonServer, wait_until_ready
from tests.conftest import REPOSITORY, Service
from tests.support.gateways import minted
from tests.support.metrics import IN_TRITON, REST_IN_FLIGHT, metric_of
from tests.support.running import start_before
from tests.support.waiting import until

pytestmark = pytest.mark.triton


TAR = "/v1/models/faces/samples.tar"
LOOSE = {"max_js": 1e9}


def metadata(content: bytes) -> list[dict[str, object]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = [name for name in archive.getnames() if name.endswith(".json")]
        return [json.load(archive.extractfile(name)) for name in names]  # type: ignore[arg-type]


def test_an_archive_is_what_tar_means(http: httpx.Client) -> None:
    answer = http.get(TAR, params={"start_seed": 40, "count": 3, **LOOSE})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [
            f"{seed:010d}.{suffix}" for seed in (40, 41, 42) for suffix in ("image.png", "label.npy", "json")
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        image = archive.extractfile(members[0])
        assert (
            image is not None
            and image.read() == http.get("/v1/models/faces/samples/40/image.png", params=LOOSE).content
        )
        label = np.load(io.BytesIO(archive.extractfile(members[1]).read()))  # type: ignore[union-attr]
    picture = Image.open(io.BytesIO(http.get("/v1/models/faces/samples/40/label.png", params=LOOSE).content))
    assert label.dtype == np.uint8 and np.array_equal(label, np.asarray(picture))
    assert answer.content.endswith(b"\0" * 1024) and len(answer.content) % 512 == 0
    sample = http.get("/v1/models/faces/samples/42", params=LOOSE).json()
    del sample["image"], sample["label"], sample["js_map"]
    assert metadata(answer.content)[2] == {**sample, "next_seed": 43}


def test_the_same_request_has_the_same_bytes(http: httpx.Client) -> None:
    params = {"start_seed": 40, "count": 4, **LOOSE}
    assert len({hashlib.sha256(http.get(TAR, params=params).content).hexdigest() for _ in range(3)}) == 1


def test_webdataset_reads_it(service: Service, http: httpx.Client) -> None:
    """Over the wire, by the library's own opener: images as arrays, labels as class ids."""
    url = f"pipe:curl -sf '{service.http}{TAR}?start_seed=40&count=5&max_js=1e9'"
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{seed:010d}" for seed in range(40, 45)]
    for sample in samples:
        assert sample["image.png"].shape == (128, 128, 3) and sample["image.png"].dtype == np.uint8
        assert sample["label.npy"].shape == (128, 128) and sample["label.npy"].max() < 16
        assert sample["json"]["seed"] == int(sample["__key__"])


def test_shards_are_disjoint_and_rejected_seeds_are_holes(http: httpx.Client) -> None:
    scores = {m["seed"]: m["js_score"] for m in metadata(http.get(TAR, params={"count": 24, **LOOSE}).content)}
    gate = sorted(scores.values())[11]  # type: ignore[type-var]
    found = []
    for shard in range(2):
        query = {"count": 4, "shard_index": shard, "shard_count": 2, "max_js": gate}
        told = metadata(http.get(TAR, params=query).content)
        seeds = [m["seed"] for m in told]
        accepted = [seed for seed in scores if int(seed) % 2 == shard and scores[seed] <= gate]  # type: ignore[operator,call-overload]
        assert seeds[: len(accepted)] == accepted[:4]
        assert all(m["next_seed"] == m["seed"] + 1 for m in told)  # type: ignore[operator]
        found += seeds
    assert len(set(found)) == 8


def test_an_archive_ends_where_the_seeds_end(http: httpx.Client) -> None:
    whole = http.get(TAR, params={"start_seed": 2**32 - 2, "count": 10, **LOOSE})
    assert [m["seed"] for m in metadata(whole.content)] == [2**32 - 2, 2**32 - 1]
    empty = http.get(TAR, params={"start_seed": 2**32, **LOOSE})
    assert empty.status_code == 200 and empty.content == b"\0" * 1024
    assert metadata(empty.content) == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("count=0", "count"),
        ("count=100001", "count"),
        ("start_seed=-1", "start_seed"),
        ("start_seed=4294967297", "start_seed"),
        ("shard_index=2&shard_count=2", "shard_index"),
        ("shard_count=0", "shard_count"),
        ("max_js=1&max_quantile=0.5", "max_js"),
        ("crossover=7&style_seed=1", "crossover"),
        ("seeds=1", "seeds"),
    ],
)
def test_bad_input_names_its_field(http: httpx.Client, query: str, field: str) -> None:
    answer = http.get(f"{TAR}?{query}")
    assert answer.status_code == 400 and answer.json()["metadata"] == {"field": field}
    assert answer.headers["content-type"] == "application/problem+json"


async def settled(triton: TritonServer) -> int:
    """Triton's count once it does not grow any more."""
    count, since, deadline = await minted(triton), time.monotonic(), time.monotonic() + 120
    while time.monotonic() - since < 3.0:
        assert time.monotonic() < deadline, "samples are minted on and on"
        await asyncio.sleep(0.2)
        if (now := await minted(triton)) != count:
            count, since = now, time.monotonic()
    return count


async def ended(service: Service) -> None:
    """Wait until no request but the one that asks is in flight, and Triton has answered what it had begun."""
    async with httpx.AsyncClient(base_url=service.http, timeout=60.0) as http:

        async def nothing_runs() -> bool:
            return await metric_of(http, REST_IN_FLIGHT) == 1 and await metric_of(http, IN_TRITON) == 0

        await until(nothing_runs)


async def test_a_slow_reader_stops_the_walk_and_a_leaving_one_ends_it(
    faces_triton: TritonServer, tmp_path: Path
) -> None:
    """What is minted ahead is what fits into the buffers between, not the archive."""
    service = await start_before(tmp_path / "serve.log", faces_triton)
    try:
        url = httpx.URL(service.http)
        before = await minted(faces_triton)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.to_thread(client.connect, (url.host, url.port))
            client.sendall(f"GET {TAR}?count=100000&max_js=1e9 HTTP/1.1\r\nHost: labelmint\r\n\r\n".encode())
            assert (await asyncio.to_thread(client.recv, 16)).startswith(b"HTTP/1.1 200")
            stalled = await settled(faces_triton)
            assert stalled - before < 1000
        await ended(service)
        # The buffer of the server may have taken a few more when the client's end was closed, no more than that.
        assert await settled(faces_triton) - stalled < 100
    finally:
        assert await asyncio.to_thread(service.stop) == 0


async def test_leaving_ends_a_walk_that_finds_nothing(faces_triton: TritonServer, tmp_path: Path) -> None:
    service = await start_before(tmp_path / "serve.log", faces_triton)
    try:
        async with httpx.AsyncClient(base_url=service.http, timeout=600.0) as http:
            before = await minted(faces_triton)
            walking = asyncio.create_task(http.get(TAR, params={"max_js": 0}))

            async def walks() -> bool:
                assert not walking.done()
                return await minted(faces_triton) > before

            await until(walks)
            walking.cancel()
            await asyncio.gather(walking, return_exceptions=True)
        await ended(service)
        await settled(faces_triton)
    finally:
        assert await asyncio.to_thread(service.stop) == 0


async def test_an_archive_that_breaks_off_is_no_archive(tmp_path: Path) -> None:
    """Triton goes away in the middle: the client sees a broken connection, and no end of the archive."""
    triton = TritonServer(REPOSITORY, ["faces"])
    await triton.start()
    try:
        await wait_until_ready(triton)
        service = await start_before(tmp_path / "serve.log", triton)
        try:
            received = bytearray()
            async with httpx.AsyncClient(base_url=service.http, timeout=60.0) as http:
                with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                    async with http.stream("GET", TAR, params={"count": 100_000, **LOOSE}) as answer:
                        assert answer.status_code == 200
                        async for part in answer.aiter_raw():
                            if not received:
                                await triton.stop()
                            received += part
                assert len(received) > 512 and not received.endswith(b"\0" * 1024)
                early = await http.get(TAR, params=LOOSE)
                assert early.status_code == 503 and early.json()["reason"] == "TRITON_UNAVAILABLE"

                async def counted() -> bool:
                    return 'code="aborted"' in (await http.get("/metrics")).text

                await until(counted)
            log = service.log.read_text()
            assert log.count("was broken off") == 1 and "Traceback" not in log
        finally:
            assert await asyncio.to_thread(service.stop) == 0
    finally:
        await triton.stop()


def read_by_webdataset(url: str, seen: list[str]) -> None:
    """Raises what WebDataset makes of the archive."""
    for sample in webdataset.WebDataset(url, shardshuffle=False):
        seen.append(sample["__key__"])


async def test_a_reader_of_an_archive_that_was_cut_learns_of_it(faces_triton: TritonServer, tmp_path: Path) -> None:
    """The gateway is stopped while WebDataset reads: an error, never an epoch that is short; and no traceback here."""
    service = await start_before(tmp_path / "serve.log", faces_triton)
    seen: list[list[str]] = [[] for _ in range(4)]
    urls = [f"{service.http}{TAR}?start_seed={1000 * i}&count=500&max_js=1e9" for i in range(4)]
    readers = [
        asyncio.create_task(asyncio.to_thread(read_by_webdataset, f"pipe:curl -s '{url}'", keys))
        for url, keys in zip(urls, seen, strict=True)
    ]
    await until(lambda: all(seen))
    assert await asyncio.to_thread(service.stop) == 0
    ends = await asyncio.gather(*readers, return_exceptions=True)
    assert [len(keys) for keys, end in zip(seen, ends, strict=True) if end is None] == [], "an epoch ended silently"
    assert all(0 < len(keys) < 500 for keys in seen)
    log = service.log.read_text()
    assert "Traceback" not in log and log.count("was broken off: this gateway is shutting down") == 4


async def test_an_archive_ends_at_the_age_of_connections(faces_triton: TritonServer, tmp_path: Path) -> None:
    service = await start_before(tmp_path / "serve.log", faces_triton, "--max-connection-age-seconds", "1.5")
    try:
        async with httpx.AsyncClient(base_url=service.http, timeout=60.0) as http:
            for _ in range(20):
                try:
                    answer = await http.get(TAR, params={"count": 100_000, **LOOSE})
                except httpx.RemoteProtocolError as error:
                    assert "incomplete" in str(error)
                    break
                # On a busy machine it may be that old before its first sample.
                assert answer.status_code == 503 and answer.json()["reason"] == "STREAM_EXPIRED"
            else:
                raise AssertionError("no archive began")
        assert "was broken off: " in service.log.read_text()
    finally:
        assert await asyncio.to_thread(service.stop) == 0
