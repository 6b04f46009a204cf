"""A response that is generated while it is sent, and that is complete only if nothing failed.

Rules of this file:
- Backpressure: the next part is generated only after the last one was sent, so a slow reader slows the generation. When
  the client disconnects, `CancelOnDisconnect` cancels the generation.
- A failure before the first part is an ordinary error response. A later failure closes the connection without ending
  the body, so that no client mistakes a partial response for a complete one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from labelmint.core.errors import ContentNotFound, LabelmintError, ServerDraining, StreamExpired
from labelmint.gateway.sampling.metrics import error_type

logger = logging.getLogger(__name__)


class Streamed(Response):
    """Sends the parts of a generator as one body."""

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str, headers: Mapping[str, str]) -> None:
        self._parts = parts
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._parts) as parts:
                async for part in parts:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as error:
            if not started:
                raise
            # If the application returns without ending the body, the server closes the connection.
            scope["state"]["outcome"], scope["state"]["error_type"] = "aborted", error_type(error)
            if isinstance(error, LabelmintError):
                expected = isinstance(error, (ContentNotFound, ServerDraining, StreamExpired))
                level = logging.INFO if expected else logging.ERROR
                logger.log(level, "%s was broken off: %s", scope["path"], error.message)
            else:
                logger.error("%s was broken off by an unexpected error", scope["path"], exc_info=error)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
