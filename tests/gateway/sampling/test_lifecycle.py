"""The phases of a gateway, and the guard of streams.

Complete streams end normally, others with an error that names the seed to resume at.
"""

import asyncio
import gc
import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

import pytest
import pytest_asyncio

from labelmint.core.errors import LabelmintError, ServerDraining, StreamExpired, TritonUnavailable
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.triton.client import TritonClient

pytestmark = pytest.mark.unit

T = TypeVar("T")


@dataclass
class Step:
    next_seed: int


class Source:
    """A stream of `count` steps 1, 2, ...; after them it ends, waits for ever, fails or is cancelled, by `after`."""

    def __init__(self, count: int, after: str) -> None:
        self.count = count
        self.after = after
        self.closed = False

    async def stream(self) -> AsyncGenerator[Step, None]:
        try:
            for index in range(self.count):
                yield Step(index + 1)
            if self.after == "waits":
                await asyncio.Event().wait()
            if self.after == "fails":
                raise TritonUnavailable("gone")
            if self.after == "is cancelled":
                raise asyncio.CancelledError()
        finally:
            self.closed = True


@pytest_asyncio.fixture
async def catalog() -> AsyncIterator[Catalog]:
    client = TritonClient("127.0.0.1:1")
    yield Catalog(client, "fused")
    await client.close()


@dataclass
class Timer:
    """A timer of the event loop that only the test fires."""

    delay: float
    callback: Callable[..., object]
    arguments: tuple[object, ...]
    cancelled: bool = False

    def fire(self) -> None:
        self.callback(*self.arguments)

    def cancel(self) -> None:
        self.cancelled = True


@pytest_asyncio.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[Timer]:
    """The timers that the code under test starts."""
    started: list[Timer] = []

    def call_later(delay: float, callback: Callable[..., object], *arguments: object) -> Timer:
        started.append(Timer(delay, callback, arguments))
        return started[-1]

    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", call_later)
    return started


class Triton:
    """In place of a catalog: Triton is available or away."""

    def __init__(self, away: bool) -> None:
        self.away = away

    async def refresh(self) -> None:
        if self.away:
            raise TritonUnavailable("away")


def lifecycle_before(triton: Triton, holds: bool) -> Lifecycle:
    return Lifecycle(cast(Catalog, triton), 0.0, holds)


Read: TypeAlias = tuple[list[int], LabelmintError | None]


async def read(lifecycle: Lifecycle, source: Source, close_at: int = 0) -> Read:
    """The steps of a guarded stream and the error that ends it; the gateway closes at the step `close_at`."""
    seen: list[int] = []
    try:
        async for step in lifecycle.guard(source.stream(), 0):
            seen.append(step.next_seed)
            if step.next_seed == close_at:
                lifecycle.close()
    except LabelmintError as error:
        return seen, error
    finally:
        assert source.closed
    return seen, None


async def outcome(reading: asyncio.Task[T]) -> T:
    """What the task returns within more turns of the event loop than it needs, so that a lost end hangs no test."""
    for _ in range(1000):
        if reading.done():
            return reading.result()
        await asyncio.sleep(0)
    reading.cancel()
    raise AssertionError("the stream did not end")


async def collect(lifecycle: Lifecycle, source: Source, close_at: int = 0) -> Read:
    return await outcome(asyncio.create_task(read(lifecycle, source, close_at)))


async def until_it_waits(reading: asyncio.Task[Read]) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reading.done()


@pytest.mark.parametrize("holds", [False, True])
async def test_a_gateway_is_ready_while_triton_is(holds: bool) -> None:
    await lifecycle_before(Triton(away=False), holds).check_ready()


async def test_a_gateway_without_triton_is_ready_only_if_it_holds_requests() -> None:
    await lifecycle_before(Triton(away=True), True).check_ready()
    with pytest.raises(TritonUnavailable):
        await lifecycle_before(Triton(away=True), False).check_ready()


@pytest.mark.parametrize("holds", [False, True])
async def test_a_draining_gateway_is_not_ready_and_ends_no_stream(holds: bool) -> None:
    lifecycle = lifecycle_before(Triton(away=False), holds)
    lifecycle.drain()
    with pytest.raises(ServerDraining):
        await lifecycle.check_ready()
    assert await collect(lifecycle, Source(3, "ends")) == ([1, 2, 3], None)


async def test_a_stream_passes_whole(catalog: Catalog) -> None:
    assert await collect(Lifecycle(catalog, 0.0, False), Source(3, "ends")) == ([1, 2, 3], None)


async def test_a_stream_that_is_complete_ends_as_such_at_the_close(catalog: Catalog) -> None:
    assert await collect(Lifecycle(catalog, 0.0, False), Source(3, "ends"), close_at=3) == ([1, 2, 3], None)


async def test_a_stream_that_would_go_on_is_told_where(catalog: Catalog) -> None:
    seen, error = await collect(Lifecycle(catalog, 0.0, False), Source(3, "waits"), close_at=3)
    assert seen == [1, 2, 3] and isinstance(error, ServerDraining) and error.metadata == {"next_seed": "3"}


async def test_a_stream_that_never_began_resumes_at_its_start(catalog: Catalog) -> None:
    lifecycle = Lifecycle(catalog, 0.0, False)
    lifecycle.close()
    seen, error = await collect(lifecycle, Source(0, "waits"))
    assert seen == [] and isinstance(error, ServerDraining) and error.metadata == {"next_seed": "0"}


