"""Tritons with different models behind one name, as in every roll-out: what any of them has is served.

Rules of this file:
- The Tritons are real ones; `old` has version 1 of `tiny`, `new` has 1 and 2.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc.aio as triton
from tritonclient.grpc import model_config_pb2

from labelmint.core.errors import TritonUnavailable
from labelmint.gateway.sampling import catalog as catalog_module
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.triton.client import Latents, TritonClient
from labelmint.triton.model_config import read_config
from labelmint.triton.server import TritonServer
from tests.conftest import start_service
from tests.support.gateways import inferences
from tests.support.inference import running
from tests.support.running import Running, read
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]


LATENT = np.zeros((1, 8), np.float32)
LATENTS = Latents(LATENT, LATENT, 6, 1.0)


@pytest_asyncio.fixture(scope="module")
async def old(tiny_repository: Path) -> AsyncIterator[TritonServer]:
    async with running(tiny_repository, "tiny") as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def new(second: Path) -> AsyncIterator[TritonServer]:
    async with running(second, "tiny", "tiny_v2") as server:
        yield server


@contextlib.asynccontextmanager
async def connected(*servers: TritonServer) -> AsyncIterator[TritonClient]:
    client = TritonClient(f"ipv4:{','.join(server.grpc_url for server in servers)}")
    try:
        yield client
    finally:
        await client.close()


def digests(repository: Path) -> dict[str, str]:
    """By the names of the ensembles in Triton."""
    return {
        name: read_config(repository / name / "config.pbtxt").parameters["model_digest"].string_value
        for name in ("tiny", "tiny_v2")
        if (repository / name).exists()
    }


async def made(server: TritonServer, name: str) -> int:
    return (await inferences(server, f"{name}_generator"))[0]


@pytest.mark.parametrize("newest_first", [False, True])
async def test_every_look_sees_what_any_of_them_has(
    old: TritonServer, new: TritonServer, monkeypatch: pytest.MonkeyPatch, newest_first: bool
) -> None:
    monkeypatch.setattr(catalog_module, "_REFRESH_SECONDS", 0.0)
    async with connected(*((new, old) if newest_first else (old, new))) as client:
        catalog = Catalog(client, "fused")
        for _ in range(20):
            await client.is_ready("tiny")  # an other call between: they take turns
            await catalog.refresh_anew()
            assert [(model.name, model.version) for model in catalog.known()] == [("tiny", "1"), ("tiny", "2")]


async def test_a_sample_goes_to_those_that_have_its_version_in_turn(
    old: TritonServer, new: TritonServer, second: Path
) -> None:
    digest = digests(second)
    async with connected(old, new) as client:
        await client.model_configs()
        before = [await made(old, "tiny"), await made(new, "tiny"), await made(new, "tiny_v2")]
        for _ in range(4):
            await client.infer("tiny", "1", LATENTS, outputs=["js_score"], digest=digest["tiny"])
        for _ in range(3):
            await client.infer("tiny_v2", "2", LATENTS, outputs=["js_score"], digest=digest["tiny_v2"])
        after = [await made(old, "tiny"), await made(new, "tiny"), await made(new, "tiny_v2")]
        assert [now - then for then, now in zip(before, after, strict=True)] == [2, 2, 3]
        with pytest.raises(TritonUnavailable, match="has 'tiny' version 1 ready"):  # no other one's samples
            await client.infer("tiny", "1", LATENTS, outputs=["js_score"], digest="another")


async def test_a_refusal_goes_to_another_one(tiny_repository: Path, new: TritonServer) -> None:
    digest = digests(tiny_repository)["tiny"]
    async with running(tiny_repository, "tiny") as leaving, connected(leaving, new) as client:
        await client.model_configs()
        operator = triton.InferenceServerClient(leaving.grpc_url)
        await operator.unload_model("tiny", unload_dependents=True)
        await operator.close()
        for _ in range(4):  # each second one meets the one that has it no more
            assert await client.infer("tiny", "1", LATENTS, outputs=["js_score"], digest=digest)


async def test_one_that_dies_takes_nothing_from_the_streams(
    tmp_path: Path, tiny_repository: Path, new: TritonServer
) -> None:
    async with running(tiny_repository, "tiny") as dying:
        url = f"ipv4:{dying.grpc_url},{new.grpc_url}"
        service = await asyncio.to_thread(
            start_service, tmp_path / "serve.log", "--triton-url", url, repository=tmp_path / "unused"
        )
        gateway = Running(service, tmp_path)
        try:
            assert await gateway.versions() == [("tiny", "1"), ("tiny", "2")]
            streams = [gateway.stream(0, version) for version in ("1", "2")]
            messages = [await read(stream, 5) for stream in streams]
            dying.kill()
            for stream, got in zip(streams, messages, strict=True):
                got += await read(stream, 40)
                assert [message.sample.seed for message in got] == list(range(45))
                assert len({message.sample.model_digest for message in got}) == 1
                stream.cancel()
            await gateway.logged(f"Triton at {dying.grpc_url} is away")
            assert await gateway.versions() == [("tiny", "1"), ("tiny", "2")]
            assert service.log.read_text().count("is away") == 1
        finally:
            await gateway.close()


async def test_what_only_one_had_that_is_away_is_missing_and_not_gone(
    tmp_path: Path, old: TritonServer, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "_REFRESH_SECONDS", 0.0)
    async with running(second, "tiny_v2") as dying, connected(old, dying) as client:
        catalog = Catalog(client, "fused")
        await catalog.refresh_anew()
        newest = await catalog.get("tiny")
        assert newest.version == "2"
        dying.kill()

        async def missed() -> bool:
            await catalog.refresh_anew()
            return len(catalog.known()) == 1

        await until(missed)
        await catalog.check_lost(newest)  # a stream that is held goes on when it is back
        assert await catalog.get("tiny", "2") == newest and (await catalog.get("tiny")).version == "1"
        with pytest.raises(TritonUnavailable):
            await client.infer("tiny_v2", "2", LATENTS, outputs=["js_score"], digest=newest.digest)


class Balancer:
    """One address before several servers: each new connection goes to `target`."""

    def __init__(self) -> None:
        self.target = ""
        self.connections = 0
        self._open: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, port = self.target.rsplit(":", 1)
        there, back = await asyncio.open_connection(host, int(port))
        self._open += [writer, back]
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    def close_connections(self) -> None:
        for writer in self._open:
            writer.close()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


async def test_behind_one_address_a_refusal_is_asked_again_over_a_new_connection(
    old: TritonServer, new: TritonServer, second: Path
) -> None:
    balancer = Balancer()
    server = await asyncio.start_server(balancer.serve, "127.0.0.1", 0)
    client = TritonClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        balancer.target = new.grpc_url
        assert ("tiny_v2", "2") in await client.model_configs()
        balancer.target = old.grpc_url
        balancer.close_connections()
        await until(lambda: client.is_ready("tiny"))  # it connects again, to the one without version 2
        balancer.target = new.grpc_url
        connections = balancer.connections
        assert await client.infer("tiny_v2", "2", LATENTS, outputs=["js_score"], digest=digests(second)["tiny_v2"])
        assert balancer.connections == connections + 1
        # Where nobody has it that ends.
        with pytest.raises(TritonUnavailable):
            await client.infer("nonesuch", "1", LATENTS, outputs=["js_score"])
        assert balancer.connections <= connections + 10
    finally:
        await client.close()
        server.close()
        balancer.close_connections()


async def test_a_name_is_resolved_again(old: TritonServer, new: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name `localhost` is one that the resolver gives other addresses meanwhile."""
    port = int(old.grpc_url.rsplit(":", 1)[1])
    client = TritonClient(f"dns:///localhost:{port}")
    found: list[str] = []

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host != "localhost" or not found:
            raise OSError("unknown name")
        return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    try:
        with pytest.raises(TritonUnavailable, match="localhost.* cannot be resolved: unknown name"):
            await client.model_configs()
        found[:] = ["127.0.0.1", "127.0.0.2", "::1"]
        assert set((await client.model_configs())["tiny", "1"]) == {f"127.0.0.1:{port}"}  # nobody is at the others
        found.clear()  # an outage of the resolver takes nothing away
        client._addresses.doubt()
        assert ("tiny", "1") in await client.model_configs()
        found[:] = ["127.0.0.3"]

        async def moved() -> bool:
            with contextlib.suppress(TritonUnavailable):
                await client.model_configs()
            return client._tritons.keys() == {f"127.0.0.3:{port}"}

        await until(moved)
    finally:
        await client.close()


