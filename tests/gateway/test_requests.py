"""Request ids, logs and traces: what an operator sees of one request, from the wire to Triton."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service, start_service
from tests.support.processes import refused_start
from tests.support.traces import Receiver, receiving
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SAMPLE = "/v1/models/tiny/samples/7"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
HOSTILE = ("", "x" * 65, "a b", 'a"b', "ä", "-x")
NO_PARENTS = (
    "",
    "x",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    TRACEPARENT.upper(),
    f"01{TRACEPARENT[2:]}",
)
ROOTS = ["GET /v1/models/{model}/samples/{seed}", "labelmint.v1.SampleService/GetSample"]
GENERATED = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Iterator[Service]:
    """A service that logs everything as JSON. Its own words are in the log too, so that it is not asked for its ports
    in words for people."""
    log = tmp_path_factory.mktemp("json") / "serve.log"
    running = start_service(log, "--log-format", "json", "--log-level", "debug", repository=tiny_repository)
    yield running
    assert running.stop() == 0


def records(service: Service) -> list[dict[str, Any]]:
    """Every line of the log; each must be one JSON object."""
    return [json.loads(line) for line in service.log.read_text().splitlines()]


def record_of(service: Service, request_id: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [r for r in records(service) if r["message"] == "request" and r.get("request_id") == request_id]

    (record,) = wait_for(found)
    return record


def test_a_sane_id_is_kept_and_logged(chatty: Service) -> None:
    answer = httpx.get(f"{chatty.http}{SAMPLE}?max_js=1e9", headers={"x-request-id": "job-7:a.b"})
    assert answer.headers["x-request-id"] == "job-7:a.b"
    record = record_of(chatty, "job-7:a.b")
    assert record["level"] == "info" and record["transport"] == "rest" and record["method"] == "GET"
    assert record["status"] == 200 and record["path"] == SAMPLE and record["seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", record["time"])


def test_an_id_comes_with_errors_too(chatty: Service) -> None:
    for path in ("/v1/models/nonesuch", "/nonesuch", "/readyz"):
        answer = httpx.get(chatty.http + path, headers={"x-request-id": f"e{len(path)}"})
        assert answer.headers["x-request-id"] == f"e{len(path)}"
        assert record_of(chatty, f"e{len(path)}")["status"] == answer.status_code


@pytest.mark.parametrize("given", HOSTILE)
def test_what_is_no_id_is_replaced(chatty: Service, given: str) -> None:
    answer = httpx.get(
        f"{chatty.http}/healthz", headers={"x-request-id": given.encode(), "traceparent": given.encode()}
    )
    assert GENERATED.fullmatch(answer.headers["x-request-id"])
    assert record_of(chatty, answer.headers["x-request-id"])["level"] == "debug"


def test_the_id_of_a_trace_is_one(chatty: Service) -> None:
    answer = httpx.get(f"{chatty.http}/healthz", headers={"traceparent": TRACEPARENT})
    assert answer.headers["x-request-id"] == TRACE
    for given in NO_PARENTS:
        made = httpx.get(f"{chatty.http}/healthz", headers={"traceparent": given}).headers["x-request-id"]
        assert GENERATED.fullmatch(made) and made != TRACE


def test_ids_over_grpc(chatty: Service) -> None:
    with grpc.insecure_channel(chatty.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        options = pb.SampleOptions(max_js=1e9)
        request = pb.GetSampleRequest(model="tiny", seed=7, options=options)
        _, call = stub.GetSample.with_call(request, metadata=(("x-request-id", "grpc-1"),))
        assert ("x-request-id", "grpc-1") in [tuple(entry) for entry in call.trailing_metadata()]
        record = record_of(chatty, "grpc-1")
        assert (record["method"], record["code"], record["model"]) == ("GetSample", "OK", "tiny")
        assert record["status"] == 0 and isinstance(record["seconds"], float)
        stream = stub.StreamSamples(
            pb.StreamSamplesRequest(model="tiny", count=2, options=options), metadata=(("x-request-id", "grpc-2"),)
        )
        assert len([message for message in stream if message.HasField("sample")]) == 2
        assert record_of(chatty, "grpc-2")["code"] == "OK"
        with pytest.raises(grpc.RpcError) as caught:
            hostile = pb.GetModelRequest(model='none\n{"such": 1}' + "x" * 5000)
            stub.GetModel(hostile, metadata=(("x-request-id", "x" * 65),))
        trailers = dict(caught.value.trailing_metadata())
        assert GENERATED.fullmatch(trailers["x-request-id"]) and "grpc-status-details-bin" in trailers
        record = record_of(chatty, trailers["x-request-id"])
        assert (record["code"], record["status"]) == ("NOT_FOUND", 5) and len(record["model"]) == 200
        left = stub.StreamSamples(
            pb.StreamSamplesRequest(model="tiny", options=options), metadata=(("x-request-id", "grpc-3"),)
        )
        next(left)
        left.cancel()
        assert record_of(chatty, "grpc-3")["code"] == "CANCELLED"


def test_lines_for_people(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    try:
        httpx.get(f"{service.http}{SAMPLE}?max_js=1e9", headers={"x-request-id": "seven"})
        wait_for(lambda: "request_id=seven" in service.log.read_text())
        (line,) = [line for line in service.log.read_text().splitlines() if "request_id=seven" in line]
        assert line.startswith(f"labelmint: request transport=rest method=GET path={SAMPLE} status=200 seconds=0.")
        httpx.get(f"{service.http}/healthz", headers={"x-request-id": "probe"})
        httpx.get(f"{service.http}{SAMPLE}?max_js=1e9", headers={"x-request-id": "after"})
        wait_for(lambda: "request_id=after" in service.log.read_text())
        assert "probe" not in service.log.read_text()
    finally:
        service.stop()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def sent_until_triton_told(service: Service, receiver: Receiver) -> str:
    """Sends one traced request a door, and others in a new trace where Triton's exporter lost some of its spans.

    It sends a batch every few seconds, and now and then one does not leave it; the trace that arrived is returned.
    """
    request = pb.GetSampleRequest(model="tiny", seed=7, options=pb.SampleOptions(max_js=1e9))

    def arrived(trace: str) -> bool:
        return [span.name for span in receiver.spans("labelmint-triton", trace)].count("InferRequest") == 2

    for number in range(1, 5):
        trace = f"{number:032x}"
        traceparent = f"00-{trace}-{PARENT}-01"
        asked = httpx.get(f"{service.http}{SAMPLE}?max_js=1e9", headers={"traceparent": traceparent})
        assert asked.status_code == 200
        with grpc.insecure_channel(service.grpc) as channel:
            pb_grpc.SampleServiceStub(channel).GetSample(request, metadata=(("traceparent", traceparent),))
        with contextlib.suppress(AssertionError):
            wait_for(partial(arrived, trace), 15.0)
            return trace
    pytest.fail("of no trace did Triton send all spans")


def test_a_trace_goes_from_the_wire_to_triton(receiver: Receiver, tmp_path: Path, tiny_repository: Path) -> None:
    log = tmp_path / "serve.log"
    service = start_service(log, "--otlp-endpoint", receiver.url, repository=tiny_repository)
    try:
        trace = sent_until_triton_told(service, receiver)
    finally:
        stopped = service.stop()
    assert stopped == 0  # what was not sent yet of ours is sent now
    assert f"trace_id={trace}" in log.read_text()
    spans = receiver.spans("labelmint", trace)
    parts, attempt = ["wait for slot", "triton infer", "encode"], "inference.GRPCInferenceService/ModelInfer"
    assert sorted(span.name for span in spans) == sorted([*ROOTS, *2 * parts, *2 * [attempt]])
    roots = [span for span in spans if span.parent_span_id == PARENT]
    assert sorted(span.name for span in roots) == ROOTS
    for root in roots:
        below = {span.name: span for span in spans if span.parent_span_id == root.span_id}
        assert sorted(below) == sorted(parts)
        (call,) = [span for span in spans if span.parent_span_id == below["triton infer"].span_id]
        assert call.name == attempt
    calls = {span.span_id for span in spans if span.name == attempt}
    inside = receiver.spans("labelmint-triton", trace)
    tops = [span for span in inside if span.parent_span_id in calls]
    assert len(tops) == 2, "Triton's spans do not hang below our calls"
    assert {"tiny", "tiny_generator", "tiny_style_interpreter"} <= {span.name for span in inside}


def test_without_a_receiver_nothing_of_it_is_loaded() -> None:
    script = (
        "import sys; sys.modules.update({'opentelemetry.sdk': None, 'opentelemetry.exporter': None})\n"
        "import labelmint.gateway.process.server\n"
        "from labelmint import tracing\n"
        "end = tracing.start_tracing('')\n"
        "done = tracing.begin_request('GET', 'x', '', attributes={})\n"
        "with tracing.span('wait', {}): assert tracing.outgoing_headers() == {} and tracing.trace_id() == ''\n"
        "done('GET /', {}); end()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_extra_is_named(tmp_path: Path, tiny_repository: Path) -> None:
    script = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "sys.argv[:1] = ['labelmint', 'serve', '--otlp-endpoint', 'http://127.0.0.1:1', '--model-repository']\n"
        "from labelmint.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny_repository)], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "labelmint: traces need OpenTelemetry; run `pip install '.[tracing]'` in a clone of labelmint\n"
    )


def test_a_receiver_that_is_down_harms_nobody(tmp_path: Path, tiny_repository: Path) -> None:
    log = tmp_path / "serve.log"
    service = start_service(log, "--otlp-endpoint", "http://127.0.0.1:1", repository=tiny_repository)
    for _ in range(3):
        assert httpx.get(f"{service.http}{SAMPLE}?max_js=1e9").status_code == 200
    assert service.stop() == 0


def test_an_endpoint_that_is_no_url_is_refused(tiny_repository: Path) -> None:
    said = refused_start("--model-repository", str(tiny_repository), "--otlp-endpoint", "localhost:4318")
    assert "otlp_endpoint" in said
