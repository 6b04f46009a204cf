"""A receiver of traces, and the spans that arrived there."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """`kind` is SERVER, CLIENT or INTERNAL. `error` is whether the status is Error; any other status is Unset."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_span_id: str
    kind: str
    error: bool
    attributes: dict[str, str | int]


def spans_of(content_type: str, body: bytes) -> list[Span]:
    """The spans of an OTLP/HTTP request; ids are hexadecimal in its JSON form."""
    if content_type == "application/x-protobuf":
        message = MessageToDict(ExportTraceServiceRequest.FromString(body))
        hexadecimal = lambda text: base64.b64decode(text).hex()  # noqa: E731
    else:
        assert content_type == "application/json"
        message, hexadecimal = json.loads(body), str
    found = []
    for resource in message["resourceSpans"]:
        service = _attributes(resource["resource"])["service.name"]
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            ids = [hexadecimal(span.get(key, "")) for key in ("traceId", "spanId", "parentSpanId")]
            status, kind = span.get("status", {}).get("code", 0), str(span.get("kind", "")).removeprefix("SPAN_KIND_")
            assert status in (0, "STATUS_CODE_ERROR"), status
            found.append(Span(str(service), span["name"], *ids, kind, status != 0, _attributes(span)))
    return found


def _attributes(message: dict[str, Any]) -> dict[str, str | int]:
    values = {entry["key"]: entry["value"] for entry in message.get("attributes", ())}
    return {
        key: int(value["intValue"]) if "intValue" in value else value.get("stringValue", "")
        for key, value in values.items()
    }


class Receiver:
    """A real OTLP/HTTP receiver of traces, in both of its forms: Triton's exporter speaks JSON, Python's protobuf."""

    def __init__(self) -> None:
        self.received: list[Span] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                received.extend(spans_of(self.headers["content-type"], body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self, service: str, trace: str) -> list[Span]:
        return [span for span in self.received if (span.service, span.trace_id) == (service, trace)]


@contextmanager
def receiving() -> Iterator[Receiver]:
    running = Receiver()
    try:
        yield running
    finally:
        running.server.shutdown()
        running.server.server_close()
