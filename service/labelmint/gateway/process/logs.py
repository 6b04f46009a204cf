"""The gateway's logging: Python's standard logging with one formatter, as text for people or one JSON object per line.

Rules of this file:
- A record written during a request carries the request id, and the trace id if there is one.
- A client that disconnects before its response is sent is not an error. The access log line of its request reports it.
- Code passes the fields of a record as `extra={"fields": {...}}`. A client's text in a field cannot break a line in
  either format.
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
    """Log to stderr in the format "text" or "json", records of `log_level` and above."""
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
    """Return False for gRPC's traceback of a response that it could not send to a client that left or timed out.

    gRPC drops such a response silently once it knows that the client is gone. Shortly before, it logs an error instead.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name.startswith("grpc.") and isinstance(error, grpc.aio.InternalError))


def _word(value: object) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and " " not in text and '"' not in text
    return text if plain and text else json.dumps(text)
