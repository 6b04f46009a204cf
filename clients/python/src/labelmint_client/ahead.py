"""Asks for the samples of given seeds, and delivers them in the order of the seeds.

Rules of this file:
- Several calls of BatchGetSamples are in flight, so that the gateway works while the reader does. What is asked for
  ahead of the reader is bounded by their number and size.
- The reader gets each sample or an error, never a gap: all seeds come from ListSeeds, so a seed without a sample means
  that the gateway serves other samples than it listed.
- A call is retried as long as a stream would be.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from labelmint_client.client import Client
from labelmint_client.errors import DeadlineExceeded, LabelmintError
from labelmint_client.messages import Filtered, Model, Rejection, Sample, SampleOptions
from labelmint_client.policy import check_digest

WINDOW = 8  # that of streams
MAX_BATCH = 64
_CALLS = 4  # in flight, or more for a window above 4 * MAX_BATCH


@dataclass(frozen=True)
class Calls:
    """How many calls are in flight, and the most seeds of each, 1 to MAX_BATCH."""

    count: int
    seeds: int


def calls_of(window: int) -> Calls:
    """Return the calls that ask for `window` samples ahead of the reader; 0: 8 samples."""
    window = window or WINDOW
    seeds = min(MAX_BATCH, -(-window // _CALLS))
    return Calls(window // seeds, seeds)


def samples_ahead(
    client: Client, model: Model, seeds: Iterable[int], *, options: SampleOptions, calls: Calls
) -> Iterator[Sample]:
    """Yield the sample of each seed, in order, of this version and digest of the model.

    Raises ModelVersionGone if the model has another digest by now, LabelmintError if the gateway rejects a seed.
    """
    left = iter(seeds)
    pending: deque[Future[list[Sample]]] = deque()
    pool = ThreadPoolExecutor(calls.count, "labelmint-ahead")
    try:
        while True:
            while len(pending) < calls.count and (batch := list(itertools.islice(left, calls.seeds))):
                pending.append(pool.submit(_fetch, client, model, batch, options))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # calls in flight end when the client is closed


def _fetch(client: Client, model: Model, seeds: list[int], options: SampleOptions) -> list[Sample]:
    patience_ends = time.monotonic() + client._patience_seconds
    while True:
        try:
            outcomes = client.batch_get_samples(model.name, seeds, options, model_version=model.version)
            return [_sample(model, outcome, options) for outcome in outcomes]
        except LabelmintError as error:
            waitable = error.retryable or isinstance(error, DeadlineExceeded)
            if not waitable or time.monotonic() >= patience_ends:
                raise


def _sample(model: Model, outcome: Sample | Rejection | Filtered, options: SampleOptions) -> Sample:
    """Return the sample. Raises ModelVersionGone, or LabelmintError for a seed whose sample is not delivered."""
    if isinstance(outcome, Sample):
        check_digest(model, outcome.model_digest, model.digest, "dataset")
        return outcome
    why = (
        f"rejected: its JS score {outcome.js_score:.6g} is above the gate {outcome.threshold:.6g}"
        if isinstance(outcome, Rejection)
        else f"filtered: it does not satisfy {', '.join(options.where)}"
    )
    raise LabelmintError(
        f"the gateway listed seed {outcome.seed} of model {model.name!r}, and now it is {why}. The gate has changed "
        "since the seeds were listed, or the gateway's index is of other samples: make the dataset anew, and if that "
        "does not help, the index",
        grpc.StatusCode.FAILED_PRECONDITION,
    )
