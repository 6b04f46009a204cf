"""Measures the JS scores of a served pipeline and writes the calibration into the repository.

Rules of this file:
- The scores come from a real Triton, through the same client and seed policy as in the gateway.
- Only the fused ensemble is measured, and the staged one gets the same calibration. Both compute the same function of
  the same weights; a test compares them.
- A calibration is that of the executor that has run the interpreter, as Triton says it, and is written under its name.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from labelmint.core.calibration import MIN_SEEDS, Calibration, calibrate
from labelmint.core.errors import InvalidRequest, ModelNotFound, UnusableFile
from labelmint.core.executor import KERNEL, Choice, Executor, executor_of, last_step
from labelmint.core.policy import check_seed, latent_of
from labelmint.core.served_model import ServedModel
from labelmint.triton.artifacts import read_whole_model
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.model_config import base_name, ensembles, is_fused, version_of, write_config
from labelmint.triton.server import TritonServer, wait_until_ready

CONCURRENCY = 6

T = TypeVar("T")


async def calibrate_repository(
    repository: Path,
    model: str,
    first_seed: int,
    *,
    count: int,
    truncation_psi: float,
    version: int = 1,
    executor: Choice = KERNEL,
) -> Calibration:
    """Serve a version of `model`, measure `count` seeds from `first_seed` on, write and return the calibration.

    Raises InvalidRequest for fewer than `MIN_SEEDS` seeds, and UnusableFile for a model whose scores are not finite.
    """
    if count < MIN_SEEDS:
        raise InvalidRequest(
            "count", f"a calibration needs at least {MIN_SEEDS} seeds; --preview measures fewer and writes nothing"
        )
    served, scores = await measure_scores(
        repository,
        model,
        _seeds(first_seed, count),
        truncation_psi=truncation_psi,
        version=version,
        executor=executor,
    )
    calibration = calibrate(
        scores,
        model_digest=served.digest,
        score_kind=served.score_kind,
        truncation_psi=truncation_psi,
        first_seed=first_seed,
    )
    for name, config in ensembles(repository).items():
        if config.parameters["model"].string_value == model and version_of(repository / name) == version:
            config.parameters[served.executor.calibration].string_value = calibration.to_json()
            write_config(repository / name / "config.pbtxt", config)
    return calibration


async def preview(
    repository: Path,
    model: str,
    first_seed: int,
    *,
    count: int,
    truncation_psi: float,
    version: int,
    executor: Choice = KERNEL,
) -> str:
    """Measure scores and return their quantiles as two lines of text; set no gate and write nothing."""
    seeds = _seeds(first_seed, count)
    _, scores = await measure_scores(
        repository, model, seeds, truncation_psi=truncation_psi, version=version, executor=executor
    )
    levels = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    found = zip(levels, np.quantile(scores, levels), strict=True)
    quantiles = ", ".join(f"{level:g}: {score:.6g}" for level, score in found)
    return f"preview of {count} seeds, JS in nats by quantile: {quantiles}\nno gate was set, nothing was written"


def _seeds(first: int, count: int) -> range:
    check_seed(first)
    check_seed(first + count - 1, "count")
    return range(first, first + count)


async def measure_scores(
    repository: Path, model: str, seeds: range, *, truncation_psi: float, version: int, executor: Choice = KERNEL
) -> tuple[ServedModel, list[float]]:
    """Serve a version of `model` and return its scores, in nats, in the order of the seeds; write nothing."""
    async with serving(repository, model, version, executor) as (client, served):
        scores = await measure(
            client,
            served,
            seeds,
            truncation_psi=truncation_psi,
            outputs=("js_score",),
            reduce=lambda seed, arrays: float(arrays["js_score"][0]),
            title="calibrate",
        )
    if wrong := [seed for seed, score in zip(seeds, scores, strict=True) if not math.isfinite(score)]:
        raise UnusableFile(
            repository / served.triton_name,
            f"returns JS scores that are not finite, for {len(wrong)} of {len(seeds)} seeds, the first one {wrong[0]}: "
            "its weights are damaged or too large; nothing was written",
        )
    return served, scores


@asynccontextmanager
async def serving(
    repository: Path, model: str, version: int = 1, executor: Choice = KERNEL
) -> AsyncIterator[tuple[TritonClient, ServedModel]]:
    """Run a child Triton with one fused ensemble of the repository until the end of the block."""
    fused = {name: config for name, config in ensembles(repository).items() if is_fused(config)}
    name = base_name(model, version)
    if name not in fused or fused[name].parameters["model"].string_value != model:
        models = {known: config.parameters["model"].string_value for known, config in fused.items()}
        versions = sorted(version_of(repository / known) for known, owner in models.items() if owner == model)
        if versions:
            raise ModelNotFound(model, tuple(map(str, versions)), str(version))
        raise ModelNotFound(model, tuple(sorted(set(models.values()))))
    served = read_whole_model(repository, name, calibrated=False)
    server = TritonServer(repository, [name], executor=executor)
    try:
        await server.start()
        await wait_until_ready(server)
        client = TritonClient(server.grpc_url)
        try:
            yield client, replace(served, executor=await _executor(client, last_step(fused[name])))
        finally:
            await client.close()
    finally:
        await server.stop()


async def _executor(client: TritonClient, step: str) -> Executor:
    """What runs the interpreter's step, as Triton says it; the gateway may have left the kernel out."""
    configs = await client.model_configs()
    (by_address,) = (found for (name, _), found in configs.items() if name == step)
    return executor_of(next(iter(by_address.values())))


async def measure(
    client: TritonClient,
    model: ServedModel,
    seeds: Iterable[int],
    *,
    truncation_psi: float,
    outputs: tuple[str, ...],
    reduce: Callable[[int, dict[str, Array]], T],
    title: str,
) -> list[T]:
    """Run the ensemble for every seed; return the results of `reduce` for its arrays, in the order of the seeds."""
    ordered = list(seeds)
    bar = tqdm(total=len(ordered), desc=title, unit="seed")
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(seed: int) -> T:
        async with slots:
            latent = latent_of(seed, model.z_dim)
            latents = Latents(latent, latent, model.num_ws, truncation_psi)
            arrays = await client.infer(model.triton_name, model.version, latents, outputs=outputs)
            bar.update()
            return reduce(seed, arrays)

    with bar:
        tasks = [asyncio.create_task(one(seed)) for seed in ordered]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
