"""Runs the fused pipeline of a model for many seeds: connects to Tritons that have it, and asks them seed by seed.

Rules of this file:
- The samples come from a real Triton, through the same client, window and seed policy as in the gateway: from a child
  Triton, or from those at a URL.
- A model is described as a Triton describes it, with the executor that runs it there.
- As many samples are in flight as the Tritons should get, and the results come in the order of the seeds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from labelmint.core.errors import ModelNotFound, TritonUnavailable
from labelmint.core.executor import KERNEL, Choice, executor_at
from labelmint.core.policy import latent_of
from labelmint.core.served_model import MalformedModel, ServedModel, is_labelmint, read_served_model
from labelmint.triton.artifacts import read_model, read_whole_model
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.model_config import base_name, ensembles, is_fused, version_of
from labelmint.triton.server import TritonServer, wait_until_ready

T = TypeVar("T")

# Results that may wait until an earlier seed has its own: only then does one slow sample stop the others.
_MAX_WAITING = 4096


@asynccontextmanager
async def serving(
    repository: Path,
    model: str,
    version: int = 1,
    *,
    executor: Choice = KERNEL,
    triton_url: str = "",
    calibrated: bool = False,
    check: Callable[[ServedModel], object] = lambda served: None,
) -> AsyncIterator[tuple[TritonClient, ServedModel]]:
    """Connect to Tritons that have the fused ensemble of a version of `model`, until the end of the block.

    Without `triton_url`, run a child Triton with it, and its interpreter in `executor` if possible. The model that is
    returned has the executor that runs it and, with `calibrated`, its calibration. Before any Triton is asked, `check`
    is called with the model, and may raise. Raises ModelNotFound if the repository has no such model, and UnusableFile
    if it is damaged. With `triton_url`, raises TritonUnavailable if no Triton there has the same model.
    """
    name = _stored(repository, model, version)
    if triton_url:
        stored, connection = read_model(repository, name, calibrated), _connected(triton_url)
    else:
        stored, connection = read_whole_model(repository, name, calibrated), _child(repository, name, executor)
    check(stored)
    async with connection as client:
        found = await _served(client, model, version, calibrated=calibrated)
        same = next((served for served in found if served.digest == stored.digest), None)
        if same is None:
            raise TritonUnavailable(
                f"Triton at {client.url} has {name!r} version {version} with the digest "
                f"{', '.join(sorted({served.digest for served in found}))}, but the repository has {stored.digest}; "
                "give --model-repository the one that this Triton serves, or load this one there"
            )
        yield client, same


@asynccontextmanager
async def serving_at(url: str, model: str, version: int) -> AsyncIterator[tuple[TritonClient, ServedModel]]:
    """Connect to the Tritons at `url` and describe a version of `model` as they do, until the end of the block.

    Raises TritonUnavailable if they do not have its fused ensemble, or if their samples of it may differ.
    """
    async with _connected(url) as client:
        found = await _served(client, model, version, calibrated=True)
        told = sorted({f"{served.digest[:12]} ({served.executor.name})" for served in found})
        if len(told) > 1:
            raise TritonUnavailable(
                f"the Tritons at {url} have {model!r} version {version} with several digests or executors: "
                f"{', '.join(told)}; give the address of those that have the same one"
            )
        yield client, found[0]


def _stored(repository: Path, model: str, version: int) -> str:
    """The name of the fused ensemble of a version of `model`; raises ModelNotFound if the repository has none."""
    fused = {name: config for name, config in ensembles(repository).items() if is_fused(config)}
    name = base_name(model, version)
    if name in fused and fused[name].parameters["model"].string_value == model:
        return name
    models = {known: config.parameters["model"].string_value for known, config in fused.items()}
    versions = sorted(version_of(repository / known) for known, owner in models.items() if owner == model)
    if versions:
        raise ModelNotFound(model, tuple(map(str, versions)), str(version))
    raise ModelNotFound(model, tuple(sorted(set(models.values()))))


@asynccontextmanager
async def _child(repository: Path, name: str, executor: Choice) -> AsyncIterator[TritonClient]:
    server = TritonServer(repository, [name], executor=executor)
    try:
        await server.start()
        await wait_until_ready(server)
        async with _connected(server.grpc_url) as client:
            yield client
    finally:
        await server.stop()


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[TritonClient]:
    client = TritonClient(url)
    try:
        yield client
    finally:
        await client.close()


async def _served(client: TritonClient, model: str, version: int, *, calibrated: bool) -> list[ServedModel]:
    """A version of `model` as each of the client's Tritons has it.

    Raises TritonUnavailable unless one of them has its fused ensemble ready.
    """
    configs = await client.model_configs()
    name = base_name(model, version)
    by_address = {
        address: config
        for address, config in configs.get((name, str(version)), {}).items()
        if is_labelmint(config) and config.parameters["model"].string_value == model
    }
    if not by_address:
        ready = ", ".join(f"{known!r} version {number}" for known, number in sorted(configs)) or "none"
        raise TritonUnavailable(
            f"Triton at {client.url} does not have {name!r} version {version} ready, only: {ready}; load the model "
            "there first"
        )
    try:
        return [
            read_served_model(config, str(version), executor_at(configs, config, address), calibrated=calibrated)
            for address, config in by_address.items()
        ]
    except MalformedModel as error:
        raise TritonUnavailable(f"Triton at {client.url}: {error}") from error


async def measure(
    client: TritonClient,
    model: ServedModel,
    seeds: Iterable[int],
    *,
    truncation_psi: float,
    outputs: tuple[str, ...],
    reduce: Callable[[int, dict[str, Array]], T],
    title: str,
    class_index: int | None = None,
) -> list[T]:
    """The results of `walk`, with a progress bar."""
    ordered, results = list(seeds), list[T]()
    walking = walk(
        client,
        model,
        ordered,
        truncation_psi=truncation_psi,
        outputs=outputs,
        reduce=reduce,
        class_index=class_index,
    )
    with tqdm(total=len(ordered), desc=title, unit="seed") as bar:
        async with aclosing(walking):
            async for result in walking:
                results.append(result)
                bar.update()
    return results


async def walk(
    client: TritonClient,
    model: ServedModel,
    seeds: Iterable[int],
    *,
    truncation_psi: float,
    outputs: tuple[str, ...],
    reduce: Callable[[int, dict[str, Array]], T],
    class_index: int | None = None,
) -> AsyncGenerator[T, None]:
    """Run the ensemble for every seed; yield the results of `reduce` for its arrays, in the order of the seeds.

    A model with generator classes needs a `class_index`. The first failure ends the walk. The caller closes it
    (`contextlib.aclosing`).
    """

    async def one(seed: int) -> T:
        latent = latent_of(seed, model.z_dim)
        latents = Latents(latent, latent, model.num_ws, truncation_psi, class_index)
        arrays = await client.infer(model.triton_name, model.version, latents, outputs=outputs, digest=model.digest)
        return reduce(seed, arrays)

    tasks: deque[asyncio.Task[T]] = deque()  # in the order of the seeds
    running: set[asyncio.Task[T]] = set()
    try:
        for seed in seeds:
            while running and not client.room(model.triton_name, model.version, model.digest):
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises a failure at once, though earlier seeds may still run
            while tasks and (tasks[0].done() or len(tasks) >= _MAX_WAITING):
                yield await tasks[0]
                tasks.popleft()
            running.add(task := asyncio.create_task(one(seed)))
            tasks.append(task)
            await asyncio.sleep(0)  # the sample begins, and takes its room
        while tasks:
            yield await tasks[0]
            tasks.popleft()
    finally:
        # Triton 2.51 may crash if a sample that it has begun is cancelled, so each one ends first.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
