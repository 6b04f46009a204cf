"""The asyncio client: the methods of `Client` as coroutines, and streams as asynchronous iterators.

Rules of this file:
- This file makes calls and waits. `policy.py` decides what to do next. `client.py` documents each method.
- Use a client only in the event loop in which it was created. Cancelling a task cancels its call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

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


class AsyncClient(BaseClient):
    """The client for asyncio; `BaseClient` documents the arguments."""

    def _open_channels(self) -> list[grpc.aio.Channel]:
        return self._connection.aio_channels()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all calls and close all connections."""
        if self._forked:
            return  # the connections belong to the parent process
        for channel in self._channels:
            await channel.close()

    async def list_models(self) -> list[Model]:
        return await self._make(calls.list_models())

    async def get_model(self, model: str, model_version: str = "", *, class_index: int | None = None) -> Model:
        return await self._make(calls.get_model(model, model_version, class_index))

    async def get_sample(
        self, model: str, seed: int, options: SampleOptions | None = None, *, model_version: str = ""
    ) -> Sample:
        task = await self._task(model, model_version)
        return await self._make(calls.get_sample(model, seed, options, model_version=model_version, task=task))

    async def batch_get_samples(
        self,
        model: str,
        seeds: Sequence[int],
        options: SampleOptions | None = None,
        *,
        style_seeds: Sequence[int] = (),
        model_version: str = "",
    ) -> list[Sample | Rejection | Filtered]:
        task = await self._task(model, model_version)
        call = calls.batch_get_samples(
            model, seeds, options, style_seeds=style_seeds, model_version=model_version, task=task
        )
        return await self._make(call)

    async def list_seeds(
        self,
        model: str,
        start_seed: int = 0,
        end_seed: int = 0,
        *,
        options: SampleOptions | None = None,
        model_version: str = "",
    ) -> ListedSeeds:
        task = await self._task(model, model_version)
        pages: list[SeedPage] = []
        while not pages or pages[-1].next_seed < pages[-1].end_seed:
            first, end = (pages[-1].next_seed, pages[-1].end_seed) if pages else (start_seed, end_seed)
            call = calls.list_seeds(model, first, end, options=options, model_version=model_version, task=task)
            pages.append(await self._make(call))
        return listed(start_seed, pages)

    async def stream_samples(
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
    ) -> AsyncSampleStream:
        options = options or SampleOptions()
        described = await self.get_model(model, model_version, class_index=options.class_index)
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
        bar = Bar(await self._total(walk, described, count=count, options=options)) if progress else None
        return AsyncSampleStream(self, described, walk, bar)

    async def _total(self, walk: Walk, model: Model, *, count: int, options: SampleOptions | None) -> int | None:
        """Return how many samples a walk delivers; None if neither `count` nor an index of the gateway says so."""
        if walk.finished:
            return 0
        try:
            listed = await self.list_seeds(
                model.name, walk.next_seed, walk.end_seed, options=options, model_version=model.version
            )
        except LabelmintError as error:
            if cannot_list(error):
                return count or None
            raise
        return total_of(listed, count, walk.shard_index, walk.shard_count)

    async def _task(self, model: str, model_version: str) -> str:
        key = (model, model_version)
        if key not in self._tasks:
            self._tasks[key] = (await self.get_model(model, model_version)).task
        return self._tasks[key]

    async def _make(self, call: Call[T]) -> T:
        attempts = self._attempts()
        log = HealingLog(logging.INFO)
        while True:
            index, pause = attempts.next(time.monotonic())
            try:
                await asyncio.sleep(pause)
                rpc = getattr(self._stubs[index], call.method)
                seconds = attempts.remaining(time.monotonic())
                answer = await rpc(call.request, timeout=seconds, metadata=self._connection.metadata)
                self._endpoints.worked(index)
                log.healed(f"{call.method} succeeded")
                return call.read(answer)
            except grpc.RpcError as error:
                log.cut(f"retrying {call.method}", attempts.failed(index, error, time.monotonic()))
            finally:
                self._endpoints.give_back(index)


class AsyncSampleStream(BaseStream, AsyncIterator[Sample]):
    """Iterator over the accepted samples of a walk, in order. Also an asynchronous context manager."""

    def __init__(self, client: AsyncClient, model: Model, walk: Walk, bar: Bar | None) -> None:
        super().__init__(model, walk, bar)
        self._client = client
        self._call: Any = None
        self._events = self._read()

    async def __anext__(self) -> Sample:
        self._client._check_process()  # on every call: after an error, the ended iterator looks like a finished walk
        async for sample in self._events:
            if sample is not None:
                return sample
        raise StopAsyncIteration

    def with_heartbeats(self) -> AsyncIterator[Sample | None]:
        """Iterate over the same walk, with None for each heartbeat: `next_seed` moved, but no sample was accepted."""
        return self._events

    async def __aenter__(self) -> AsyncSampleStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the walk. Call it from the task that reads the stream, or when no task reads it."""
        await self._events.aclose()

    async def _read(self) -> AsyncGenerator[Sample | None, None]:
        client, walk = self._client, self._walk
        attempts = client._stream_attempts(walk)
        with self._shown():
            while not walk.finished:
                index, pause = attempts.next(time.monotonic())
                try:
                    await asyncio.sleep(pause)
                    stub = client._stubs[index]
                    self._call = stub.StreamSamples(walk.request(), metadata=client._connection.metadata)
                    async for message in self._call:
                        sample = walk.take(message)
                        client._endpoints.worked(index)
                        self._tell_healed()
                        self._show(sample)
                        attempts = client._stream_attempts(walk)
                        yield sample
                        client._check_process()
                        if walk.finished:
                            return
                    walk.ended()
                except grpc.RpcError as error:
                    self._tell_cut(attempts.failed(index, error, time.monotonic()))
                finally:
                    if not client._forked:
                        if self._call is not None:
                            self._call.cancel()
                        client._endpoints.give_back(index)
