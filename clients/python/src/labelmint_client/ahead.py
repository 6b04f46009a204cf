"""Asks for the samples of given seeds, and delivers them in the order of the seeds.

Rules of this file:
- Several calls of BatchGetSamples are in flight, so that the gateway works while the reader does. What is asked for
  ahead of the reader is bounded by the window.
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

import grpc

from labelmint_client.client import Client
from labelmint_client.errors import DeadlineExceeded, LabelmintError, ModelVersionGone
from labelmint_client.messages import Filtered, Model, Rejection, Sample, SampleOptions

WINDOW = 8  # that of streams
MAX_BATCH = 64
_CALLS = 4  # in flight, or more for a window above 4 * MAX_BATCH


def samples_ahead(
    client: Client, model: Model, seeds: Iterable[int], *, options: SampleOptions, window: int = 0
) -> Iterator[Sample]:
    """Yield the sample of each seed, in order, of this version and digest of the model.

    window: how many samples to ask for ahead of the reader; 0: 8.
    Raises ModelVersionGone if the model has another digest by now, LabelmintError if the gateway rejects a seed.
    """
    window = window or WINDOW
    per_call = min(MAX_BATCH, -(-window // _CALLS))
    calls = window // per_call
    left = iter(seeds)
    pending: deque[Future[list[Sample]]] = deque()
    pool = ThreadPoolExecutor(calls, "labelmint-ahead")
    try:
        while True:
            while len(pending) < calls and (batch := list(itertools.islice(left, per_call))):
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
            return [_sample(model, outcome) for outcome in outcomes]
        except LabelmintError as error:
            waitable = error.retryable or isinstance(error, DeadlineExceeded)
            if not waitable or time.monotonic() >= patience_ends:
                raise


def _sample(model: Model, outcome: Sample | Rejection | Filtered) -> Sample:
    if not isinstance(outcome, Sample):
        verdict = "rejects" if isinstance(outcome, Rejection) else "filters"
        raise LabelmintError(
            f"the gateway listed seed {outcome.seed} of {model.name!r} as accepted and now {verdict} it ({outcome}): "
            "its index or its calibration was replaced; start the pass anew",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    if outcome.model_digest != model.digest:
        raise ModelVersionGone(
            f"version {model.version} of model {model.name!r} now has digest {outcome.model_digest[:12]}..., this pass "
            f"began with {model.digest[:12]}...; other weights give other samples: start a new pass",
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_VERSION_GONE",
            {"model": model.name, "model_version": model.version, "model_digest": model.digest},
        )
    return outcome
