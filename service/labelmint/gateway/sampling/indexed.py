"""The index of seeds as the gateway uses it: for which requests it holds, and the list of the seeds that they deliver.

Rules of this file:
- An index holds for unmixed samples of the model digest, executor, truncation and class that it describes, and for no
  others. One that describes another digest of a served model is refused or logged, never used.
- A row group is decoded in a thread, so that the event loop goes on. A request that ends stops after the row group at
  which it is.
- A file that turns out to be damaged is logged once. From then on the gateway works as if the index lacked it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labelmint.core.errors import DeadlineExceeded, InvalidRequest, NotIndexed, UnusableFile
from labelmint.core.policy import SEED_END, Mixing, SampleOptions, Terms, check_page, mixing_of, terms_of
from labelmint.core.served_model import ServedModel
from labelmint.seed_index.layout import Described
from labelmint.seed_index.verdicts import DELIVERED, Verdicts, columns_for, verdicts

if TYPE_CHECKING:  # a gateway without an index needs no pyarrow
    from labelmint.seed_index.reading import Part, SeedIndex

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeedPage:
    """A page of a range of seeds that ends before `end`; bit i % 8 of byte i // 8 is set if a walk delivers seed i."""

    model: ServedModel
    first: int
    count: int
    delivered: bytes
    delivered_count: int
    end: int

    @property
    def next(self) -> int:
        return self.first + self.count


class Foresight:
    """What the index knows of the samples of one model on given terms."""

    def __init__(self, index: SeedIndex, described: Described, terms: Terms) -> None:
        self._index = index
        self.described = described
        self._terms = terms

    @property
    def runs(self) -> list[tuple[int, int]]:
        return self._index.runs(self.described)

    def part_at(self, seed: int) -> Part | None:
        """The row group that has this seed; None if the index lacks it."""
        return self._index.part_at(self.described, seed)

    def unknown_until(self, seed: int) -> int:
        """The end of the range of seeds without an index that `seed` is in."""
        return self._index.next_first(self.described, seed)

    async def verdicts(self, part: Part) -> Verdicts | None:
        """The verdict on each seed of a row group; None if its file turns out to be damaged."""
        try:
            return await asyncio.to_thread(self._judge, part)
        except UnusableFile as error:
            if self._index.leave_out(part):
                logger.error("going on without a file of the index: %s", error.message)
            return None

    def _judge(self, part: Part) -> Verdicts:
        columns = self._index.columns(part, columns_for(self.described, self._terms))
        return verdicts(self.described, self._terms, columns)


