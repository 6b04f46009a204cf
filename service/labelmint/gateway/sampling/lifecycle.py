"""Where a gateway is in its life (serving, draining, closing), and how streams learn of it.

Rules of this file:
- Ready is who answers what comes, or holds it until Triton is there: it must be asked, or nobody learns of the demand.
- Draining: not ready, but whoever still comes is served. Closing: no stream goes on.
- A stream never ends by a cut connection: it ends with an error that carries the `next_seed` to resume at. That holds
  whether its next message is waited for or always ready. What may make it wait (pacing) belongs inside the guard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from labelmint.core.errors import LabelmintError, ServerDraining, StreamExpired, TritonUnavailable
from labelmint.gateway.sampling.catalog import Catalog


class Resumable(Protocol):
    """A message of a stream: where a new stream goes on after it."""

    @property
    def next_seed(self) -> int: ...


T = TypeVar("T", bound=Resumable)


class Lifecycle:
    """`max_stream_seconds`: age at which streams end, 0 for never. `holds`: what is asked waits for Triton."""

    def __init__(self, catalog: Catalog, max_stream_seconds: float, holds: bool) -> None:
        self._catalog = catalog
        self._holds = holds
        self._max_stream_seconds = max_stream_seconds
        self._draining = False
        self._closed = False
        self._streams: set[_Interruptible] = set()

    def drain(self) -> None:
        """From now on not ready."""
        self._draining = True

    def close(self) -> None:
        """From now on streams end with ServerDraining."""
        self._closed = True
        for stream in self._streams:
            stream.interrupt(ServerDraining())

    async def check_ready(self) -> None:
        """Raises ServerDraining once the end has begun, and TritonUnavailable while what is asked would fail for it."""
        if self._draining:
            raise ServerDraining()
        try:
            await self._catalog.refresh()
        except TritonUnavailable:
            if not self._holds:
                raise

    async def guard(self, stream: AsyncGenerator[T, None], next_seed: int) -> AsyncGenerator[T, None]:
        """Pass a stream through until it ends, expires or the gateway closes; closes it in any case.

        `next_seed` is where to resume before the first message. Every LabelmintError that ends the stream carries
        where to resume as metadata.
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
    """The steps of a stream, which somebody else may break off with an error; without a task for each message."""

    def __init__(self) -> None:
        self._error: LabelmintError | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._last = False

    def interrupt(self, error: LabelmintError) -> None:
        """Let `wait` raise `error`: the one that is waiting, or else one of the next two."""
        self._error = self._error or error
        self._cancel()

    async def wait(self, step: Callable[[], Awaitable[T]]) -> T:
        self._waiting = asyncio.current_task()
        assert self._waiting is not None
        if self._error is not None:
            if self._last:
                raise self._error
            # One more step, if it needs no waiting: a complete stream ends as such.
            self._last = True
            asyncio.get_running_loop().call_soon(self._cancel)
        try:
            return await step()
        except asyncio.CancelledError:
            # Python 3.11 counts: is it the client who left, too? 3.10 cannot tell, and the error goes nowhere then.
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
