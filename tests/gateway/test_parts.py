"""The durations in the metrics: what was slow, for which model, how it ended, and no label that a caller has chosen.

Rules of this file:
- The real gRPC service, the real REST application and the real sampling core stand before a Triton that takes as long
  as a test says. The clock of the metrics is the test's, and only what a test makes slow moves it.
- A test compares all series of the histograms, so it also notices what must not be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from labelmint.core.errors import InferenceFailed, Overloaded, TritonUnavailable
from labelmint.gateway.encoding import pixels
from labelmint.gateway.grpc.interceptors import AccessInterceptor, ParsingInterceptor
from labelmint.gateway.grpc.service import SampleService
from labelmint.gateway.rest.app import Exposure, create_app
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sampler import Limits, Sampler, SamplingCore
from labelmint.triton.client import TritonClient
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import ROOT
from tests.support.served import MODEL
from tests.support.waiting import until

pytestmark = pytest.mark.triton

WAIT, TRITON, ENCODING = (f"labelmint_{part}_duration_seconds" for part in ("slot_wait", "triton", "encoding"))
PARTS = (WAIT, TRITON, ENCODING)
HTTP, RPC = "http_server_request_duration_seconds", "rpc_server_call_duration_seconds"
SAMPLE, SAMPLES = "/v1/models/{model}/samples/{seed}", "/v1/models/{model}/samples"
GET_SAMPLE = "labelmint.v1.SampleService/GetSample"
MODELS = {(name, 1): replace(MODEL, name=name, triton_name=f"{name}_in_triton") for name in ("ants", "bees")}
LIMITS = Limits(
    max_in_flight=2, triton_slots=4, max_streams=4, max_window=4, capacity_wait_seconds=0.0, max_empty_seeds=1000
)

Observed: TypeAlias = tuple[int, float]  # count and sum of a histogram


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Triton(TritonClient):
    """Takes `seconds`, then answers or fails with the next of `failures`. With a `space` of 0 samples must wait."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("127.0.0.1:1")
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.failures: list[Exception | None] = []
        self.space = 100

    def room(self, *_: str) -> int:
        return self.space

    def admit(self) -> None:
        self.space = 100
        self.on_more_room()

    async def infer(self, model: str, *_: Any, outputs: Sequence[str], **__: Any) -> Any:
        self.clock.now += self.seconds.get(model.removesuffix("_in_triton"), 0.0)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        shapes = {"image": (8, 8, 3), "label": (8, 8), "js_map": (8, 8), "js_score": (1,)}
        return {name: np.ones(shapes[name], np.uint8 if name in ("image", "label") else np.float32) for name in outputs}


class Known(Catalog):
    """Two models, whatever Triton says."""

    def __init__(self, triton: TritonClient) -> None:
        super().__init__(triton, "fused")
        self._models, self._failure = dict(MODELS), None

    async def refresh(self) -> None:
        pass

    async def refresh_anew(self) -> None:
        pass


@dataclass
class Gateway:
    clock: Clock
    triton: Triton
    metrics: Metrics
    sampler: Sampler
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    stub: pb_grpc.SampleServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = pb_grpc.SampleServiceStub(self.channel)

    def observed(self, *names: str) -> dict[tuple[str, ...], Observed]:
        """All series of these histograms: (name, values of the labels) -> (count, sum)."""
        found: dict[tuple[str, ...], Observed] = {}
        for family in self.metrics.registry.collect():
            if family.name in names:
                values = {(each.name, *each.labels.values()): each.value for each in family.samples}
                for (name, *labels), value in values.items():
                    if name == f"{family.name}_count":
                        found[(family.name, *labels)] = (int(value), values[(f"{family.name}_sum", *labels)])
        return found

    def ended(self, name: str) -> dict[tuple[str, ...], int]:
        """How often each series of a histogram was observed, by the values of its labels."""
        return {labels[1:]: count for labels, (count, _) in self.observed(name).items()}

    @property
    def waiting(self) -> int:
        return self.sampler._slots.depth("request") + self.sampler._slots.depth("stream")


