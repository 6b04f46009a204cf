"""Labeled samples as a Hugging Face `datasets.IterableDataset`.

Rules of this file:
- The columns suit image processors: `image` and `label` are PIL images; the pixels of `label` are class ids.
- Each shard is a separate walk. Use as many shards as there are readers (workers times ranks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Array2D, Features, Image, IterableDataset, Value
from datasets import Sequence as Array1D

from labelmint_client.client import Client
from labelmint_client.messages import SEED_END, SampleOptions
from labelmint_client.tasks import task_of


def labeled_samples(
    endpoints: str | Sequence[str],
    model: str,
    *,
    start_seed: int = 0,
    end_seed: int = SEED_END,
    num_shards: int = 1,
    options: SampleOptions | None = None,
    **settings: Any,
) -> IterableDataset:
    """Return the accepted samples of a range of seeds: `seed`, `image`, `js_score` and `label` or `keypoints` [K,3].

    `Client.stream_samples` documents the arguments, `Client` documents `settings`.
    """
    with Client(endpoints, **settings) as client:
        described = client.get_model(model)
    columns = {"seed": Value("int64"), "image": Image(), "js_score": Value("float64")}
    task = task_of(described)
    columns[task.field] = Image() if task.dtype == "uint8" else _numbers(task.shape(described), task.dtype)

    def walk(shards: list[int]) -> Iterator[dict[str, Any]]:
        with Client(endpoints, **settings) as client:
            for shard in shards:
                for sample in client.stream_samples(
                    model,
                    start_seed,
                    end_seed=end_seed,
                    shard_index=shard,
                    shard_count=num_shards,
                    options=options,
                    model_version=described.version,
                    model_digest=described.digest,
                ):
                    yield {column: getattr(sample, column) for column in columns}

    shards = {"shards": list(range(num_shards))}
    return IterableDataset.from_generator(walk, features=Features(columns), gen_kwargs=shards)


def _numbers(shape: tuple[int, ...], dtype: str) -> Any:
    """Return the type of a column of arrays with one or two dimensions."""
    return Array1D(Value(dtype), length=shape[0]) if len(shape) == 1 else Array2D(shape, dtype)
