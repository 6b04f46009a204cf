"""Files of an index of seeds, written from what a Triton gives for each seed, or from given values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from labelmint.core.policy import latent_of
from labelmint.core.served_model import ServedModel
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.seed_index.layout import SEED, Described, metadata_of
from labelmint.triton.client import Latents, TritonClient

Columns = Mapping[str, npt.NDArray[Any]]


def write(path: Path, described: Described, columns: Columns, *, group: int = 65_536) -> Path:
    """Write one file, with row groups of `group` seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns)).replace_schema_metadata(metadata_of(described))
    pq.write_table(table, path, row_group_size=group)
    return path


def some_columns(described: Described, seeds: range, number: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random values for each seed; a value does not depend on the range."""
    draw = np.random.default_rng(number)
    scores, shares = draw.random(seeds.stop, np.float32), draw.random((len(described.label_names), seeds.stop))
    columns: dict[str, npt.NDArray[Any]] = {SEED: np.arange(seeds.start, seeds.stop, dtype=np.uint32)}
    columns[described.score_column] = scores[seeds.start :] * np.float32(4.0)
    for name, share in zip(described.label_names, shares, strict=True):
        pixels = (share[seeds.start :] * described.resolution**2).astype(np.uint32)
        areas = described.label_column(name).startswith("pixels")
        columns[described.label_column(name)] = pixels if areas else share[seeds.start :].astype(np.float32)
    return columns


async def served(url: str, name: str, pipeline: str = "fused") -> ServedModel:
    """The model as a gateway before this Triton serves it."""
    client = TritonClient(url)
    try:
        return await Catalog(client, pipeline).get(name)
    finally:
        await client.close()


async def real_columns(url: str, model: ServedModel, seeds: Iterable[int], psi: float) -> dict[str, npt.NDArray[Any]]:
    """What the Triton at `url` gives for each seed."""
    client, described = TritonClient(url), Described.of(model, truncation_psi=psi, class_index=None)
    turns = asyncio.Semaphore(16)

    async def infer(seed: int) -> Mapping[str, npt.NDArray[Any]]:
        latent = latent_of(seed, model.z_dim)
        async with turns:
            return await client.infer(
                model.triton_name,
                model.version,
                Latents(latent, latent, model.num_ws, psi),
                outputs=(*model.task.label_outputs, "js_score"),
            )

    seeds = list(seeds)
    try:
        each = await asyncio.gather(*map(infer, seeds))
    finally:
        await client.close()
    columns: dict[str, npt.NDArray[Any]] = {SEED: np.array(seeds, np.uint32)}
    columns[described.score_column] = np.array([arrays["js_score"][0] for arrays in each], np.float32)
    for index, name in enumerate(model.label_names):
        columns[described.label_column(name)] = _labels(model, each, index)
    return columns


def _labels(model: ServedModel, each: Sequence[Mapping[str, npt.NDArray[Any]]], index: int) -> npt.NDArray[Any]:
    if model.task.measure == "area":
        return np.array([np.count_nonzero(arrays["label"] == index) for arrays in each], np.uint32)
    return np.array([arrays["confidence"][index] for arrays in each], np.float32)


def rows(columns: Columns, seeds: range) -> dict[str, npt.NDArray[Any]]:
    """The rows of these seeds."""
    chosen = np.isin(columns[SEED], np.arange(seeds.start, seeds.stop))
    return {name: column[chosen] for name, column in columns.items()}