@asynccontextmanager
async def gateway(cache_bytes: int = 0, tokens: Tokens | None = None) -> AsyncIterator[Gateway]:
    clock = Clock()
    triton, metrics = Triton(clock), Metrics(CollectorRegistry(), clock)
    catalog = Known(triton)
    sampler = Sampler(catalog, triton, metrics, cache=SampleCache(cache_bytes, metrics), limits=LIMITS)
    core = SamplingCore(sampler, metrics, Lifecycle(catalog, 0.0, False))
    access = [] if tokens is None else [AccessInterceptor(tokens, metrics)]
    server = grpc.aio.server(interceptors=[*access, ParsingInterceptor(metrics)])
    pb_grpc.add_SampleServiceServicer_to_server(SampleService(core), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    app: ASGIApp = create_app(core, version="1", exposure=Exposure(tokens, False, False, ()))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            httpx.AsyncClient(transport=transport, base_url="http://gateway") as http,
        ):
            yield Gateway(clock, triton, metrics, sampler, channel, http)
    finally:
        await server.stop(None)
        await triton.close()


Way: TypeAlias = Callable[[Gateway, str], Awaitable[Any]]
LOOSE, RAW = pb.SampleOptions(max_js=10.0), pb.ENCODING_RAW
WAYS: dict[str, Way] = {
    "GetSample": lambda g, model: g.stub.GetSample(pb.GetSampleRequest(model=model, options=LOOSE)),
    "BatchGetSamples": lambda g, model: g.stub.BatchGetSamples(
        pb.BatchGetSamplesRequest(model=model, seeds=[0], options=LOOSE)
    ),
    "StreamSamples": lambda g, model: read(
        g.stub.StreamSamples(pb.StreamSamplesRequest(model=model, count=1, options=LOOSE))
    ),
    "JSON": lambda g, model: got(g, model, "/0"),
    "npz": lambda g, model: got(g, model, "/0.npz"),
    "image": lambda g, model: got(g, model, "/0/image.png"),
    "label": lambda g, model: got(g, model, "/0/label.png"),
    "overlay": lambda g, model: got(g, model, "/0/overlay.png"),
    "uncertainty": lambda g, model: got(g, model, "/0/uncertainty.png"),
    "tar": lambda g, model: got(g, model, ".tar", count=1),
    "batchGet": lambda g, model: g.http.post(f"/v1/models/{model}/samples:batchGet", json={"seeds": [0], "max_js": 9}),
}


async def read(stream: Any) -> None:
    async for _ in stream:
        pass


async def got(gateway: Gateway, model: str, form: str, **query: int) -> None:
    answer = await gateway.http.get(f"/v1/models/{model}/samples{form}", params={"max_js": 9, **query})
    answer.raise_for_status()


