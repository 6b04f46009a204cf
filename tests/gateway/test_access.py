"""Locks, from outside: TLS, client certificates, tokens and their limits, over real sockets."""

import asyncio
import hashlib
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio
import trustme
from google.protobuf import message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from labelmint.core.errors import LimitReached, UnusableFile
from labelmint.gateway.sampling import access
from labelmint.gateway.sampling.access import Caller, TokenLimits, Tokens, parse_tokens
from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service
from tests.support import processes
from tests.support.metrics import metric_of
from tests.support.running import start_before
from tests.support.waiting import until
from tests.support.wire import LOOSE, info_of
from tests.torture.doors import Door, routes, without_a_token, without_connecting

pytestmark = pytest.mark.triton


TOKEN, SLOW_TOKEN, METERED_TOKEN = "t0ken-of-the-training-job", "t0ken-of-a-slow-caller", "t0ken-of-a-metered-caller"
WRONG, WITHDRAWN = "t0ken-that-nobody-has", "t0ken-of-one-who-left"
SAMPLE = "/v1/models/faces/samples/7"
# Everything that tells of this gateway; tests below hold that no route is missing.
CLOSED = (
    "/v1/models",
    "/v1/models/faces",
    SAMPLE,
    f"{SAMPLE}.npz",
    f"{SAMPLE}/image.png",
    f"{SAMPLE}/label.png",
    f"{SAMPLE}/overlay.png",
    f"{SAMPLE}/uncertainty.png",
    "/v1/models/faces/samples.tar?count=1",
    "/metrics",
    "/no/such/route",
)
BATCH = "/v1/models/faces/samples:batchGet"


def line(name: str, token: str, limits: str = "") -> str:
    return f"{name} {hashlib.sha256(token.encode()).hexdigest()} {limits}\n"


def trusting(ca: Path, certificate: tuple[str, str] | None = None) -> ssl.SSLContext:
    """For a client that trusts one authority and, where asked, shows a certificate (and key)."""
    context = ssl.create_default_context(cafile=str(ca))
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


@dataclass
class Locked:
    """A gateway with TLS and tokens, and what a client needs to get in."""

    service: Service
    tokens: Path
    ca: Path

    def http(self, token: str | None = None) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.AsyncClient(base_url=self.service.http, verify=trusting(self.ca), headers=headers, timeout=60.0)

    def channel(self) -> grpc.aio.Channel:
        return self.door.channel()

    @property
    def door(self) -> Door:
        """To it, as the attacks of tests/torture take it."""
        credentials = grpc.ssl_channel_credentials(self.ca.read_bytes())
        return Door(self.service.http, self.service.grpc, trusting(self.ca), credentials)

    def rewrite(self, text: str) -> None:
        """Exchange the tokens file as a whole."""
        aside = self.tokens.with_suffix(".part")
        aside.write_text(text)
        os.replace(aside, self.tokens)

    async def admits(self, token: str) -> bool:
        """Whether the token opens the door."""
        async with self.http(token) as client:
            return (await client.get("/v1/models")).status_code == 200

    async def refuses(self, token: str) -> bool:
        return not await self.admits(token)


@dataclass
class Certificates:
    """A server's certificate, its authority, and another authority's client."""

    authority: trustme.CA
    directory: Path

    def __post_init__(self) -> None:
        server = self.authority.issue_cert("127.0.0.1")
        self.ca = self.directory / "ca.pem"
        self.certificate, self.key = self.directory / "server.pem", self.directory / "server.key"
        self.authority.cert_pem.write_to_path(str(self.ca))
        server.private_key_pem.write_to_path(str(self.key))
        for index, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(str(self.certificate), append=index > 0)

    @property
    def flags(self) -> tuple[str, ...]:
        return "--tls-certificate", str(self.certificate), "--tls-key", str(self.key)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(trustme.CA(), tmp_path_factory.mktemp("certificates"))


