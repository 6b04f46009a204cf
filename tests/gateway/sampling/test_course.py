"""The course of a walk, with verdicts that come when the test lets them come."""

import asyncio
import itertools
import random
from typing import Any

import numpy as np
import pytest

from labelmint.core.policy import SEED_END, Walk
from labelmint.gateway.sampling.course import Course, Mint, Skipped
from labelmint.seed_index.verdicts import DELIVERED, FILTERED, REJECTED

pytestmark = pytest.mark.unit


class Known:
    """Verdicts on the seeds of some ranges; a range in `damaged` turns out to have none."""

    def __init__(self, ranges: list[range], damaged: frozenset[int] = frozenset()) -> None:
        draw = np.random.default_rng(0)
        self.all = draw.choice(
            np.array([DELIVERED, REJECTED, FILTERED, REJECTED | DELIVERED], np.uint8), 400, p=[0.1, 0.5, 0.3, 0.1]
        )
        self.ranges, self.damaged = ranges, damaged
        self.asked: list[int] = []
        self.open = asyncio.Event()
        self.open.set()

    def part_at(self, seed: int) -> Any:
        return next((Part(each) for each in self.ranges if seed in each), None)

    def unknown_until(self, seed: int) -> int:
        return min((each.start for each in self.ranges if each.start > seed), default=SEED_END)

    async def verdicts(self, part: Any) -> Any:
        self.asked.append(part.first)
        await self.open.wait()
        return None if part.first in self.damaged else self.all[part.first : part.end]


class Part:
    def __init__(self, seeds: range) -> None:
        self.first, self.end = seeds.start, seeds.stop


async def steps(course: Course, end: int) -> list[Mint | Skipped]:
    """The steps up to that which reaches `end`."""
    found: list[Mint | Skipped] = []
    while True:
        step = course.take()
        if step is None:
            assert course.loading
            await asyncio.wait(course.loading)
            continue
        if (step.seed if isinstance(step, Mint) else step.first) >= end:
            return found
        found.append(step)


RANGES = [range(10, 60), range(60, 61), range(61, 130), range(200, 300)]


@pytest.mark.parametrize(("start", "shards", "shard"), list(itertools.product((0, 15, 130, 250), (1, 3, 70), (0, 2))))
async def test_a_course_has_every_seed_once(start: int, shards: int, shard: int) -> None:
    shard %= shards
    known = Known(RANGES, damaged=frozenset({60, 200}))
    walk = Walk(start, shard, shards)
    trusted = [seed for each in (RANGES[0], RANGES[2]) for seed in each]
    passed: list[int] = []
    for step in await steps(Course(walk, known), 400):  # type: ignore[arg-type]
        if isinstance(step, Mint):
            assert step.foreseen == (step.seed in trusted)
            assert not step.foreseen or known.all[step.seed] & DELIVERED
            passed.append(step.seed)
            continue
        seeds = list(range(step.first, step.next_seed, step.step))
        verdicts = known.all[seeds]
        assert set(seeds) <= set(trusted) and not (verdicts & DELIVERED).any() and step.seeds == len(seeds) > 0
        assert step.rejected == (verdicts & REJECTED > 0).sum() and step.filtered == (verdicts & FILTERED > 0).sum()
        cut = random.Random(step.first).randrange(1, step.seeds + 1)
        first = step.cut(cut)
        assert (first.seeds, first.next_seed) == (cut, seeds[cut - 1] + 1)
        assert first.rejected == (verdicts[:cut] & REJECTED > 0).sum()
        passed += seeds
    assert passed == [seed for seed in range(start, 400) if seed % shards == shard]


async def test_a_course_does_not_wait_and_reads_a_part_once() -> None:
    known = Known([range(0, 100), range(100, 200)])
    known.open.clear()
    course = Course(Walk(0), known)  # type: ignore[arg-type]
    assert course.take() is None and course.take() is None
    (loading,) = course.loading
    await asyncio.sleep(0)
    assert known.asked == [0]
    known.open.set()
    await asyncio.wait({loading})
    assert not course.loading, "it is done, so there is nothing to wait for"
    assert course.take() is not None
    await steps(course, 150)
    assert known.asked == [0, 100]


async def test_a_shard_reads_only_the_parts_that_have_its_seeds() -> None:
    known = Known([range(first, first + 10) for first in range(0, 400, 10)])
    await steps(Course(Walk(5, 5, 100), known), 400)  # type: ignore[arg-type]
    assert known.asked == [0, 100, 200, 300]


async def test_without_an_index_and_at_the_end_of_all_seeds() -> None:
    course = Course(Walk(SEED_END - 2), None)
    assert [course.take(), course.take(), course.take()] == [
        Mint(SEED_END - 2, False),
        Mint(SEED_END - 1, False),
        None,
    ]
    assert not course.loading and Course(Walk(SEED_END), None).take() is None
