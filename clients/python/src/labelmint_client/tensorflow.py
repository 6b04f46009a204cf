"""Labeled samples as a `tf.data.Dataset`.

Rules of this file:
- Elements are pairs in Keras's form: image uint8 [H,W,3], and label uint8 [H,W] or keypoints float32 [K,3].
- Each iterator is a new walk from start_seed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from labelmint_client.client import Client
from labelmint_client.messages import SEED_END, SampleOptions
from labelmint_client.tasks import task_of


def labeled_samples(
    endpoints: str | Sequence[str],
    model: str,
    *,
    start_seed: int = 0,
    end_seed: int = SEED_END,
    shard_index: int = 0,
    shard_count: int = 1,
    options: SampleOptions | None = None,
    window: int = 0,
    **settings: Any,
) -> tf.data.Dataset:
    """Return the accepted samples of a range of seeds. Give each replica its own shard.

    `Client.stream_samples` documents the arguments, `Client` documents `settings`.
    """
    with Client(endpoints, **settings) as client:
        described = client.get_model(model)
    task = task_of(described)
    target = tf.TensorSpec(task.shape(described), tf.as_dtype(task.dtype))

    def walk() -> Iterator[tuple[Any, Any]]:
        with (
            Client(endpoints, **settings) as client,
            client.stream_samples(
                model,
                start_seed,
                end_seed=end_seed,
                shard_index=shard_index,
                shard_count=shard_count,
                options=options,
                window=window,
                model_version=described.version,
                model_digest=described.digest,
            ) as stream,
        ):
            for sample in stream:
                yield sample.image, getattr(sample, task.field)

    image = tf.TensorSpec((described.resolution, described.resolution, 3), tf.uint8)
    return tf.data.Dataset.from_generator(walk, output_signature=(image, target))