@pytest_asyncio.fixture(scope="module")
async def locked(
    certificates: Certificates, faces_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Locked]:
    directory = tmp_path_factory.mktemp("locked")
    tokens = directory / "tokens"
    tokens.write_text(
        "# who may ask\n\n"
        + line("training", TOKEN)
        + line("slow", SLOW_TOKEN, "samples_per_second=4 concurrency=2")
        + line("metered", METERED_TOKEN, "samples_per_second=0.1")
    )
    flags = ("--tokens-file", str(tokens), "--host", "127.0.0.1", *certificates.flags)
    service = await start_before(directory / "serve.log", faces_triton, *flags)
    yield Locked(service, tokens, certificates.ca)
    assert await asyncio.to_thread(service.stop) == 0
    said = service.log.read_text()
    assert not [secret for secret in (TOKEN, SLOW_TOKEN, WRONG) if secret in said]


async def test_every_closed_route_wants_a_token(locked: Locked) -> None:
    assert locked.service.http.startswith("https://")
    async with locked.http() as nobody, locked.http(WRONG) as stranger, locked.http(TOKEN) as known:
        for path in CLOSED:
            for client in (nobody, stranger):
                answer = await client.get(path)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["reason"] == "UNAUTHENTICATED" and WRONG not in answer.text
            assert (await known.get(path)).status_code == (404 if "no/such" in path else 200), path
        for client, status in ((nobody, 401), (stranger, 401), (known, 200)):
            assert (await client.post(BATCH, json={"seeds": [7]})).status_code == status
            assert (await client.head(SAMPLE)).status_code == status


async def test_no_route_is_forgotten(locked: Locked) -> None:
    """Each path of the document is closed, and says so, unless it is about health."""
    async with locked.http() as nobody:
        document = (await nobody.get("/openapi.json")).json()
        for path, operations in document["paths"].items():
            concrete = path.format(model="faces", seed=7)
            for method, operation in operations.items():
                answer = await nobody.request(method, concrete)
                health = path in ("/healthz", "/readyz")
                assert answer.status_code == (200 if health else 401), f"{method} {path}"
                assert ("security" in operation) == ("401" in operation["responses"]) == (not health), path


async def test_health_and_the_pages_are_open(locked: Locked) -> None:
    async with locked.http() as nobody:
        for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/swagger-ui.css", "/", "/gallery/page.js"):
            assert (await nobody.get(path)).status_code == 200, path