class Told:
    """What Tritons tell, by their addresses, in place of a client."""

    url = "tritons:1"

    def __init__(self, repository: Path) -> None:
        self.digests: dict[str, str] = {}
        self._config = read_config(repository / "tiny" / "config.pbtxt")

    def may_return(self, *_: str) -> bool:
        return False

    async def model_configs(self) -> Mapping[tuple[str, str], Mapping[str, model_config_pb2.ModelConfig]]:
        configs = {}
        for address, digest in self.digests.items():
            configs[address] = model_config_pb2.ModelConfig()
            configs[address].CopyFrom(self._config)
            configs[address].parameters["model_digest"].string_value = 64 * digest
        return {("tiny", "1"): configs}


async def test_two_digests_of_one_version_are_never_mixed(
    tiny_repository: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "_REFRESH_SECONDS", 0.0)
    told = Told(tiny_repository)
    catalog = Catalog(told, "fused")  # type: ignore[arg-type]
    served = []
    for said in ("a", "ab", "bab", "bab", "bb", "ba"):
        told.digests = {f"{number}:1": digest for number, digest in enumerate(said)}
        await catalog.refresh_anew()
        served.append((await catalog.get("tiny")).digest)
    assert served == [64 * digest for digest in "aaaabb"]  # as long as one has it
    reports = [record.message for record in caplog.records if "differ" in record.message]
    assert (
        len(reports) == 3
        and f"{12 * 'a'} at 0:1, {12 * 'b'} at 1:1. {12 * 'a'} is served as long as one has it" in reports[0]
    )
    told.digests = {"0:1": "c", "1:1": "d", "2:1": "d"}
    assert (await Catalog(told, "fused").get("tiny")).digest == 64 * "d"  # type: ignore[arg-type]
    told.digests = {"0:1": "d", "1:1": "c"}
    assert (await Catalog(told, "fused").get("tiny")).digest == 64 * "c"  # type: ignore[arg-type]


async def test_a_sample_is_made_by_the_digest_that_it_is_told_under(
    tmp_path: Path, tiny_repository: Path, old: TritonServer
) -> None:
    other = Path(shutil.copytree(tiny_repository, tmp_path / "other"))
    digest, config = digests(other)["tiny"], other / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace(digest, "0" * len(digest)))
    async with running(other, "tiny") as changed, connected(changed, old) as client:
        assert len((await client.model_configs())["tiny", "1"]) == 2
        before = await made(old, "tiny"), await made(changed, "tiny")
        for _ in range(4):
            await client.infer("tiny", "1", LATENTS, outputs=["js_score"], digest=digest)
        assert (await made(old, "tiny"), await made(changed, "tiny")) == (before[0] + 4, before[1])
