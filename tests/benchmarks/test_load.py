"""Tests of the benchmarks' shared load generator, on services with known times."""

import asyncio
import itertools
import selectors
import time
from collections.abc import Iterator
from types import SimpleNamespace

import load
import pytest

pytestmark = pytest.mark.unit


class Selector(selectors.DefaultSelector):
    """Where a loop would sleep until its next timer, this moves its clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        self.now += 0.0 if events else timeout or 0.0
        return events


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it has nothing to do, on any machine."""

    def __init__(self) -> None:
        self._driven = Selector()
        super().__init__(self._driven)

    def time(self) -> float:
        return self._driven.now


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    driven = Loop()
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=driven.time))
    yield driven
    driven.close()


async def answer(seed: int) -> None:
    await asyncio.sleep(0.01)


def test_callers_go_on_until_the_seconds_and_the_answers_are_there(loop: Loop) -> None:
    run = loop.run_until_complete(load.closed(answer, 4, itertools.count(), seconds=0.105, answers=4))
    assert run.calls[-1][1] == pytest.approx(0.11) and len(run.calls) == 4 * 11
    run = loop.run_until_complete(load.closed(answer, 8, itertools.count(), seconds=0.0, answers=8))
    assert 8 <= len(run.calls) < 16, "calls in progress are waited for"
    run = loop.run_until_complete(load.closed(answer, 3, itertools.count(), rounds=5))
    assert len(run.calls) == 15


def test_arrivals_keep_their_rate_whatever_the_answers_take(loop: Loop) -> None:
    async def slow(seed: int) -> None:
        await asyncio.sleep(0.2)

    run = loop.run_until_complete(load.opened(slow, 200.0, 100, seeds=itertools.count(), random_seed=0))
    begun = sorted(begin for begin, _ in run.calls)
    assert len(begun) == 100 and 0.35 < begun[-1] < 0.75
    assert [end - begin for begin, end in run.calls] == pytest.approx([0.2] * 100)
    again = loop.run_until_complete(load.opened(slow, 200.0, 100, seeds=itertools.count(), random_seed=0))
    assert begun == pytest.approx(sorted(begin for begin, _ in again.calls)), "a seed gives the same arrivals"


async def test_errors_that_are_counted_are_no_answers_and_others_end_the_load() -> None:
    async def odd_fails(seed: int) -> None:
        if seed % 2:
            raise TimeoutError

    run = await load.closed(odd_fails, 1, itertools.count(), answers=10, counted=(TimeoutError,))
    assert len(run.calls) == 5 and run.failures == {"TimeoutError": 5}
    assert load.figures(run)["failures"] == {"TimeoutError": 5}
    with pytest.raises(TimeoutError):
        await load.closed(odd_fails, 1, itertools.count(), answers=10)


def test_figures_are_those_of_the_calls() -> None:
    run = load.Run([(0.0, 1.0), (0.0, 2.0), (1.0, 4.0), (2.0, 4.0)])
    assert load.figures(run)["samples_per_second"] == 1.0 and load.figures(run)["p50"] == 2.0
    assert load.figures(run, first_round=2)["p50"] == 2.5
    assert load.figures(run, first_round=9)["p50"] == 2.0, "a loop of one round has no other calls"
    hundred = load.Run([(0.0, float(seconds)) for seconds in range(101)])
    assert [load.figures(hundred)[key] for key in load.PERCENTILES] == [50.0, 95.0, 99.0]


async def test_the_load_costs_little() -> None:
    async def at_once(seed: int) -> None:
        await asyncio.sleep(0)

    begun = time.process_time()  # whatever else the machine does
    run = await load.closed(at_once, 16, itertools.count(), answers=5_000)
    assert (time.process_time() - begun) / len(run.calls) < 0.001
