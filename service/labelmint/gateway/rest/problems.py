"""Errors on the REST wire: every one is RFC 9457 problem+json, whoever found it.

Rules of this file:
- This is the one place where errors become HTTP answers; a class in `labelmint.core.errors` is never looked at singly.
- Unknown exceptions become an opaque 500; their traceback goes to the log only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from labelmint.core.errors import InvalidRequest, LabelmintError
from labelmint.core.policy import SEED_END
from labelmint.gateway.rest.messages import Problem

logger = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}

_DESCRIPTIONS = {
    400: "The request cannot be honoured; `metadata.field` names the field.",
    401: "No token, or none that is known.",
    404: "No such model, or no such version of it.",
    409: "The model is at another revision than the one asked for.",
    410: "The version of the model went while the request waited.",
    413: "The body is too large.",
    422: "The sample was rejected by the JS gate.",
    429: "Too many requests in flight, or a limit of the token is reached; see Retry-After.",
    502: "Triton failed to run the model.",
    503: "Triton is not ready, or the gateway is shutting down.",
    504: "The sample was not ready in time.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the document at /docs says of these errors."""
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {PROBLEM_TYPE: {"schema": PROBLEM_SCHEMA}}}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Let the application answer every error as a problem."""

    async def answer_http(request: Request, error: Exception) -> Response:
        """Starlette's own answers: no such route, method not allowed."""
        assert isinstance(error, HTTPException)
        titles = {404: "No such path", 405: "Method not allowed"}
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(app, request))
        body = Problem(
            title=titles.get(error.status_code, "HTTP error"),
            status=error.status_code,
            detail=f"{error.detail}; the paths that exist are listed at /docs",
            reason="NO_SUCH_ROUTE",
            metadata={},
        )
        return JSONResponse(body.model_dump(), error.status_code, headers, PROBLEM_TYPE)

    app.add_exception_handler(LabelmintError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)


def problem(error: LabelmintError, headers: Mapping[str, str] | None = None) -> Response:
    body = Problem(
        title=error.title,
        status=error.http_status,
        detail=error.message,
        reason=error.reason,
        metadata=error.metadata,
    )
    return JSONResponse(body.model_dump(), error.http_status, {**error.http_headers, **(headers or {})}, PROBLEM_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LabelmintError)
    cache_control = getattr(request.state, "cache_control", None)
    if error.lasting and cache_control is not None:
        return problem(error, {"Cache-Control": cache_control})
    return problem(error)


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """FastAPI's list of problems as one InvalidRequest that names the first field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        field, message = "body", f"is not JSON: {first['ctx']['error']}"
    elif first["type"] == "extra_forbidden":
        message = "unknown parameter; see /docs for those that exist"
    elif field in ("seed", "style_seed"):
        message = f"{first['input']!r} is not a seed; a seed is digits, 0 to {SEED_END - 1}, without zeros in front"
    return problem(InvalidRequest(field, message))


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    logger.error("unexpected error while answering", exc_info=error)
    return problem(LabelmintError("an unexpected error happened; the gateway's log has it"))


def _methods(app: FastAPI, request: Request) -> list[str]:
    """The methods that the path of a request has, over all its routes."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found.update(getattr(route, "methods", None) or ())
    return sorted(found)
