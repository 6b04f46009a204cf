"""ASGI middleware that cancels the work for an HTTP client that disconnected.

Rules of this file:
- If the client disconnects before its response is complete, the application's task is cancelled.
- The application receives the request unchanged. The middleware reads at most one message of the body ahead.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        working = asyncio.current_task()
        assert working is not None
        answered = gone = False

        async def watch() -> None:
            nonlocal gone
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            if answered:
                await messages.put(message)  # the application may be waiting for it
            else:
                gone = True
                working.cancel()

        async def send_on(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, messages.get, send_on)
        except asyncio.CancelledError:
            if not gone:
                raise
        finally:
            watching.cancel()
