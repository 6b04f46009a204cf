"""The progress of a walk, and the bar that shows it on stderr.

Rules of this file:
- tqdm is imported when a bar is made: without one, the client does not need it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import grpc
import numpy as np

from labelmint_client.errors import LabelmintError, NotIndexed
from labelmint_client.messages import ListedSeeds

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG_SECONDS = 30.0  # between two progress lines if stderr is not a terminal


@dataclass(frozen=True)
class Progress:
    """The progress of a stream, or of a pull with its earlier runs.

    done: samples taken. accepted: those of them that the gate accepted.
    seeds: seeds passed. filtered: those of them that the gate accepted and that do not satisfy the conditions.
    """

    done: int
    accepted: int
    filtered: int
    seeds: int


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on stderr: rate, acceptance and time left. The first report, before any sample, only starts it.

    total: how many samples there will be; None if that is unknown, and then also the time left.
    """

    def __init__(self, total: int | None) -> None:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a progress bar needs tqdm: run `pip install tqdm`, or leave out progress=True", name="tqdm"
            ) from error
        self._new = tqdm
        self._total = total
        self._initial: int | None = None
        self._bar: tqdm[NoReturn] | None = None

    def show(self, progress: Progress) -> None:
        if self._initial is None:
            self._initial = progress.done
            return
        if self._bar is None:
            seconds = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
            self._bar = self._new(
                total=self._total, initial=self._initial, unit="sample", mininterval=seconds, maxinterval=seconds
            )
        shares = f"{(progress.accepted + progress.filtered) / max(1, progress.seeds):.1%} accepted"
        shares += f", {progress.filtered} filtered" if progress.filtered else ""
        self._bar.set_postfix_str(shares, refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def total_of(listed: ListedSeeds, count: int, shard_index: int, shard_count: int) -> int:
    """Return how many samples a walk over listed seeds delivers. The arguments are those of `Client.stream_samples`."""
    there = int(np.count_nonzero(listed.seeds % shard_count == shard_index))
    return min(count, there) if count else there


def cannot_list(error: LabelmintError) -> bool:
    """Whether the gateway has no index of these seeds, or is older than indexes are."""
    return isinstance(error, NotIndexed) or error.code is grpc.StatusCode.UNIMPLEMENTED
