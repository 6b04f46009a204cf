"""How the gateway logs: standard logging with one formatter, for people or as one JSON object a line.

Rules of this file:
- A record that is made for a request carries the request's id, and its trace where there is one.
- What is nobody's fault is no error: a client that leaves before its answer could be sent is told of by the line about
  its request.
- Fields of a record are given as `extra={"fields": {...}}`; a caller's text can break no line of either format.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

import grpc.aio

from labelmint import tracing


def configure_logging(log_format: str, log_level: str) -> None:
    """Log to stderr in the format "text" or "json", from the level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(log_format))
    handler.addFilter(_is_ours)
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)


class Formatter(logging.Formatter):
    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        for name, value in (("request_id", tracing.request_id()), ("trace_id", tracing.trace_id())):
            if value:
                fields[name] = value
        if self._json:
            return json.dumps(self._object(record, fields))
        words = [record.getMessage(), *(f"{name}={_word(value)}" for name, value in fields.items())]
        text = f"labelmint: {' '.join(words)}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text

    def _object(self, record: logging.LogRecord, fields: dict[str, Any]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            described["exception"] = self.formatException(record.exc_info)
        return described


def _is_ours(record: logging.LogRecord) -> bool:
    """False for gRPC's traceback of an answer that it could not send: the client had gone, or its deadline had passed.

    gRPC drops such an answer by itself once it has heard of that; in the moment before it calls it an error.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name.startswith("grpc.") and isinstance(error, grpc.aio.InternalError))


def _word(value: object) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and " " not in text and '"' not in text
    return text if plain and text else json.dumps(text)