@pytest.mark.parametrize("value", ["", "Bearer", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer é"])
async def test_other_headers_are_refused(locked: Locked, value: str) -> None:
    async with locked.http() as client:
        answer = await client.get(SAMPLE, headers=[(b"authorization", value.encode())])
        assert answer.status_code == 401


def calls(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> dict[str, Callable[[], object]]:
    """Every RPC of our service, and reflection."""
    stub = pb_grpc.SampleServiceStub(channel)

    async def stream() -> list[message.Message]:
        request = pb.StreamSamplesRequest(model="faces", count=1, options=LOOSE)
        return [answer async for answer in stub.StreamSamples(request, metadata=metadata)]

    async def list_seeds() -> object:
        """This gateway has no index, and says so to those who may know."""
        try:
            return await stub.ListSeeds(pb.ListSeedsRequest(model="faces"), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if info_of(error).reason == "NOT_INDEXED":
                return error
            raise

    async def reflect() -> list[message.Message]:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        while True:
            try:
                return [answer async for answer in reflection.ServerReflectionInfo(iter([request]), metadata=metadata)]
            except grpc.aio.AioRpcError as error:
                # The client lost a refusal that came before it had written the request (grpc/grpc#36066): ask again.
                if error.details() != "Internal error from Core":
                    raise

    return {
        "GetSample": lambda: stub.GetSample(pb.GetSampleRequest(model="faces", seed=7), metadata=metadata),
        "BatchGetSamples": lambda: stub.BatchGetSamples(
            pb.BatchGetSamplesRequest(model="faces", seeds=[7], options=LOOSE), metadata=metadata
        ),
        "StreamSamples": stream,
        "ListSeeds": list_seeds,
        "GetModel": lambda: stub.GetModel(pb.GetModelRequest(model="faces"), metadata=metadata),
        "ListModels": lambda: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        "ServerReflectionInfo": reflect,
    }


async def test_every_call_wants_a_token(locked: Locked) -> None:
    methods = pb.DESCRIPTOR.services_by_name["SampleService"].methods_by_name
    async with locked.channel() as channel:
        assert set(calls(channel, ())) == {*methods, "ServerReflectionInfo"}
        for metadata in ((), (("authorization", f"Bearer {WRONG}"),), (("authorization", TOKEN),)):
            for name, call in calls(channel, metadata).items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call()  # type: ignore[misc]
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
                assert info_of(caught.value).reason == "UNAUTHENTICATED"
                assert WRONG not in str(caught.value.details())
        for call in calls(channel, (("authorization", f"Bearer {TOKEN}"),)).values():
            assert await call()  # type: ignore[misc]
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_refusals_are_counted_without_what_was_presented(locked: Locked) -> None:
    async with locked.http(TOKEN) as known:
        metrics = (await known.get("/metrics")).text
    assert 'code="401"' in metrics and 'code="UNAUTHENTICATED"' in metrics
    assert not [secret for secret in (TOKEN, WRONG, hashlib.sha256(TOKEN.encode()).hexdigest()) if secret in metrics]


async def test_security_headers(locked: Locked) -> None:
    async with locked.http(TOKEN) as known, locked.http() as nobody:
        answers = [
            await known.get(SAMPLE),
            await nobody.get(SAMPLE),
            await known.get("/nowhere"),
            await nobody.get("/docs"),
        ]
        for answer in answers:
            headers = answer.headers
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["strict-transport-security"].startswith("max-age=")
            assert "server" not in headers
        assert "script-src" not in answers[0].headers["content-security-policy"]
        assert answers[0].headers["cache-control"] == "private, no-cache"
        asked = await known.get(SAMPLE, headers={"Origin": "https://example.org"})
        preflight = await known.options(
            SAMPLE, headers={"Origin": "https://example.org", "Access-Control-Request-Method": "GET"}
        )
        assert preflight.status_code == 405
        for answer in (asked, preflight):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_a_changed_file_holds_and_a_broken_one_does_not(locked: Locked) -> None:
    before, log = locked.tokens.read_text(), locked.service.log
    fresh = "t0ken-that-was-added"

    def complaints() -> int:
        return log.read_text().count("keeping the previous tokens")

    async def complained() -> bool:
        assert await locked.admits(TOKEN), "the old tokens hold"
        return complaints() == 1

    try:
        locked.rewrite(before + line("fresh", fresh))
        await until(lambda: locked.admits(fresh))
        locked.rewrite(before)
        await until(lambda: locked.refuses(fresh))
        locked.rewrite(before + f"broken {TOKEN}\n")
        await until(complained)
        for _ in range(15):  # longer than the pause between two looks at the file
            assert await complained()
            await asyncio.sleep(0.1)
        assert "line 6: the second field is not a SHA-256" in log.read_text()
    finally:
        locked.rewrite(before)
    await until(lambda: locked.admits(TOKEN))


async def test_no_key_that_does_not_fit_opens_anything(locked: Locked) -> None:
    """Whatever route or RPC there is: the attack asks the gateway which there are."""
    before = locked.tokens.read_text()
    locked.rewrite(before + line("leaver", WITHDRAWN))
    await until(lambda: locked.admits(WITHDRAWN))
    locked.rewrite(before)
    await until(lambda: locked.refuses(WITHDRAWN))
    outcome = await without_a_token(locked.door, "faces", TOKEN, WITHDRAWN)
    assert outcome.tries > 200 and not outcome.findings, outcome


async def test_plain_text_opens_nothing_where_tls_is_on(locked: Locked) -> None:
    plain = Door(locked.service.http.replace("https://", "http://"), locked.service.grpc, None, None)
    outcome = await without_connecting("plain text where TLS is on", plain, await routes(locked.door, "faces"))
    assert outcome.tries > 25 and not outcome.findings, outcome


async def test_a_rate_refuses_requests(locked: Locked) -> None:
    """Twelve samples at one in ten seconds: nothing more for two minutes, whichever door is asked."""
    async with locked.http(METERED_TOKEN) as metered, locked.http(TOKEN) as other, locked.channel() as channel:
        seeds = {"seeds": list(range(12)), "max_js": 1e9}
        assert (await metered.post(BATCH, json=seeds)).status_code == 200
        for answer in (await metered.post(BATCH, json=seeds), await metered.get(SAMPLE), await metered.head(SAMPLE)):
            assert answer.status_code == 429
            assert 10 <= int(answer.headers["retry-after"]) <= 120
        assert (await metered.get(SAMPLE)).json()["reason"] == "LIMIT_REACHED"
        assert (await metered.get("/v1/models")).status_code == 200, "what mints nothing is not charged"
        assert (await other.get(SAMPLE)).status_code == 200, "another token is not affected"
        stub, metadata = pb_grpc.SampleServiceStub(channel), (("authorization", f"Bearer {METERED_TOKEN}"),)
        for call in (
            stub.GetSample(pb.GetSampleRequest(model="faces", seed=7), metadata=metadata),
            stub.BatchGetSamples(pb.BatchGetSamplesRequest(model="faces", seeds=[7]), metadata=metadata),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info_of(caught.value).reason == "LIMIT_REACHED"


async def test_a_rate_slows_streams(locked: Locked) -> None:
    """Twelve samples at 4 a second, 4 of which may come at once: two seconds at least, on either door."""
    started = time.monotonic()
    async with locked.channel() as channel:
        request = pb.StreamSamplesRequest(model="faces", count=12, options=LOOSE)
        metadata = (("authorization", f"Bearer {SLOW_TOKEN}"),)
        stream = pb_grpc.SampleServiceStub(channel).StreamSamples(request, metadata=metadata)
        assert len([answer async for answer in stream if answer.HasField("sample")]) == 12
    assert time.monotonic() - started > 1.9
    started = time.monotonic()
    async with locked.http(SLOW_TOKEN) as slow:
        answer = await slow.get("/v1/models/faces/samples.tar", params={"count": 12, "max_js": 1e9})
        assert answer.status_code == 200
    assert time.monotonic() - started > 1.9


async def test_concurrency_is_bounded_over_both_doors(locked: Locked) -> None:
    """Two streams are open, one on each door; a third request of the same token is refused until one ends."""
    metadata = (("authorization", f"Bearer {SLOW_TOKEN}"),)
    async with locked.channel() as channel, locked.http(SLOW_TOKEN) as slow:
        stub = pb_grpc.SampleServiceStub(channel)
        stream = stub.StreamSamples(pb.StreamSamplesRequest(model="faces", options=LOOSE), metadata=metadata)
        assert await stream.read()
        async with slow.stream("GET", "/v1/models/faces/samples.tar?count=1000&max_js=1e9") as tar:
            assert tar.status_code == 200
            refused = await slow.get("/v1/models")
            assert refused.status_code == 429 and refused.json()["reason"] == "LIMIT_REACHED"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.cancel()

        async def free() -> bool:
            answers = await asyncio.gather(*(slow.get("/v1/models") for _ in range(2)))
            return [answer.status_code for answer in answers] == [200, 200]

        await until(free)


async def test_mutual_tls(certificates: Certificates, faces_triton: TritonServer, tmp_path: Path) -> None:
    """The doors open to a client with a certificate of the right authority; such a gateway may listen anywhere."""
    clients, others = trustme.CA(), trustme.CA()
    clients.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
    flags = ("--tls-client-ca", str(tmp_path / "clients.pem"), "--host", "0.0.0.0", *certificates.flags)
    service = await start_before(tmp_path / "serve.log", faces_triton, *flags)
    try:
        url = service.http.replace("0.0.0.0", "127.0.0.1")
        target = service.grpc.replace("0.0.0.0", "127.0.0.1")
        ca = certificates.ca.read_bytes()
        for authority in (clients, others, None):
            pair = None if authority is None else authority.issue_cert("training.example")
            if pair is not None:
                chain = b"".join(blob.bytes() for blob in pair.cert_chain_pems)
                (tmp_path / "client.pem").write_bytes(chain)
                (tmp_path / "client.key").write_bytes(pair.private_key_pem.bytes())
                credentials = grpc.ssl_channel_credentials(ca, pair.private_key_pem.bytes(), chain)
            else:
                credentials = grpc.ssl_channel_credentials(ca)
            certificate = None if pair is None else (str(tmp_path / "client.pem"), str(tmp_path / "client.key"))
            async with (
                httpx.AsyncClient(base_url=url, verify=trusting(certificates.ca, certificate), timeout=30.0) as http,
                grpc.aio.secure_channel(target, credentials) as channel,
            ):
                stub = pb_grpc.SampleServiceStub(channel)
                if authority is clients:
                    answer = await http.get(SAMPLE)
                    assert answer.status_code == 200 and answer.headers["cache-control"].startswith("private")
                    assert (await stub.ListModels(pb.ListModelsRequest())).models
                    known = await routes(
                        Door(url, target, trusting(certificates.ca, certificate), credentials), "faces"
                    )
                else:
                    door = Door(url, target, trusting(certificates.ca, certificate), credentials)
                    name = "no certificate" if pair is None else "a certificate of another authority"
                    outcome = await without_connecting(name, door, known)
                    assert outcome.tries > 25 and not outcome.findings, outcome
    finally:
        assert await asyncio.to_thread(service.stop) == 0


def refused_start(*arguments: str) -> str:
    """Run a `serve` that must not start; returns the one line that it said."""
    said = processes.refused_start(*arguments)
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_gateway_stays_on_its_machine(host: str) -> None:
    said = refused_start("--host", host)
    assert f"--host {host} can be reached from other machines" in said
    assert "--tokens-file" in said and "--insecure" in said


def test_a_host_that_is_none() -> None:
    assert "is not an address" in refused_start("--host", "no.such.host.invalid")


async def test_insecure_is_said_in_as_many_words(faces_triton: TritonServer, tmp_path: Path) -> None:
    service = await start_before(tmp_path / "serve.log", faces_triton, "--host", "0.0.0.0", "--insecure")
    try:
        url = service.http.replace("0.0.0.0", "127.0.0.1")
        async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
            assert (await http.get(SAMPLE)).status_code == 200
    finally:
        assert await asyncio.to_thread(service.stop) == 0


def test_unusable_certificates_are_named(certificates: Certificates, tmp_path: Path) -> None:
    nothing, other = tmp_path / "nothing.pem", tmp_path / "other.key"
    other.write_bytes(trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes())
    server, key = str(certificates.certificate), str(certificates.key)
    assert "tls_certificate and tls_key belong together" in refused_start("--tls-certificate", server)
    assert "tls_client_ca needs tls_certificate" in refused_start("--tls-client-ca", server)
    assert f"{nothing} cannot be read" in refused_start("--tls-certificate", str(nothing), "--tls-key", key)
    said = refused_start("--tls-certificate", server, "--tls-key", str(other))
    assert "are not a PEM certificate and its unencrypted key" in said
    nothing.write_text("no certificate")
    said = refused_start("--tls-certificate", server, "--tls-key", key, "--tls-client-ca", str(nothing))
    assert f"{nothing} holds no PEM certificates" in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no token"),
        ("# only words\n", "holds no token"),
        ("training\n", "line 1: must have at least two fields"),
        (f"training {TOKEN}\n", "line 1: the second field is not a SHA-256"),
        (line("a/b", TOKEN), "line 1: the name"),
        (line("a", TOKEN) + line("a", WRONG), "line 2: repeats"),
        (line("a", TOKEN) + line("b", TOKEN), "line 2: repeats"),
        (line("a", TOKEN, "rate=1"), "line 1: after the hash"),
        (line("a", TOKEN, "concurrency=0"), "line 1: after the hash"),
        (line("a", TOKEN, "concurrency=1.5"), "line 1: concurrency must be a whole number"),
        (line("a", TOKEN, "concurrency=1 concurrency=2"), "line 1: after the hash"),
        (line("a", TOKEN, "samples_per_second=inf"), "line 1: after the hash"),
    ],
)
def test_a_malformed_tokens_file_names_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(UnusableFile) as caught:
        parse_tokens(path, text)
    assert str(path) in caught.value.message and problem in caught.value.message
    assert TOKEN not in caught.value.message
    path.write_text(text)
    with pytest.raises(UnusableFile):
        Tokens(path)


def test_a_tokens_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    assert f"{path} cannot be read" in refused_start("--tokens-file", str(path))
    path.write_bytes(b"\xff\xfe")
    assert f"{path} is not UTF-8 text" in refused_start("--tokens-file", str(path))


def test_a_batch_may_overdraw_the_rate_once_and_time_pays_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now))
    caller = Caller("a", TokenLimits(samples_per_second=1000.0))
    caller.charge(5000)
    with pytest.raises(LimitReached) as caught:
        caller.charge(1)
    assert caught.value.retry_after_seconds == 5  # from a full bucket of 1000: 4001 short of one sample
    caller.charge(0)
    now += 4.0
    with pytest.raises(LimitReached):
        caller.charge(1)
    now += 0.002
    caller.charge(1)
    caller.limits = TokenLimits()
    caller.charge(1_000_000)
    caller.charge(1_000_000)


def test_the_problem_of_a_large_body(locked: Locked) -> None:
    """Announced or not, more than a request needs is not taken in."""
    with httpx.Client(base_url=locked.service.http, verify=trusting(locked.ca), timeout=60.0) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        large = json.dumps({"seeds": [1], "padding": "x" * (2 << 20)}).encode()
        for content in (large, iter([large[i : i + 65536] for i in range(0, len(large), 65536)])):
            answer = client.post(BATCH, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 413 and answer.json()["reason"] == "REQUEST_TOO_LARGE"
            assert answer.headers["content-type"] == "application/problem+json"
        assert client.get("/v1/models").status_code == 200


async def test_a_large_message_is_refused_by_grpc(locked: Locked) -> None:
    async with locked.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            request = pb.GetSampleRequest(model="x" * (2 << 20))
            await pb_grpc.SampleServiceStub(channel).GetSample(
                request, metadata=(("authorization", f"Bearer {TOKEN}"),)
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    """Editors of Windows put one first."""
    path = tmp_path / "tokens"
    path.write_bytes(b"\xef\xbb\xbf" + line("fresh", TOKEN).encode())
    assert Tokens(path).authenticate(f"Bearer {TOKEN}").name == "fresh"


async def test_who_uses_how_much_is_in_the_log_and_the_metrics(locked: Locked) -> None:
    """By the name of the token, at both doors; the token itself is nowhere."""

    async def charged(client: httpx.AsyncClient) -> float:
        return await metric_of(client, 'labelmint_caller_samples_total{caller="training"}')

    def logged() -> list[str]:
        return [line for line in locked.service.log.read_text().splitlines() if "request_id=who-" in line]

    async with locked.http(TOKEN) as client, locked.channel() as channel:
        before, any_score = await charged(client), {"max_js": 1e9}
        await client.get("/v1/models/faces/samples/1", params=any_score, headers={"x-request-id": "who-rest"})
        await client.get("/v1/models/faces/samples.tar", params={"count": 2, **any_score})
        metadata = (("authorization", f"Bearer {TOKEN}"), ("x-request-id", "who-grpc"))
        stub = pb_grpc.SampleServiceStub(channel)
        options = pb.SampleOptions(max_js=1e9)
        await stub.BatchGetSamples(
            pb.BatchGetSamplesRequest(model="faces", seeds=[1, 2, 3], options=options), metadata=metadata
        )
        stream = pb.StreamSamplesRequest(model="faces", count=2, options=options)
        assert len([message async for message in stub.StreamSamples(stream, metadata=metadata[:1])]) == 2
        assert await charged(client) - before == 1 + 2 + 3 + 2
        await until(lambda: len(logged()) == 2)
    assert all(" caller=training" in line for line in logged()), logged()
    assert TOKEN not in locked.service.log.read_text()
