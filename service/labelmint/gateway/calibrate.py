"""Measures the JS scores of a served pipeline and writes the calibration into the repository.

Rules of this file:
- Scores come from the real Triton through the same client and seed policy as the gateway's.
- The fused and the staged ensemble compute the same function of the same weights (a test compares them), so both
  receive the calibration that was measured on the fused one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from labelmint.calibration import Calibration, calibrate
from labelmint.errors import ModelNotFound
from labelmint.gateway.policy import check_seed, latent_of
from labelmint.gateway.served_model import ServedModel, read_served_model
from labelmint.triton.artifacts import check_models
from labelmint.triton.client import Array, Latents, TritonClient
from labelmint.triton.model_config import (
    CALIBRATION,
    base_name,
    check_artifacts,
    ensembles,
    is_fused,
    version_of,
    write_config,
)
from labelmint.triton.server import TritonServer, wait_until_ready

CONCURRENCY = 6

T = TypeVar("T")


async def calibrate_repository(
    repository: Path, model: str, first_seed: int, count: int, truncation_psi: float, version: int = 1
) -> Calibration:
    """Serve a version of `model`, measure `count` seeds from `first_seed` on, write and return the calibration."""
    check_seed(first_seed)
    check_seed(first_seed + count - 1, "count")
    async with serving(repository, model, version) as (client, served):
        scores = await measure(
            client,
            served,
            range(first_seed, first_seed + count),
            truncation_psi,
            ("js_score",),
            lambda seed, arrays: float(arrays["js_score"][0]),
            "calibrate",
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
            config.parameters[CALIBRATION].string_value = calibration.to_json()
            write_config(repository / name / "config.pbtxt", config)
    return calibration


@asynccontextmanager
async def serving(repository: Path, model: str, version: int = 1) -> AsyncIterator[tuple[TritonClient, ServedModel]]:
    """A Triton of our own with one fused ensemble of the repository."""
    fused = {name: config for name, config in ensembles(repository).items() if is_fused(config)}
    name = base_name(model, version)
    if name not in fused or fused[name].parameters["model"].string_value != model:
        models = {known: config.parameters["model"].string_value for known, config in fused.items()}
        versions = sorted(version_of(repository / known) for known, owner in models.items() if owner == model)
        if versions:
            raise ModelNotFound(model, tuple(map(str, versions)), str(version))
        raise ModelNotFound(model, tuple(sorted(set(models.values()))))
    check_models(repository, [name])
    check_artifacts(repository, fused[name])
    server = TritonServer(repository, [name])
    try:
        await server.start()
        await wait_until_ready(server)
        client = TritonClient(server.grpc_url)
        try:
            yield client, read_served_model(fused[name], str(version))
        finally:
            await client.close()
    finally:
        await server.stop()


async def measure(
    client: TritonClient,
    model: ServedModel,
    seeds: Iterable[int],
    truncation_psi: float,
    outputs: tuple[str, ...],
    reduce: Callable[[int, dict[str, Array]], T],
    title: str,
) -> list[T]:
    """Run the ensemble for every seed and keep what `reduce` makes of the arrays, in the order of the seeds."""
    ordered = list(seeds)
    bar = tqdm(total=len(ordered), desc=title, unit="seed")
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(seed: int) -> T:
        async with slots:
            latent = latent_of(seed, model.z_dim)
            latents = Latents(latent, latent, model.num_ws, truncation_psi)
            arrays = await client.infer(model.triton_name, model.version, latents, outputs)
            bar.update()
            return reduce(seed, arrays)

    with bar:
        tasks = [asyncio.create_task(one(seed)) for seed in ordered]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
