"""The spans of a real gateway, as a real receiver gets them: names, attributes, status, and what is below what.

Rules of this file:
- The gateway's Triton is a stand-in on a real socket. It hands everything on to a real Triton, except the samples that
  a test lets fail, and it notes the trace headers of every sample.
- Each test sends its requests in a trace of its own and reads that trace when its spans have arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import start_service
from tests.support.gateways import Gateway
from tests.support.metrics import IN_TRITON
from tests.support.running import Running
from tests.support.traces import Receiver, Span, receiving
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]

PARENT = "b7ad6b7169203331"
ROUTE, GET_SAMPLE = "/v1/models/{model}/samples/{seed}", "labelmint.v1.SampleService/GetSample"
MODEL_INFER = "inference.GRPCInferenceService/ModelInfer"
PARTS = ["encode", "triton infer", "wait for slot"]
LOOSE = pb.SampleOptions(max_js=1e9)
numbers = count(1)


class Standin(grpc.GenericRpcHandler):
    """Hands calls on to the Triton at `url`. A sample fails with the next of `failures`, if there is one.

    While `goes_on` is not set, samples are held.
    """

    def __init__(self, url: str) -> None:
        self.address = ""
        self.failures: list[grpc.StatusCode] = []
        self.traceparents: list[str] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self._triton = grpc.aio.insecure_channel(url, options=[("grpc.max_receive_message_length", -1)])

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def hand_on(request: bytes, context: Any) -> bytes:
            if details.method == f"/{MODEL_INFER}":
                self.traceparents.append(str(dict(context.invocation_metadata()).get("traceparent")))
                await self.goes_on.wait()
                if self.failures:
                    await context.abort(self.failures.pop(0), "as the test wants it")
            return await self._triton.unary_unary(details.method)(request)  # type: ignore[no-any-return]

        return grpc.unary_unary_rpc_method_handler(hand_on)

    async def start(self) -> grpc.aio.Server:
        server = grpc.aio.server(handlers=[self], options=[("grpc.max_send_message_length", -1)])
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server


@dataclass
class Traced:
    """A gateway before two stand-ins, and its spans."""

    gateway: Gateway
    standins: Sequence[Standin]
    receiver: Receiver
    traces: list[str] = field(default_factory=list)

    def headers(self) -> dict[str, str]:
        """The headers of a request in a new trace."""
        self.traces.append(f"{next(numbers):032x}")
        return {"traceparent": f"00-{self.traces[-1]}-{PARENT}-01"}

    async def get(self, path: str, method: str = "GET") -> int:
        return (await self.gateway.http.request(method, path, headers=self.headers())).status_code

    async def sample(self, seed: int = 7, model: str = "light", options: pb.SampleOptions = LOOSE) -> str:
        """The name of the code that the call ends with."""
        request = pb.GetSampleRequest(model=model, seed=seed, options=options)
        try:
            await self.gateway.stub.GetSample(request, metadata=tuple(self.headers().items()))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async def spans(self) -> tuple[Span, list[Span]]:
        """The span of the last request and all others of its trace, by name."""

        def root() -> list[Span]:
            return [span for span in self.receiver.spans("labelmint", self.traces[-1]) if span.kind == "SERVER"]

        (found,) = await until(root)
        spans = [span for span in self.receiver.spans("labelmint", self.traces[-1]) if span is not found]
        return found, sorted(spans, key=lambda span: span.name)


@pytest_asyncio.fixture(scope="module")
async def traced(small_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    directory = tmp_path_factory.mktemp("traced")
    standins = [Standin(small_triton.grpc_url) for _ in range(2)]
    servers = [await standin.start() for standin in standins]
    url = f"ipv4:{','.join(standin.address for standin in standins)}"
    with receiving() as receiver:
        flags = ("--triton-url", url, "--otlp-endpoint", receiver.url)
        soon = ("env", "OTEL_BSP_SCHEDULE_DELAY=50")  # in milliseconds; spans leave every five seconds by default
        service = await asyncio.to_thread(
            start_service, directory / "serve.log", *flags, repository=directory, under=soon
        )
        running = Running(service, directory)
        yield Traced(Gateway(service, running.stub, running.http), standins, receiver)
        await running.close()
    for server in servers:
        await server.stop(None)


def attempts(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.kind == "CLIENT"]


async def test_a_request_over_rest(traced: Traced) -> None:
    assert await traced.get("/v1/models/light/samples/7?max_js=1e9") == 200
    root, others = await traced.spans()
    assert (root.name, root.kind, root.error, root.parent_span_id) == (f"GET {ROUTE}", "SERVER", False, PARENT)
    assert root.attributes == {
        "http.request.method": "GET",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/models/light/samples/7",
        "url.query": "max_js=1e9",
        "labelmint.request_id": traced.traces[-1],
    }
    assert [(span.name, span.kind) for span in others] == [
        ("encode", "INTERNAL"),
        (MODEL_INFER, "CLIENT"),
        ("triton infer", "INTERNAL"),
        ("wait for slot", "INTERNAL"),
    ]


async def test_a_call_over_grpc(traced: Traced) -> None:
    assert await traced.sample() == "OK"
    root, others = await traced.spans()
    assert (root.name, root.kind, root.error, root.parent_span_id) == (GET_SAMPLE, "SERVER", False, PARENT)
    host, _, port = traced.gateway.service.grpc.rpartition(":")
    assert root.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": GET_SAMPLE,
        "rpc.response.status_code": "OK",
        "rpc.grpc.status_code": 0,
        "server.address": host,
        "server.port": int(port),
        "labelmint.request_id": traced.traces[-1],
    }
    (attempt,) = attempts(others)
    parts = [span for span in others if span is not attempt]
    assert [span.name for span in parts] == PARTS and {span.parent_span_id for span in parts} == {root.span_id}
    assert all(span.attributes == {"labelmint.model": "light"} and not span.error for span in parts)
    assert attempt.parent_span_id == parts[PARTS.index("triton infer")].span_id


async def test_triton_is_called_in_the_trace(traced: Traced) -> None:
    for standin in traced.standins:
        standin.traceparents.clear()
    assert await traced.sample(8) == "OK"
    (attempt,) = attempts((await traced.spans())[1])
    heard = [standin for standin in traced.standins if standin.traceparents]
    assert [standin.traceparents for standin in heard] == [[f"00-{traced.traces[-1]}-{attempt.span_id}-01"]]
    host, _, port = heard[0].address.rpartition(":")
    assert not attempt.error and attempt.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": MODEL_INFER,
        "rpc.response.status_code": "OK",
        "rpc.grpc.status_code": 0,
        "server.address": host,
        "server.port": int(port),
        "labelmint.triton_model": "light",
    }


CODES = {"INTERNAL": 13, "RESOURCE_EXHAUSTED": 8}
FAILURES = [("INTERNAL", "INFERENCE_FAILED", 502), ("RESOURCE_EXHAUSTED", "OVERLOADED", 429)]


@pytest.mark.parametrize(("code", "reason", "status"), FAILURES)
async def test_triton_fails(traced: Traced, code: str, reason: str, status: int) -> None:
    """The call to Triton has Triton's code as its error, the part ours; the server's span only if it is at fault."""
    for over_grpc in (True, False):
        for standin in traced.standins:
            standin.failures = [grpc.StatusCode[code]]
        if over_grpc:
            assert await traced.sample(9) == code
        else:
            assert await traced.get("/v1/models/light/samples/9?max_js=1e9") == status
        for standin in traced.standins:
            standin.failures.clear()
        root, others = await traced.spans()
        at_fault = code == "INTERNAL"
        assert root.error == at_fault
        server_error = (code if over_grpc else str(status)) if at_fault else None
        assert root.attributes.get("error.type") == server_error
        if over_grpc:
            assert root.attributes["rpc.response.status_code"] == code
            assert root.attributes["rpc.grpc.status_code"] == CODES[code]
        else:
            assert root.attributes["http.response.status_code"] == status
        assert {span.name: (span.error, span.attributes.get("error.type")) for span in others} == {
            "wait for slot": (False, None),
            "triton infer": (True, reason),
            MODEL_INFER: (True, code),
        }
        (attempt,) = attempts(others)
        assert attempt.attributes["rpc.response.status_code"] == code


async def test_each_attempt_has_a_span(traced: Traced) -> None:
    """If one Triton refuses a sample and another one gives it, only the first attempt has failed."""
    # Only the Triton whose turn it is fails, whichever it is.
    shared = [grpc.StatusCode.UNAVAILABLE]
    for standin in traced.standins:
        standin.failures = shared
    assert await traced.sample(10) == "OK"
    assert not shared
    root, others = await traced.spans()
    calls = attempts(others)
    assert sorted(str(span.attributes["rpc.response.status_code"]) for span in calls) == ["OK", "UNAVAILABLE"]
    assert {span.attributes.get("error.type") for span in calls if span.error} == {"UNAVAILABLE"}
    assert len({span.attributes["server.port"] for span in calls}) == 2
    assert not root.error and not any(span.error for span in others if span not in calls)


async def test_the_callers_fault_is_no_error_of_the_server(traced: Traced) -> None:
    rejected = pb.SampleOptions(max_js=0.0)
    for code, number, asked in (
        ("FAILED_PRECONDITION", 9, traced.sample(7, options=rejected)),
        ("NOT_FOUND", 5, traced.sample(7, "nonesuch")),
        ("INVALID_ARGUMENT", 3, traced.sample(7, options=pb.SampleOptions(max_js=-1.0))),
    ):
        assert await asked == code
        root, others = await traced.spans()
        assert root.attributes["rpc.response.status_code"] == code and root.attributes["rpc.grpc.status_code"] == number
        assert not any(span.error or "error.type" in span.attributes for span in (root, *others))
    for status, path in ((422, "light/samples/7?max_js=0"), (404, "nonesuch/samples/7"), (400, "light/samples/07")):
        assert await traced.get(f"/v1/models/{path}") == status
        root, others = await traced.spans()
        assert root.name == f"GET {ROUTE}" and root.attributes["http.response.status_code"] == status
        assert not any(span.error or "error.type" in span.attributes for span in (root, *others))


async def test_the_name_of_a_span_has_nothing_that_a_caller_chose(traced: Traced) -> None:
    for method, path, name in (
        ("GET", "/no/such/path", "GET"),
        ("BREW", "/v1/models", "HTTP /v1/models"),
        ("BREW", "/coffee", "HTTP"),
        ("POST", "/v1/models/light/samples:batchGet", "POST /v1/models/{model}/samples:batchGet"),
    ):
        await traced.get(path, method)
        root, _ = await traced.spans()
        assert root.name == name and root.attributes["url.path"] == path
        assert root.attributes.get("http.route", "") == name.partition(" ")[2]
        known = (method, None) if method != "BREW" else ("_OTHER", "BREW")
        assert tuple(root.attributes.get(f"http.request.method{end}") for end in ("", "_original")) == known


async def test_who_leaves_ends_the_wait_and_the_request_is_no_error(traced: Traced) -> None:
    for standin in traced.standins:
        standin.goes_on.clear()
    # The Tritons get as many samples as there is room for; the others wait in the gateway.
    requests = [pb.GetSampleRequest(model="light", seed=seed, options=LOOSE) for seed in range(60)]
    filling = [asyncio.ensure_future(traced.gateway.stub.GetSample(request)) for request in requests]
    waiting, gateway = 'labelmint_queue_depth_samples{kind="request"}', traced.gateway

    async def all_arrived() -> bool:
        return await gateway.metric(IN_TRITON) + await gateway.metric(waiting) == len(requests)

    await until(all_arrived)
    depth = await gateway.metric(waiting)
    asked = asyncio.ensure_future(traced.sample(7))
    await gateway.until(waiting, lambda now: depth > 0 and now == depth + 1)
    asked.cancel()
    root, others = await traced.spans()
    for standin in traced.standins:
        standin.goes_on.set()
    await asyncio.gather(*filling)
    assert root.attributes["rpc.response.status_code"] == "CANCELLED" and not root.error
    assert [(span.name, span.error, span.attributes["error.type"]) for span in others] == [
        ("wait for slot", True, "CANCELLED")
    ]