async def test_a_stream_expires(catalog: Catalog, timers: list[Timer]) -> None:
    reading = asyncio.create_task(read(Lifecycle(catalog, 60.0, False), Source(2, "waits")))
    await until_it_waits(reading)
    timers[0].fire()
    seen, error = await outcome(reading)
    assert seen == [1, 2] and isinstance(error, StreamExpired) and error.metadata == {"next_seed": "2"}


async def test_a_failure_says_where_to_resume_and_is_nobody_elses(catalog: Catalog) -> None:
    seen, error = await collect(Lifecycle(catalog, 0.0, False), Source(2, "fails"))
    assert seen == [1, 2] and isinstance(error, TritonUnavailable) and error.metadata == {"next_seed": "2"}
    assert isinstance(error.__cause__, TritonUnavailable) and error.__cause__.metadata == {}


async def test_a_reader_who_leaves_closes_the_stream(catalog: Catalog) -> None:
    source = Source(1, "waits")
    guarded = Lifecycle(catalog, 0.0, False).guard(source.stream(), 0)
    assert (await anext(guarded)).next_seed == 1
    waiting = asyncio.create_task(anext(guarded))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outcome(waiting)
    assert source.closed
    if sys.version_info >= (3, 11):
        assert waiting.cancelling() == 1, "the cancellation is the reader's, and stays counted"


async def test_a_reader_who_stops_between_two_messages_closes_the_stream(catalog: Catalog) -> None:
    source = Source(2, "waits")
    stream = source.stream()  # a reference: only the guard may close it
    guarded = Lifecycle(catalog, 0.0, False).guard(stream, 0)
    assert (await anext(guarded)).next_seed == 1
    await guarded.aclose()
    assert source.closed


async def test_a_closing_gateway_ends_a_stream_whose_messages_are_all_ready(catalog: Catalog) -> None:
    seen, error = await collect(Lifecycle(catalog, 0.0, False), Source(100, "ends"), close_at=3)
    assert isinstance(error, ServerDraining) and error.metadata == {"next_seed": str(seen[-1])}
    assert seen[-1] <= 5, "two messages at most after the close"


async def test_a_stream_gets_the_gateways_time_and_its_timer_ends_with_it(
    catalog: Catalog, timers: list[Timer]
) -> None:
    lifecycle = Lifecycle(catalog, 60.0, False)
    assert await collect(lifecycle, Source(2, "ends")) == ([1, 2], None)
    assert [(timer.delay, timer.cancelled) for timer in timers] == [(60.0, True)]
    assert not lifecycle._streams, "the gateway forgets it"


async def test_a_gateway_that_limits_no_stream_starts_no_timer(catalog: Catalog, timers: list[Timer]) -> None:
    assert await collect(Lifecycle(catalog, 0.0, False), Source(2, "ends")) == ([1, 2], None)
    assert timers == []


async def test_the_first_reason_to_end_a_stream_counts(catalog: Catalog, timers: list[Timer]) -> None:
    lifecycle = Lifecycle(catalog, 60.0, False)
    reading = asyncio.create_task(read(lifecycle, Source(2, "waits")))
    await until_it_waits(reading)
    timers[0].fire()
    lifecycle.close()
    seen, error = await outcome(reading)
    assert seen == [1, 2] and isinstance(error, StreamExpired)


async def test_the_end_of_a_stream_leaves_no_trace_of_the_cancellation_behind_it(catalog: Catalog) -> None:
    """The task of the reader counts as not cancelled, so that its time limits work, and the log does not confuse."""
    lifecycle = Lifecycle(catalog, 0.0, False)
    reading = asyncio.create_task(read(lifecycle, Source(2, "waits")))
    await until_it_waits(reading)
    lifecycle.close()
    _, error = await outcome(reading)
    assert isinstance(error, ServerDraining)
    assert "CancelledError" not in "".join(traceback.format_exception(error))
    if sys.version_info >= (3, 11):
        assert reading.cancelling() == 0


async def test_a_reader_who_leaves_as_the_gateway_closes_is_cancelled(catalog: Catalog) -> None:
    """Python 3.10 cannot tell, and raises the error."""
    lifecycle = Lifecycle(catalog, 0.0, False)
    reading = asyncio.create_task(read(lifecycle, Source(2, "waits")))
    await until_it_waits(reading)
    lifecycle.close()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError) if sys.version_info >= (3, 11) else nullcontext():
        await outcome(reading)


async def test_a_cancellation_that_is_not_the_gateways_stays_one(catalog: Catalog) -> None:
    with pytest.raises(asyncio.CancelledError):
        await collect(Lifecycle(catalog, 0.0, False), Source(3, "is cancelled"), close_at=3)


async def test_a_client_that_leaves_as_its_stream_ends_leaves_nothing_behind(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    """The test lets the client disconnect 0 to 7 turns of the event loop after the stream's end begins."""
    for turns in range(8):
        ending = asyncio.Event()

        async def stream(ending: asyncio.Event = ending) -> AsyncGenerator[Step, None]:
            yield Step(1)
            await ending.wait()

        async def read(source: AsyncGenerator[Step, None]) -> None:
            async for _ in Lifecycle(catalog, 0.0, False).guard(source, 0):
                pass

        reading = asyncio.create_task(read(stream()))
        for _ in range(10):
            await asyncio.sleep(0)
        ending.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    gc.collect()
    assert "never retrieved" not in caplog.text
