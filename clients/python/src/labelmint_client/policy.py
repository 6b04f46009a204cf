"""The decisions of a client, free of I/O: which endpoint to call and when, when to give up, and where a stream resumes.

Rules of this file:
- Functions take the time as an argument and return waits as numbers. So both clients, blocking and asyncio, share them.
- Only `retryable` errors are retried. If another endpoint is healthy, the client calls it at once. Otherwise it waits
  with exponential backoff and full jitter, and never less than the gateway requested.
- A deadline covers all attempts of a call. A stream has patience instead, which each message renews.
- A walk is pinned to the digest that it began with, because other weights give other samples. Its whole state is
  `next_seed`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from labelmint_client.errors import LabelmintError, LimitReached, ModelVersionGone, StreamExpired, translated
from labelmint_client.messages import SEED_END, Model, Sample, SampleOptions, checked, sample_of
from labelmint_client.v1 import sample_service_pb2 as pb

BASE_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 5.0
REMINDER_SECONDS = 60.0


@dataclass
class _Endpoint:
    name: str
    calls: int = 0  # in flight
    failures: int = 0  # in a row
    rests_until: float = 0.0  # no calls before this time


class Endpoints:
    """The health and load of each endpoint, by index. All calls of a client share it; it is thread-safe."""

    def __init__(self, names: Sequence[str], jitter: random.Random | None = None) -> None:
        self._jitter = jitter or random.Random()
        self._all = [_Endpoint(name) for name in names]
        # A random start, so that the clients of one job do not all begin at the same endpoint.
        self._turn = self._jitter.randrange(len(self._all))
        self._lock = threading.Lock()

    def take(self, now: float, turn: int | None = None) -> tuple[int, float]:
        """Return the endpoint of the next call and the seconds to wait before it. Call `give_back` after the call.

        It is the healthy endpoint with the fewest calls; ties are broken round-robin, from `turn` on if given. If all
        endpoints are resting after errors, it is the one whose rest ends first.
        """
        with self._lock:
            first = self._turn if turn is None else turn

            def rank(index: int) -> tuple[float, int, int]:
                rest = max(0.0, self._all[index].rests_until - now)
                return rest, self._all[index].calls, (index - first) % len(self._all)

            index = min(range(len(self._all)), key=rank)
            self._turn = index + 1
            self._all[index].calls += 1
            return index, rank(index)[0]

    def give_back(self, index: int) -> None:
        """Record that the call has ended or was never made."""
        with self._lock:
            self._all[index].calls -= 1

    def worked(self, index: int) -> None:
        """Record that a response or a stream message arrived."""
        with self._lock:
            self._all[index].failures = 0
            self._all[index].rests_until = 0.0

    def failed(self, index: int, error: LabelmintError, now: float) -> None:
        """Record a retryable error: the endpoint gets no calls for a while."""
        if isinstance(error, StreamExpired):
            return  # the gateway is healthy and requested no pause
        with self._lock:
            endpoint = self._all[index]
            ceiling = min(MAX_PAUSE_SECONDS, BASE_PAUSE_SECONDS * 2.0 ** min(endpoint.failures, 16))
            pause = (error.retry_after_seconds or 0.0) + self._jitter.uniform(0.0, ceiling)
            endpoint.failures += 1
            # A token's limit means that the caller must slow down, so no endpoint is called for a while.
            resting = self._all if isinstance(error, LimitReached) else [endpoint]
            for each in resting:
                each.rests_until = max(each.rests_until, now + pause)

    def name(self, index: int) -> str:
        return self._all[index].name


class Attempts:
    """The attempts of one call until a deadline, in seconds on the caller's monotonic clock."""

    def __init__(self, endpoints: Endpoints, deadline: float, turn: int | None = None) -> None:
        self._endpoints = endpoints
        self._deadline = deadline
        self._turn = turn
        self._last: LabelmintError | None = None

    def next(self, now: float) -> tuple[int, float]:
        """Return what `Endpoints.take` returns. Raises the last error if no time is left for another attempt."""
        index, pause = self._endpoints.take(now, self._turn)
        self._turn = None
        if self._last is not None and now + pause >= self._deadline:
            self._endpoints.give_back(index)
            raise self._last
        return index, min(pause, max(0.0, self._deadline - now))

    def remaining(self, now: float) -> float:
        """Return the seconds left for an attempt. They are above 0, so that gRPC itself reports an expired deadline."""
        return max(0.001, self._deadline - now)

    def failed(self, index: int, error: grpc.RpcError, now: float) -> LabelmintError:
        """Translate and return a retryable error; raise any other one."""
        self._last = failure = translated(error, self._endpoints.name(index))
        if not failure.retryable:
            raise failure from error
        self._endpoints.failed(index, failure, now)
        return failure


