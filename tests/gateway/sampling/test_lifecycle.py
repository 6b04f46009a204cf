"""The guard of streams: complete streams end normally, others with an error that names the seed to resume at."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from labelmint.core.errors import LabelmintError, ServerDraining, StreamExpired, TritonUnavailable
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.triton.client import TritonClient

pytestmark = pytest.mark.unit


@dataclass
class Step:
    next_seed: int


class Source:
    """A stream of `count` steps 1, 2, ...; after them it ends, waits for ever or fails, as `after` says."""

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
        finally:
            self.closed = True


@pytest_asyncio.fixture
async def catalog() -> AsyncIterator[Catalog]:
    client = TritonClient("127.0.0.1:1")
    yield Catalog(client, "fused")
    await client.close()


async def collect(lifecycle: Lifecycle, source: Source, close_at: int = 0) -> tuple[list[int], LabelmintError | None]:
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


async def test_a_stream_expires(catalog: Catalog) -> None:
    seen, error = await collect(Lifecycle(catalog, 0.01, False), Source(2, "waits"))
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
        await waiting
    assert source.closed


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
