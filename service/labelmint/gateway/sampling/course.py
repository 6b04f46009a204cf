"""The course of a walk: which of its seeds to mint, and which an index lets it skip.

Rules of this file:
- Where the index knows the verdicts, only seeds that will be delivered are minted. All others are skipped in runs that
  count as many rejected and filtered seeds as the same walk without an index.
- Where it does not know them, before, between and after its ranges, every seed is minted.
- A course never waits. While a row group is being read, `take` has no step and `loading` is what to wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from labelmint.core.policy import SEED_END, Walk
from labelmint.gateway.sampling.indexed import Foresight
from labelmint.seed_index.verdicts import DELIVERED, FILTERED, REJECTED, Verdicts

if TYPE_CHECKING:  # a gateway without an index needs no pyarrow
    from labelmint.seed_index.reading import Part


class Mint(NamedTuple):
    """A seed to mint; `foreseen`: the index says that its sample will be delivered."""

    seed: int
    foreseen: bool


@dataclass(frozen=True)
class Skipped:
    """Seeds of a walk in a row that it will not deliver, and their verdicts, [N]; they are `step` apart."""

    first: int
    step: int
    verdicts: Verdicts

    @property
    def seeds(self) -> int:
        return len(self.verdicts)

    @property
    def rejected(self) -> int:
        return int(np.count_nonzero(self.verdicts & REJECTED))

    @property
    def filtered(self) -> int:
        return int(np.count_nonzero(self.verdicts & FILTERED))

    @property
    def next_seed(self) -> int:
        """The seed after the last one."""
        return self.first + (self.seeds - 1) * self.step + 1

    def cut(self, seeds: int) -> Skipped:
        """The first of them, at most so many."""
        return Skipped(self.first, self.step, self.verdicts[:seeds])


Step: TypeAlias = Mint | Skipped


def steps_of(seeds: range, verdicts: Verdicts) -> Iterator[Step]:
    """The steps over seeds with known verdicts, [N] for N seeds."""
    done = 0
    for place in np.flatnonzero(verdicts & DELIVERED).tolist():
        if place > done:
            yield Skipped(seeds[done], seeds.step, verdicts[done:place])
        yield Mint(seeds[place], True)
        done = place + 1
    if done < len(seeds):
        yield Skipped(seeds[done], seeds.step, verdicts[done:])


def _unknown(seeds: range) -> Iterator[Step]:
    """The steps over seeds whose verdicts are unknown."""
    return (Mint(seed, False) for seed in seeds)


class Course:
    """The steps of a walk in order, with what an index knows of its samples: None if there is no index of them."""

    def __init__(self, walk: Walk, foresight: Foresight | None) -> None:
        self._rest = walk.seeds()
        self._foresight = foresight
        self._steps: Iterator[Step] = iter(())
        self._loading: asyncio.Task[Iterator[Step]] | None = None

    @property
    def loading(self) -> set[asyncio.Task[Iterator[Step]]]:
        """The reading of a row group that is not done yet, if any."""
        return {self._loading} if self._loading is not None and not self._loading.done() else set()

    def take(self) -> Step | None:
        """The next step; None at the end of the walk, or while `loading`."""
        while (step := next(self._steps, None)) is None:
            if self._loading is not None:
                if not self._loading.done():
                    return None
                self._steps, self._loading = self._loading.result(), None
            elif self._rest:
                self._go_on(self._foresight)
            else:
                return None
        return step

    def _go_on(self, foresight: Foresight | None) -> None:
        """Begin the next stretch: the row group that has the next seed, or the seeds before the next row group."""
        if foresight is None:
            self._steps = _unknown(self._until(SEED_END))
            return
        part = foresight.part_at(self._rest[0])
        if part is None:
            self._steps = _unknown(self._until(foresight.unknown_until(self._rest[0])))
        else:
            self._loading = asyncio.create_task(self._known(foresight, part, self._until(part.end)))

    def _until(self, end: int) -> range:
        """Take the seeds below `end`, which has at least the next one."""
        count = len(range(self._rest.start, end, self._rest.step))
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    async def _known(self, foresight: Foresight, part: Part, seeds: range) -> Iterator[Step]:
        verdicts = await foresight.verdicts(part)
        if verdicts is None:
            return _unknown(seeds)
        return steps_of(seeds, verdicts[seeds[0] - part.first :: seeds.step][: len(seeds)])