class Healing:
    """Decides when to log retries of a call or stream: at the first failure, then each minute, and on recovery."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._told = 0.0

    def cut(self, now: float) -> bool:
        """Return whether to log this failure."""
        if self._began is None:
            self._began = now
        elif now - self._told < REMINDER_SECONDS:
            return False
        self._told = now
        return True

    def healed(self, now: float) -> float | None:
        """Record a received message. Return the seconds since the first failure; None if there was no failure."""
        began, self._began = self._began, None
        return None if began is None else now - began


class Walk:
    """The state of a stream: it builds the next request and interprets each message.

    `Client.stream_samples` documents the arguments. `next_seed`: all lower seeds of the shard are done.
    `rejected_count`, `filtered_count`: how many seeds were rejected so far, and how many did not satisfy `where`.
    """

    def __init__(
        self,
        model: Model,
        start_seed: int,
        *,
        end_seed: int,
        count: int,
        shard_index: int,
        shard_count: int,
        options: SampleOptions | None,
        window: int,
        model_digest: str,
    ) -> None:
        if not 0 <= start_seed <= end_seed <= SEED_END:
            raise ValueError(f"start_seed {start_seed}, end_seed {end_seed}: they are 0 to {SEED_END}, in this order")
        if not 0 <= shard_index < shard_count:
            raise ValueError(f"shard_index: {shard_index} is out of range; give 0 to {shard_count - 1}")
        if count < 0:
            raise ValueError(f"count: {count} is negative; give 0 for a walk up to end_seed")
        self._model = model
        self._digest = model_digest or model.digest
        self._check_digest(model.digest)
        self.end_seed = end_seed
        self._undelivered = count or None  # None: no limit
        self._options = (options or SampleOptions()).message(model.task)
        self._window = window
        self._rejected_before = self._filtered_before = 0
        self.shard_index = shard_index
        self.shard_count = shard_count
        self.next_seed = start_seed
        self.rejected_count = 0
        self.filtered_count = 0

    @property
    def finished(self) -> bool:
        return self._undelivered == 0 or self._seeds_left() == 0

    def request(self) -> pb.StreamSamplesRequest:
        """Return the request for the rest of the walk."""
        self._rejected_before, self._filtered_before = self.rejected_count, self.filtered_count
        left = self._seeds_left()
        return pb.StreamSamplesRequest(
            model=self._model.name,
            model_version=self._model.version,
            start_seed=self.next_seed,
            # No more samples can be accepted than seeds are left. With this limit, the gateway generates few samples
            # beyond the end of the range.
            count=left if self._undelivered is None else min(self._undelivered, left),
            shard_index=self.shard_index,
            shard_count=self.shard_count,
            options=self._options,
            window=self._window,
        )

    def take(self, message: pb.StreamSamplesResponse) -> Sample | None:
        """Return the sample to deliver, None for a heartbeat.

        Raises ModelVersionGone if its digest is another one, LabelmintError if the gateway does not know an option.
        """
        sample = message.sample if message.HasField("sample") else None
        if sample is not None:
            self._check_digest(sample.model_digest)
            checked(sample, self._options)
        self.next_seed = min(message.next_seed, self.end_seed)
        self.rejected_count = self._rejected_before + message.rejected_count
        self.filtered_count = self._filtered_before + message.filtered_count
        if sample is None or sample.seed >= self.end_seed:
            return None
        if self._undelivered is not None:
            self._undelivered -= 1
        return sample_of(sample)

    def ended(self) -> None:
        """Record that the gateway ended the stream normally: there are no more samples."""
        if not self.finished:
            self.next_seed = self.end_seed

    def _seeds_left(self) -> int:
        first = self.next_seed + (self.shard_index - self.next_seed) % self.shard_count
        return len(range(first, self.end_seed, self.shard_count))

    def _check_digest(self, digest: str) -> None:
        check_digest(self._model, digest, self._digest, "walk")


def check_digest(model: Model, digest: str, began_with: str, what: str) -> None:
    """Raises ModelVersionGone if the version of a model now has another digest than a walk or dataset began with."""
    if digest == began_with:
        return
    raise ModelVersionGone(
        f"version {model.version} of model {model.name!r} now has digest {digest[:12]}..., this {what} began with "
        f"{began_with[:12]}...; other weights give other samples: start a new {what}",
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_VERSION_GONE",
        {"model": model.name, "model_version": model.version, "model_digest": began_with},
    )
