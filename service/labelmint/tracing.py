"""Request ids and traces, which link everything that happens for one request; traces need an OTLP receiver.

Rules of this file:
- Request ids and traceparent headers of clients are used only if they are well-formed. Others are ignored.
- OpenTelemetry is imported only when tracing is enabled. Without tracing, a span costs one comparison.
- The id and the trace belong to the running asyncio task, and the tasks that it starts inherit them. Each request has
  its own task, so they need no reset.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.metadata import version
from typing import Any

from labelmint.conventions import ERROR_TYPE

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,63}")
# W3C Trace Context, version 00: trace id, parent id and flags. Neither id may be all zeros.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_tracer: Any = None  # an opentelemetry Tracer, one per process as is usual with OpenTelemetry


def start_tracing(endpoint: str) -> Callable[[], None]:
    """Send spans to the OTLP/HTTP receiver at `endpoint` ("" for none); returns a function that stops tracing.

    The SDK's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...) apply. Raises
    ModuleNotFoundError if the extra `tracing` is not installed.
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
    """The URL for traces under a receiver's base URL, as the OTLP specification defines it."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def request_id() -> str:
    """The id of the request that the running task serves; "" outside of a request."""
    return _request_id.get()


def trace_id() -> str:
    """The trace id of the running task in hexadecimal; "" without a trace."""
    if _tracer is None:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def begin_request(
    name: str, given_id: str, traceparent: str, *, attributes: Mapping[str, str | int]
) -> Callable[[str, Mapping[str, str | int]], None]:
    """Begin a request in the running task: adopt the client's id and trace, or create new ones.

    Returns a function that ends the request's span. It takes the final name of the span and further attributes.
    """
    if not _TRACEPARENT.fullmatch(traceparent):
        traceparent = ""
    if _REQUEST_ID.fullmatch(given_id):
        _request_id.set(given_id)
    else:
        _request_id.set(traceparent.split("-")[1] if traceparent else uuid.uuid4().hex)
    if _tracer is None:
        return lambda name, attributes: None
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
    known = {**attributes, "labelmint.request_id": request_id()}
    span = _tracer.start_span(name, context=parent, kind=trace.SpanKind.SERVER, attributes=known)
    context.attach(trace.set_span_in_context(span))

    def end(name: str, attributes: Mapping[str, str | int]) -> None:
        span.update_name(name)
        _tell(span, attributes)
        span.end()

    return end


@contextmanager
def span(
    name: str, attributes: Mapping[str, str | int], *, client: bool = False
) -> Iterator[Callable[[Mapping[str, str | int]], None]]:
    """Record the duration of the enclosed block as a span of the running task's trace.

    `client`: whether the block is a call to another service. Yields a function that takes further attributes.
    """
    if _tracer is None:
        yield lambda attributes: None
        return
    from opentelemetry.trace import SpanKind

    kind = SpanKind.CLIENT if client else SpanKind.INTERNAL
    # The block says what failed: not every exception is an error of the span.
    with _tracer.start_as_current_span(name, kind=kind, attributes=attributes, set_status_on_exception=False) as begun:
        yield partial(_tell, begun)


def _tell(span: Any, attributes: Mapping[str, str | int]) -> None:
    """Set attributes, and the status that follows from them: a span has an error type if and only if it failed."""
    from opentelemetry.trace import StatusCode

    span.set_attributes(attributes)
    if ERROR_TYPE in attributes:
        span.set_status(StatusCode.ERROR)


def outgoing_headers() -> dict[str, str]:
    """The headers (W3C Trace Context) that let the spans of a called service join the trace."""
    headers: dict[str, str] = {}
    if _tracer is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(headers)
    return headers
