"""What ties together all that happens for one request: its id and, where an OTLP receiver is named, its trace.

Rules of this file:
- Ids and trace parents from outside are taken in a sane form only; whatever else comes is as if nothing had.
- OpenTelemetry is imported when it is asked for. Without it a span costs one comparison.
- Both belong to the running task and are inherited by the tasks it starts. A request has a task of its own, so what it
  sets is never set back.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,63}")
# W3C Trace Context, version 00: trace id, parent id and flags, none of the ids all zero.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_tracer: Any = None  # an opentelemetry Tracer; one for the process, as OpenTelemetry has it


def start_tracing(endpoint: str) -> Callable[[], None]:
    """Send spans to the OTLP/HTTP receiver at `endpoint` ("" for none); returns what ends that.

    The SDK's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...) hold. Raises
    ModuleNotFoundError where the extra `tracing` is not installed.
    """
    global _tracer
    if not endpoint:
        return lambda: None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = Resource({SERVICE_NAME: "labelmint", SERVICE_VERSION: version("labelmint")})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces_url(endpoint))))
    _tracer = provider.get_tracer("labelmint")

    def end() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return end


def traces_url(endpoint: str) -> str:
    """Where traces go below a receiver's base URL, by the OTLP specification."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def request_id() -> str:
    """The id of the request that the running task works for; "" outside of one."""
    return _request_id.get()


def trace_id() -> str:
    """The trace of the running task in hexadecimal; "" without one."""
    if _tracer is None:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def begin_request(name: str, given_id: str, traceparent: str) -> Callable[[str, bool], None]:
    """Make a request the running task's: take over its id and trace, or make new ones.

    Returns what ends its span, with its status and whether that is the server's failure.
    """
    if not _TRACEPARENT.fullmatch(traceparent):
        traceparent = ""
    if _REQUEST_ID.fullmatch(given_id):
        _request_id.set(given_id)
    else:
        _request_id.set(traceparent.split("-")[1] if traceparent else uuid.uuid4().hex)
    if _tracer is None:
        return lambda status, failed: None
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
    attributes = {"labelmint.request_id": request_id()}
    span = _tracer.start_span(name, context=parent, kind=trace.SpanKind.SERVER, attributes=attributes)
    context.attach(trace.set_span_in_context(span))

    def end(status: str, failed: bool) -> None:
        span.set_attribute("labelmint.status", status)
        if failed:
            span.set_status(trace.StatusCode.ERROR)
        span.end()

    return end


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """Time what happens inside as a part of the running task's trace."""
    if _tracer is None:
        yield
        return
    named = {f"labelmint.{key}": value for key, value in attributes.items()}
    with _tracer.start_as_current_span(name, attributes=named):
        yield


def outgoing_headers() -> dict[str, str]:
    """What a call to another service carries so that its spans join the trace (W3C Trace Context)."""
    headers: dict[str, str] = {}
    if _tracer is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(headers)
    return headers
