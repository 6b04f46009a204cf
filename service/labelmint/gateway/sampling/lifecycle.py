"""The phases of a gateway (serving, draining, closing), and how a phase ends its streams.

Rules of this file:
- A gateway is ready if it answers requests or keeps them waiting until Triton is available. In the second case it must
  still receive requests, because the demand metric would not show them otherwise.
- A draining gateway is not ready, but it still serves the requests that arrive. A closing gateway ends all streams.
- A stream never ends by a cut connection. It ends with an error that carries the `next_seed` to resume at, whether the
  reader waits for each message or each message is ready at once. Anything that delays a stream (pacing) belongs inside
  the guard, which can interrupt it there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from labelmint.core.errors import LabelmintError, ServerDraining, StreamExpired, TritonUnavailable
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.sample import Delivery


class Lifecycle:
    """`max_stream_seconds`: age at which streams end, 0 for never. `holds`: whether requests wait for Triton."""

    def __init__(self, catalog: Catalog, max_stream_seconds: float, holds: bool) -> None:
        self._catalog = catalog
        self._holds = holds
        self._max_stream_seconds = max_stream_seconds
        self._draining = False
        self._closed = False
        self._streams: set[_Interruptible] = set()

    def drain(self) -> None:
        """Stop being ready."""
        self._draining = True

    def close(self) -> None:
        """End all streams, present and future ones, with ServerDraining."""
        self._closed = True
        for stream in self._streams:
            stream.interrupt(ServerDraining())

    async def check_ready(self) -> None:
        """Raises ServerDraining after `drain`, and TritonUnavailable while requests would fail because of it."""
        if self._draining:
            raise ServerDraining()
        try:
            await self._catalog.refresh()
        except TritonUnavailable:
            if not self._holds:
                raise

    async def guard(self, stream: AsyncGenerator[Delivery, None], next_seed: int) -> AsyncGenerator[Delivery, None]:
        """Pass a stream through until it ends, expires or the gateway closes, and close it in any case.

        `next_seed` is the seed to resume at before the first message. Every LabelmintError that ends the stream carries
        the seed to resume at in its metadata.
        """
        interruptible = _Interruptible()
        expiry: asyncio.TimerHandle | None = None
        if self._max_stream_seconds:
            expired = StreamExpired(self._max_stream_seconds)
            expiry = asyncio.get_running_loop().call_later(self._max_stream_seconds, interruptible.interrupt, expired)
        if self._closed:
            interruptible.interrupt(ServerDraining())
        self._streams.add(interruptible)
        try:
            while True:
                try:
                    message = await interruptible.wait(stream.__anext__)
                except StopAsyncIteration:
                    return
                next_seed = message.next_seed
                yield message
        except LabelmintError as error:
            raise error.with_metadata(next_seed=str(next_seed)) from error
        finally:
            self._streams.remove(interruptible)
            if expiry is not None:
                expiry.cancel()
            await stream.aclose()


class _Interruptible:
    """The steps of a stream, which `interrupt` can end with an error. It needs no task per message."""

    def __init__(self) -> None:
        self._error: LabelmintError | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._last = False

    def interrupt(self, error: LabelmintError) -> None:
        """Make `wait` raise `error`: the call that is waiting, or else one of the next two calls."""
        self._error = self._error or error
        self._cancel()

    async def wait(self, step: Callable[[], Awaitable[Delivery]]) -> Delivery:
        self._waiting = asyncio.current_task()
        assert self._waiting is not None
        if self._error is not None:
            if self._last:
                raise self._error
            # Allow one more step if it needs no waiting, so that a complete stream ends normally.
            self._last = True
            asyncio.get_running_loop().call_soon(self._cancel)
        try:
            return await step()
        except asyncio.CancelledError:
            # Python 3.11 counts cancellations, which shows whether the client has disconnected too. Python 3.10 cannot
            # tell; it then raises the error, which nobody receives.
            others = self._cancelled and hasattr(self._waiting, "uncancel") and self._waiting.uncancel() > 0
            if self._error is None or not self._cancelled or others:
                raise
            raise self._error from None
        finally:
            self._waiting = None

    def _cancel(self) -> None:
        if self._waiting is not None and not self._cancelled:
            self._cancelled = True
            self._waiting.cancel()
