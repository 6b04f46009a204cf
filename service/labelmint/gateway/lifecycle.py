"""Where a gateway is in its life (serving, draining, closing), and how streams learn of it.

Rules of this file:
- Ready is who answers what comes, or holds it until Triton is there: it must be asked, or nobody learns of the demand.
- Draining: not ready, but whoever still comes is served. Closing: no stream goes on.
- A stream never ends by a cut connection: it ends with an error that carries the `next_seed` to resume at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from labelmint.errors import LabelmintError, ServerDraining, StreamExpired, TritonUnavailable
from labelmint.gateway.catalog import Catalog


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
        self._closing = asyncio.Event()

    def drain(self) -> None:
        """From now on not ready."""
        self._draining = True

    def close(self) -> None:
        """From now on streams end with ServerDraining."""
        self._closing.set()

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
        closing = asyncio.create_task(self._closing.wait())
        now = asyncio.get_running_loop().time
        expiry = now() + self._max_stream_seconds if self._max_stream_seconds else None
        step: asyncio.Task[T] | None = None
        try:
            while True:
                step = asyncio.create_task(_next(stream))
                left = None if expiry is None else max(0.0, expiry - now())
                await asyncio.wait({step, closing}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                # A step that needs no waiting is done by now: a stream that is complete ends as such.
                if not step.done():
                    raise ServerDraining() if closing.done() else StreamExpired(self._max_stream_seconds)
                try:
                    message = step.result()
                except _Ended:
                    return
                next_seed = message.next_seed
                yield message
        except LabelmintError as error:
            raise error.with_metadata(next_seed=str(next_seed)) from error
        finally:
            # A step may have ended in the very moment in which the client left: its end is taken note of here too.
            tasks = [task for task in (step, closing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stream.aclose()


class _Ended(Exception):
    """StopAsyncIteration for a task, which cannot carry that one."""


async def _next(stream: AsyncGenerator[T, None]) -> T:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise _Ended from None
