"""The blocking client, and its streams, which resume on their own after an error.

Rules of this file:
- This file makes calls and waits. `policy.py` decides what to do next.
- Several threads may share a client. Only one thread may read a stream. Any thread may call `close` of either.
- A stream reads a message only when its caller asks for one. It reads nothing ahead, so a slow caller slows the
  gateway down (backpressure).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from labelmint_client import calls
from labelmint_client.base import BaseClient, BaseStream, HealingLog
from labelmint_client.calls import Call
from labelmint_client.errors import LabelmintError
from labelmint_client.messages import (
    SEED_END,
    Filtered,
    ListedSeeds,
    Model,
    Rejection,
    Sample,
    SampleOptions,
    SeedPage,
    listed,
)
from labelmint_client.policy import Walk
from labelmint_client.progress import Bar, cannot_list, total_of

T = TypeVar("T")


class Client(BaseClient):
    """The blocking client; `BaseClient` documents the arguments."""

    def _open_channels(self) -> list[grpc.Channel]:
        channels = self._connection.channels()
        # Close the channels before Python exits. After that, gRPC's threads are gone and closing an open stream hangs.
        weakref.finalize(self, _close, channels, os.getpid())
        return channels

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all calls and close all connections."""
        _close(self._channels, self._process)

    def list_models(self) -> list[Model]:
        """Return all versions of all served models, ordered by name and version."""
        return self._make(calls.list_models())

    def get_model(self, model: str, model_version: str = "", *, class_index: int | None = None) -> Model:
        """Return the description of a model; without `model_version`, of its highest version. Raises ModelNotFound.

        class_index: the generator class whose calibration to describe, for a model with generator classes.
        """
        return self._make(calls.get_model(model, model_version, class_index))

    def get_sample(
        self, model: str, seed: int, options: SampleOptions | None = None, *, model_version: str = ""
    ) -> Sample:
        """Return the sample of a seed, 0 to 2^32 - 1. Raises SampleRejected or ContentMissing.

        SampleRejected: its JS score is above the gate. ContentMissing: it does not satisfy `options.where`.
        """
        task = self._task(model, model_version)
        return self._make(calls.get_sample(model, seed, options, model_version=model_version, task=task))

    def batch_get_samples(
        self,
        model: str,
        seeds: Sequence[int],
        options: SampleOptions | None = None,
        *,
        style_seeds: Sequence[int] = (),
        model_version: str = "",
    ) -> list[Sample | Rejection | Filtered]:
        """Return the outcome of each of 1 to 64 seeds, in the order of the seeds.

        Seeds above the gate are a Rejection; seeds whose sample does not satisfy `options.where` are Filtered.

        style_seeds: empty, or one per seed: the seeds that give the appearance (style mixing, with options.crossover).
        """
        task = self._task(model, model_version)
        call = calls.batch_get_samples(
            model, seeds, options, style_seeds=style_seeds, model_version=model_version, task=task
        )
        return self._make(call)

    def list_seeds(
        self,
        model: str,
        start_seed: int = 0,
        end_seed: int = 0,
        *,
        options: SampleOptions | None = None,
        model_version: str = "",
    ) -> ListedSeeds:
        """Return which seeds from start_seed up to, not including, end_seed a walk with these options delivers.

        end_seed: 0 means the end of the index. Raises NotIndexed if the gateway has no index of these samples, or one
        that lacks seeds of the range.
        """
        task = self._task(model, model_version)
        pages: list[SeedPage] = []
        while not pages or pages[-1].next_seed < pages[-1].end_seed:
            first, end = (pages[-1].next_seed, pages[-1].end_seed) if pages else (start_seed, end_seed)
            call = calls.list_seeds(model, first, end, options=options, model_version=model_version, task=task)
            pages.append(self._make(call))
        return listed(start_seed, pages)

    def stream_samples(
        self,
        model: str,
        start_seed: int = 0,
        *,
        end_seed: int = SEED_END,
        count: int = 0,
        shard_index: int = 0,
        shard_count: int = 1,
        options: SampleOptions | None = None,
        window: int = 0,
        model_version: str = "",
        model_digest: str = "",
        progress: bool = False,
    ) -> SampleStream:
        """Walk the seeds from start_seed up to, not including, end_seed. Each accepted sample comes once, in order.

        count: the walk ends after this many samples; 0: at end_seed.
        shard_index, shard_count: take only the seeds congruent to shard_index modulo shard_count.
        window: how many samples the gateway generates ahead of the caller; 0: 8, or the gateway's limit if lower.
        model_digest: the digest of an earlier walk. Raises ModelVersionGone if the model has another digest now.
        progress: show a bar on stderr: rate, acceptance and, with `count` or if the gateway has an index of the range,
        what remains. It needs tqdm.

        The stream survives restarts of the gateway and of its Triton: it resumes at `next_seed`, at another endpoint if
        there is one. It stays with the version and digest that the model has when the walk begins. If these are no
        longer served, the stream raises ModelVersionGone, because other weights give other samples. With
        `options.where`, the stream delivers the samples that satisfy it, and raises ContentNotFound after a long run of
        seeds without one.
        """
        options = options or SampleOptions()
        described = self.get_model(model, model_version, class_index=options.class_index)
        walk = Walk(
            described,
            start_seed,
            end_seed=end_seed,
            count=count,
            shard_index=shard_index,
            shard_count=shard_count,
            options=options,
            window=window,
            model_digest=model_digest,
        )
        bar = Bar(self._total(walk, described, count=count, options=options)) if progress else None
        return SampleStream(self, described, walk, bar)

    def _total(self, walk: Walk, model: Model, *, count: int, options: SampleOptions | None) -> int | None:
        """Return how many samples a walk delivers; None if neither `count` nor an index of the gateway says so."""
        if walk.finished:
            return 0
        try:
            listed = self.list_seeds(
                model.name, walk.next_seed, walk.end_seed, options=options, model_version=model.version
            )
        except LabelmintError as error:
            if cannot_list(error):
                return count or None
            raise
        return total_of(listed, count, walk.shard_index, walk.shard_count)

    def _task(self, model: str, model_version: str) -> str:
        key = (model, model_version)
        if key not in self._tasks:
            self._tasks[key] = self.get_model(model, model_version).task
        return self._tasks[key]

    def _make(self, call: Call[T]) -> T:
        attempts = self._attempts()
        log = HealingLog(logging.INFO)
        while True:
            index, pause = attempts.next(time.monotonic())
            try:
                time.sleep(pause)
                rpc = getattr(self._stubs[index], call.method)
                seconds = attempts.remaining(time.monotonic())
                answer = rpc(call.request, timeout=seconds, metadata=self._connection.metadata)
                self._endpoints.worked(index)
                log.healed(f"{call.method} succeeded")
                return call.read(answer)
            except grpc.RpcError as error:
                log.cut(f"retrying {call.method}", attempts.failed(index, error, time.monotonic()))
            finally:
                self._endpoints.give_back(index)