def slow_threads(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: float) -> None:
    """Let everything that runs in a thread take `seconds`. Only encoders do."""
    to_thread = asyncio.to_thread

    async def slowly(*arguments: Any) -> Any:
        clock.now += seconds
        return await to_thread(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", slowly)


@pytest.mark.parametrize("way", WAYS)
async def test_only_what_was_slow_grows(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as running:
        slow_threads(monkeypatch, running.clock, 7.0)
        running.triton.seconds, running.triton.space = {"ants": 5.0}, 0
        asked = asyncio.ensure_future(WAYS[way](running, "ants"))
        await until(lambda: running.waiting == 1 or asked.done())
        running.clock.now += 3.0
        running.triton.admit()
        await asked
        assert running.observed(*PARTS) == {
            (WAIT, "ants", ""): (1, 3.0),
            (TRITON, "ants", ""): (1, 5.0),
            (ENCODING, "ants", ""): (1, 7.0),
        }


async def test_raw_pixels_are_encoded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as running:

        def slowly(sample: Any) -> bytes:
            running.clock.now += 7.0
            return pixels.image_raw(sample)

        monkeypatch.setitem(pixels.IMAGE_ENCODERS, "raw", slowly)
        options = pb.SampleOptions(max_js=10.0, image_encoding=RAW, label_encoding=RAW)
        await running.stub.GetSample(pb.GetSampleRequest(model="ants", options=options))
        assert running.observed(ENCODING) == {(ENCODING, "ants", ""): (1, 7.0)}


async def test_models_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as running:
        running.triton.seconds = {"ants": 2.0, "bees": 5.0}
        for model in ("ants", "bees", "ants", "ants"):
            await WAYS["GetSample"](running, model)
        await WAYS["JSON"](running, "bees")
        assert running.observed(*PARTS) == {
            (WAIT, "ants", ""): (3, 0.0),
            (WAIT, "bees", ""): (2, 0.0),
            (TRITON, "ants", ""): (3, 6.0),
            (TRITON, "bees", ""): (2, 10.0),
            (ENCODING, "ants", ""): (3, 0.0),
            (ENCODING, "bees", ""): (2, 0.0),
        }


async def test_every_sample_of_a_walk_counts_and_a_message_is_one_encoding() -> None:
    async with gateway() as running:
        running.triton.seconds = {"ants": 1.0}
        await running.stub.BatchGetSamples(pb.BatchGetSamplesRequest(model="ants", seeds=range(3), options=LOOSE))
        assert running.observed(*PARTS) == {
            (WAIT, "ants", ""): (3, 0.0),
            (TRITON, "ants", ""): (3, 3.0),
            (ENCODING, "ants", ""): (1, 0.0),
        }
        request = pb.StreamSamplesRequest(model="ants", count=5, window=1, options=LOOSE)
        await read(running.stub.StreamSamples(request))
        assert running.observed(TRITON, ENCODING) == {
            (TRITON, "ants", ""): (8, 8.0),
            (ENCODING, "ants", ""): (6, 0.0),
        }


async def test_a_cached_sample_is_only_encoded() -> None:
    async with gateway(cache_bytes=1 << 20) as running:
        for _ in range(2):
            await WAYS["GetSample"](running, "ants")
        assert [running.observed(part)[part, "ants", ""][0] for part in PARTS] == [1, 1, 2]


FAILURES = [
    (TritonUnavailable("away"), "TRITON_UNAVAILABLE", "UNAVAILABLE", 503),
    (InferenceFailed("CUDA error"), "INFERENCE_FAILED", "INTERNAL", 502),
    (Overloaded("full"), "OVERLOADED", "RESOURCE_EXHAUSTED", 429),
    (ZeroDivisionError(), "builtins.ZeroDivisionError", "INTERNAL", 500),
]
NUMBERS = {code.name: str(code.value[0]) for code in grpc.StatusCode}


@pytest.mark.parametrize(("failure", "kind", "code", "status"), FAILURES)
async def test_a_failing_triton(failure: Exception, kind: str, code: str, status: int) -> None:
    """The part has the reason as its error type, the server its status, if the status is an error of the server."""
    async with gateway() as running:
        running.triton.seconds, running.triton.failures = {"ants": 2.0}, [failure, failure]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await WAYS["GetSample"](running, "ants")
        assert raised.value.code().name == code
        assert (await running.http.get("/v1/models/ants/samples/0?max_js=9")).status_code == status
        assert running.observed(*PARTS) == {(WAIT, "ants", ""): (2, 0.0), (TRITON, "ants", kind): (2, 4.0)}
        server_error = "" if code == "RESOURCE_EXHAUSTED" else code
        assert running.ended(RPC) == {("grpc", GET_SAMPLE, code, NUMBERS[code], server_error): 1}
        assert running.ended(HTTP) == {("GET", "http", SAMPLE, str(status), str(status) if status >= 500 else ""): 1}


async def test_a_failing_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as running:

        async def fail(*_: Any) -> None:
            running.clock.now += 2.0
            raise MemoryError

        monkeypatch.setattr(asyncio, "to_thread", fail)
        with pytest.raises(grpc.aio.AioRpcError):
            await WAYS["GetSample"](running, "ants")
        assert running.observed(ENCODING) == {(ENCODING, "ants", "builtins.MemoryError"): (1, 2.0)}
        assert running.ended(RPC) == {("grpc", GET_SAMPLE, "INTERNAL", "13", "INTERNAL"): 1}


async def test_who_leaves_has_waited_and_is_no_error_of_the_server() -> None:
    async with gateway() as running:
        running.triton.space = 0
        asked = asyncio.ensure_future(WAYS["GetSample"](running, "ants"))
        fetched = asyncio.ensure_future(WAYS["JSON"](running, "ants"))
        await until(lambda: running.waiting == 2)
        running.clock.now += 4.0
        asked.cancel()
        await until(lambda: running.waiting == 1)
        assert running.observed(*PARTS) == {(WAIT, "ants", "CANCELLED"): (1, 4.0)}
        await until(lambda: running.ended(RPC))
        assert running.ended(RPC) == {("grpc", GET_SAMPLE, "CANCELLED", "1", ""): 1}
        fetched.cancel()
        await until(lambda: running.ended(HTTP))
        assert running.ended(HTTP) == {("GET", "http", SAMPLE, "", ""): 1}  # nothing was sent


async def test_a_late_sample_is_an_error_of_the_server() -> None:
    async with gateway() as running:
        running.triton.space = 0
        with pytest.raises(grpc.aio.AioRpcError):
            await running.stub.GetSample(pb.GetSampleRequest(model="ants", options=LOOSE), timeout=0.2)
        await until(lambda: running.ended(RPC) and running.observed(WAIT))
        # gRPC cancels the handler at the deadline, unless the handler notices it first.
        assert running.ended(RPC).keys() <= {
            ("grpc", GET_SAMPLE, "DEADLINE_EXCEEDED", "4", "DEADLINE_EXCEEDED"),
            ("grpc", GET_SAMPLE, "CANCELLED", "1", ""),
        }
        assert running.ended(WAIT) == {("ants", "CANCELLED"): 1}


async def test_an_archive_that_breaks_off_says_why() -> None:
    async with gateway() as running:
        running.triton.failures = [None, InferenceFailed("CUDA error")]
        with contextlib.suppress(AssertionError):  # httpx says so of a body without an end
            await got(running, "ants", ".tar", count=2)
        assert running.ended(HTTP) == {("GET", "http", f"{SAMPLES}.tar", "200", "INFERENCE_FAILED"): 1}


async def test_refused_calls_are_counted_with_their_status_and_reach_no_part() -> None:
    async with gateway() as running:
        http, stub = running.http, running.stub
        rejected = {"seed": 0, "options": pb.SampleOptions(max_js=0.5)}
        for request in ({"model": "ants", **rejected}, {"model": "nonesuch"}, {"model": "ants", "model_version": "7"}):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetSample(pb.GetSampleRequest(**request))
        junk = running.channel.unary_unary(f"/{GET_SAMPLE}")
        with pytest.raises(grpc.aio.AioRpcError):
            await junk(b"\xff")
        assert running.ended(RPC) == {
            ("grpc", GET_SAMPLE, "FAILED_PRECONDITION", "9", ""): 1,
            ("grpc", GET_SAMPLE, "NOT_FOUND", "5", ""): 2,
            ("grpc", GET_SAMPLE, "INVALID_ARGUMENT", "3", ""): 1,
        }
        for path in ("ants/samples/0?max_js=0.5", "nonesuch/samples/0", "ants/samples/-1"):
            await http.get(f"/v1/models/{path}")
        assert running.ended(HTTP) == {
            ("GET", "http", SAMPLE, "422", ""): 1,
            ("GET", "http", SAMPLE, "404", ""): 1,
            ("GET", "http", SAMPLE, "400", ""): 1,
        }
        # Only the rejected ones were samples at all.
        assert running.ended(WAIT) == running.ended(TRITON) == {("ants", ""): 2}
        assert running.ended(ENCODING) == {}


async def test_calls_without_a_token_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"training {'0' * 64}\n")
    async with gateway(tokens=Tokens(tmp_path / "tokens")) as running:
        with pytest.raises(grpc.aio.AioRpcError):
            await WAYS["GetSample"](running, "ants")
        assert running.ended(RPC) == {("grpc", GET_SAMPLE, "UNAUTHENTICATED", "16", ""): 1}
        assert (await running.http.get("/v1/models")).status_code == 401
        assert running.ended(HTTP) == {("GET", "http", "", "401", ""): 1}  # refused before its route is known


async def test_callers_make_no_new_labels() -> None:
    """Unknown paths, methods, models and services, each spelled in new ways: the series stay the same."""
    async with gateway() as running:
        series: list[set[tuple[str, ...]]] = []
        for word in ("first", "second", "third"):
            await running.http.get(f"/{word}")
            await running.http.get(f"/v1/models/{word}/samples/1?model_version={word}")
            await running.http.request(word.upper(), "/v1/models")
            await running.http.request(word.upper(), f"/{word}")
            await running.http.get("/v1/models")
            with pytest.raises(grpc.aio.AioRpcError):
                await running.stub.GetSample(pb.GetSampleRequest(model=word))
            for method in (f"/labelmint.v1.SampleService/{word}", f"/{word}/GetSample"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await running.channel.unary_unary(method)(b"")
            series.append(set(running.observed(HTTP, RPC, *PARTS)))
        assert series[0] == series[1] == series[2]
        assert {labels[1:4] for labels in series[0] if labels[0] == HTTP} == {
            ("GET", "http", ""),
            ("GET", "http", SAMPLE),
            ("GET", "http", "/v1/models"),
            ("_OTHER", "http", "/v1/models"),
            ("_OTHER", "http", ""),
        }


async def test_both_names_of_a_duration_have_the_same_value() -> None:
    async with gateway() as running:
        await WAYS["GetSample"](running, "ants")
        await WAYS["JSON"](running, "ants")
        own = {key[1]: value for key, value in running.observed("labelmint_request_duration_seconds").items()}
        conventional = {key[0]: value for key, value in running.observed(HTTP, RPC).items()}
        assert conventional == {HTTP: own["rest"], RPC: own["grpc"]}


async def test_buckets_tell_a_millisecond_and_a_minute_apart() -> None:
    async with gateway() as running:
        for seconds in (0.001, 0.002, 0.02, 0.2, 2.0, 20.0, 60.0, 61.0):
            with running.metrics.triton("ants"):
                running.clock.now += seconds
        (family,) = [each for each in running.metrics.registry.collect() if each.name == TRITON]
        counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        assert {later - earlier for earlier, later in pairwise(counts)} == {0.0, 1.0}
        assert (counts[0], counts[-2], counts[-1]) == (1, 7, 8)  # up to a millisecond, up to a minute, all


def test_the_table_of_the_documentation_is_right() -> None:
    metrics = Metrics(CollectorRegistry())
    rows = re.findall(r"^\| `(\w+_seconds)` \| (.*) \|$", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    told = {name: re.findall(r"`(\w+)`", labels) for name, labels in rows}
    histograms = (metrics.http_seconds, metrics.rpc_seconds)
    parts = (metrics.slot_wait_seconds, metrics.triton_seconds, metrics.encoding_seconds)
    assert told == {each._name: list(each._labelnames) for each in (*histograms, *parts)}