class Indexed:
    """The index that the gateway was started with, if any."""

    def __init__(self, index: SeedIndex | None = None, directory: Path | None = None) -> None:
        self._index = index
        self._directory = directory
        self._reported: set[Described] = set()

    def check(self, served: Iterable[ServedModel]) -> None:
        """Raises UnusableFile if the index is of another digest or executor than the served model of its name."""
        for _, problem in self._misfits(served):
            assert self._directory is not None
            raise UnusableFile(self._directory, problem)

    def report(self, served: Iterable[ServedModel]) -> None:
        """Log once what `check` would refuse."""
        for described, problem in self._misfits(served):
            if described not in self._reported:
                self._reported.add(described)
                logger.error("not using the index: %s %s", self._directory, problem)

    def foresight(self, model: ServedModel, mixing: Mixing | None, terms: Terms) -> Foresight | None:
        """What the index knows of the samples of a request; None if it does not hold for them."""
        if self._index is None or mixing is not None:
            return None
        described = Described.of(model, truncation_psi=terms.gate.truncation_psi, class_index=None)
        return Foresight(self._index, described, terms) if described in self._index.described else None

    async def list(
        self,
        model: ServedModel,
        seeds: tuple[int, int],
        options: SampleOptions,
        *,
        page_size: int = 0,
        timeout_seconds: float | None = None,
    ) -> SeedPage:
        """A page of the seeds from seeds[0] up to, not including, seeds[1] that a walk with these options delivers.

        An end of 0 is that of the run of indexed seeds. Raises InvalidRequest, Uncalibrated, NotIndexed or
        DeadlineExceeded.
        """
        size, now = check_page(seeds, page_size), asyncio.get_running_loop().time
        deadline = None if timeout_seconds is None else now() + timeout_seconds
        foresight = self._foresight_of(model, options, seeds)
        start, end = _covered(model, foresight, seeds)
        found, at, until = list[Verdicts](), start, min(end, start + size)
        while at < until:
            if deadline is not None and now() >= deadline:
                raise DeadlineExceeded()
            part = foresight.part_at(at)
            judged = None if part is None else await foresight.verdicts(part)
            if part is None or judged is None:
                _covered(model, foresight, (start, end))  # its file is left out now, so this raises
                continue
            found.append(judged[at - part.first : until - part.first])
            at = min(part.end, until)
        delivered = np.concatenate(found) & DELIVERED if found else np.zeros(0, np.uint8)
        packed = np.packbits(delivered, bitorder="little").tobytes()
        return SeedPage(model, start, until - start, packed, int(np.count_nonzero(delivered)), end)

    def _foresight_of(self, model: ServedModel, options: SampleOptions, seeds: tuple[int, int]) -> Foresight:
        """Raises InvalidRequest, Uncalibrated or NotIndexed."""
        mixing, terms = mixing_of(model, options), terms_of(model, options)
        if mixing is not None:
            raise NotIndexed(model.name, (), "an index has unmixed samples only; leave out style_seed and crossover")
        foresight = self.foresight(model, mixing, terms)
        if foresight is None:
            psi, command = terms.gate.truncation_psi, _command(model, terms.gate.truncation_psi, seeds)
            if self._index is None:
                raise NotIndexed(model.name, (), f"this gateway was started without an index (--index); {command}")
            raise NotIndexed(
                model.name,
                (),
                f"the index has no samples of model {model.name!r} with digest {model.digest[:12]}..., executor "
                f"{model.executor.name!r} and truncation_psi {psi:g}; indexed: {self._listed()}; {command}",
            )
        return foresight

    def _listed(self) -> str:
        """What the index describes, as an error names it."""
        described = () if self._index is None else self._index.described
        each = [
            f"{one.model} with digest {one.digest[:12]}..., executor {one.executor!r}, "
            f"truncation_psi {one.truncation_psi:g}"
            for one in described[:4]
        ]
        return ("; ".join(each) + (", and more" if len(described) > 4 else "")) or "nothing"

    def _misfits(self, served: Iterable[ServedModel]) -> Iterable[tuple[Described, str]]:
        """What the index describes of a served name that is no served version of it, each with what is wrong."""
        by_name: dict[str, list[ServedModel]] = {}
        for model in served:
            by_name.setdefault(model.name, []).append(model)
        for described in () if self._index is None else self._index.described:
            versions = by_name.get(described.model, [])
            if not versions or any(_fits(described, model) for model in versions):
                continue
            told = " and ".join(f"digest {each.digest[:12]}..., executor {each.executor.name!r}" for each in versions)
            yield (
                described,
                f"describes model {described.model!r} with digest {described.digest[:12]}..., executor "
                f"{described.executor!r}, and the served one has {told}; index it again with `labelmint index`",
            )


def _fits(described: Described, model: ServedModel) -> bool:
    """Whether an index describes samples of this model, at whatever truncation and class."""
    own = Described.of(model, truncation_psi=described.truncation_psi, class_index=described.class_index)
    return own == described


def _covered(model: ServedModel, foresight: Foresight, seeds: tuple[int, int]) -> tuple[int, int]:
    """The range of seeds, with its end; raises NotIndexed if the index lacks one of them."""
    runs = foresight.runs
    start, end = seeds
    if (start == end and end > 0) or start == SEED_END:
        return start, start
    run = next((run for run in runs if run[0] <= start < run[1]), None)
    if run is not None and end <= run[1]:
        return start, end or run[1]
    missing = start if run is None else run[1]
    listed = ", ".join(f"{first} to {last - 1}" for first, last in runs[:8]) + (", and more" if len(runs) > 8 else "")
    raise NotIndexed(
        model.name,
        runs,
        f"seed {missing} is not in the index, which has the seeds {listed or '(none)'}; "
        + _command(model, foresight.described.truncation_psi, (missing, end)),
    )


def _command(model: ServedModel, psi: float, seeds: tuple[int, int]) -> str:
    """How to index seeds."""
    start, end = seeds[0], seeds[1] or min(seeds[0] + 1_000_000, SEED_END)
    truncation = (
        f" --truncation-psi {psi:g}" if model.calibration is None or psi != model.calibration.truncation_psi else ""
    )
    return (
        f"run `labelmint index --model-repository R {model.name} --seeds {start}:{end}{truncation}`, and start the "
        "gateway with --index and its directory"
    )
