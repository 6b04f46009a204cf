"""The names and values of OpenTelemetry's semantic conventions for HTTP and gRPC, as spans and metrics use them.

Rules of this file:
- The names are those of version 1.45 of the conventions. `rpc.grpc.status_code` is older: it stands beside its
  successor `rpc.response.status_code`, because many dashboards still read it.
- A metric's label is an attribute's name with underscores. Only values from fixed sets become labels. What a caller
  chooses freely, such as a path, is an attribute of spans only.
- The caller's fault is not a server's error: `error.type` is set for HTTP 5xx and for six gRPC codes. A client's call
  failed with every code but OK.
"""

from __future__ import annotations

from typing import TypeAlias

import grpc

Attributes: TypeAlias = dict[str, str | int]

ERROR_TYPE = "error.type"
DURATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
MODEL_INFER = "inference.GRPCInferenceService/ModelInfer"

_OTHER = "_OTHER"
_HTTP_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
_MAX_TEXT = 200  # characters of a text that the caller chose freely
_SERVER_CODES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNIMPLEMENTED", "DEADLINE_EXCEEDED")


def http_method(method: str) -> str:
    """The method, or `_OTHER` for a name that a caller has invented."""
    return method if method in _HTTP_METHODS else _OTHER


def http_span_name(method: str, route: str) -> str:
    """`GET /v1/models/{model}`; only the method where no route matches, and `HTTP` for an invented method."""
    known = http_method(method)
    return f"{'HTTP' if known == _OTHER else known} {route}".rstrip()


def http_request(method: str, scheme: str, path: str, *, query: str) -> Attributes:
    """What is known of a request when it begins."""
    attributes: Attributes = {
        "http.request.method": http_method(method),
        "url.scheme": scheme,
        "url.path": path[:_MAX_TEXT],
    }
    if query:
        attributes["url.query"] = query[:_MAX_TEXT]
    if http_method(method) == _OTHER:
        attributes["http.request.method_original"] = method[:_MAX_TEXT]
    return attributes


def http_response(route: str, status: int | None) -> Attributes:
    """What is known of a request when it ends. `route` is "" if none matched, `status` None if nothing was sent."""
    attributes: Attributes = {}
    if route:
        attributes["http.route"] = route
    if status is not None:
        attributes["http.response.status_code"] = status
    return attributes


def http_error(status: int | None) -> str:
    """The error type of a status that a server sent; "" if it is no error of the server."""
    return str(status) if status is not None and status >= 500 else ""


def rpc_call(method: str) -> Attributes:
    """A gRPC call of `method`, `package.Service/Method`, when it begins."""
    return {"rpc.system.name": "grpc", "rpc.method": method}


def rpc_status(code: grpc.StatusCode) -> Attributes:
    """The status of a gRPC call."""
    return {"rpc.response.status_code": code.name, "rpc.grpc.status_code": code.value[0]}


def rpc_server_error(code: grpc.StatusCode) -> str:
    """The error type of a call that a server answered; "" if it is no error of the server."""
    return code.name if code.name in _SERVER_CODES else ""


def server_at(address: str) -> Attributes:
    """The server at HOST:PORT, as a client sees it; any other target of gRPC is an address without a port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return {"server.address": address}
    return {"server.address": host.strip("[]"), "server.port": int(port)}