class SampleStream(BaseStream, Iterator[Sample]):
    """Iterator over the accepted samples of a walk, in order. Also a context manager."""

    def __init__(self, client: Client, model: Model, walk: Walk, bar: Bar | None) -> None:
        super().__init__(model, walk, bar)
        self._client = client
        self._closed = threading.Event()
        self._call: Any = None
        self._events = self._read()

    def __next__(self) -> Sample:
        self._client._check_process()  # on every call: after an error, the ended iterator looks like a finished walk
        for sample in self._events:
            if sample is not None:
                return sample
        raise StopIteration

    def with_heartbeats(self) -> Iterator[Sample | None]:
        """Iterate over the same walk, with None for each heartbeat: `next_seed` moved, but no sample was accepted."""
        return self._events

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the walk. A thread that is waiting for the next sample sees the end of the iterator."""
        self._closed.set()
        if self._call is not None and not self._client._forked:
            self._call.cancel()
        with contextlib.suppress(ValueError):  # another thread is reading; it will see the `_closed` flag
            self._events.close()

    def _read(self) -> Generator[Sample | None, None, None]:
        client, walk = self._client, self._walk
        attempts = client._stream_attempts(walk)
        with self._shown():
            while not walk.finished:
                index, pause = attempts.next(time.monotonic())
                try:
                    if self._closed.wait(pause):
                        return
                    stub = client._stubs[index]
                    self._call = stub.StreamSamples(walk.request(), metadata=client._connection.metadata)
                    for message in self._call:
                        sample = walk.take(message)
                        client._endpoints.worked(index)
                        self._tell_healed()
                        self._show(sample)
                        attempts = client._stream_attempts(walk)
                        yield sample
                        client._check_process()
                        if walk.finished or self._closed.is_set():
                            return
                    walk.ended()
                except grpc.RpcError as error:
                    if self._closed.is_set():
                        return
                    self._tell_cut(attempts.failed(index, error, time.monotonic()))
                finally:
                    if not client._forked:
                        if self._call is not None:
                            self._call.cancel()
                        client._endpoints.give_back(index)


def _close(channels: Sequence[grpc.Channel], process: int) -> None:
    if os.getpid() != process:
        return  # the channels belong to the parent process, and closing them here may hang
    for channel in channels:
        channel.close()
