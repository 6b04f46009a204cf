"""The message fields that have the same names and values in gRPC and in REST.

Rules of this file:
- Names are the proto's names. Values are JSON values. Each API adds the pixels in its own form.
"""

from __future__ import annotations

from typing import Any

from labelmint.core.served_model import ServedModel
from labelmint.core.task import TASKS
from labelmint.gateway.encoding.labels import NO_FIELDS, labels_of
from labelmint.gateway.sampling.indexed import SeedPage
from labelmint.gateway.sampling.sample import Sample


def sample_fields(sample: Sample) -> dict[str, Any]:
    """The fields of a sample, without its pixels."""
    return {
        "model": sample.model.name,
        "model_version": sample.model.version,
        "seed": sample.seed,
        "accepted": sample.accepted,
        "js_score": sample.js_score,
        "threshold": sample.gate.threshold,
        "calibration_id": sample.gate.calibration_id,
        "truncation_psi": sample.gate.truncation_psi,
        "style_seed": None if sample.mixing is None else sample.mixing.style_seed,
        "crossover": None if sample.mixing is None else sample.mixing.crossover,
        "group_id": sample.group_id,
        "model_digest": sample.model.digest,
        **NO_FIELDS,
        **(labels_of(sample).fields(sample) if sample.labels else {}),
        **({"content": dict(sample.content)} if sample.content else {}),
        **({"ignore_js_quantile": sample.ignored.quantile} if sample.ignored is not None else {}),
    }


def rejection_fields(sample: Sample) -> dict[str, Any]:
    """The fields of a batch outcome that the gate rejected."""
    return {
        "seed": sample.seed,
        "js_score": sample.js_score,
        "threshold": sample.gate.threshold,
        "calibration_id": sample.gate.calibration_id,
    }


def filtered_fields(sample: Sample) -> dict[str, Any]:
    """The fields of a batch outcome that only the conditions of the request keep from being delivered."""
    return {"seed": sample.seed, "content": dict(sample.content)}


def page_fields(page: SeedPage) -> dict[str, Any]:
    """The fields of a page of seeds; `delivered` is bytes."""
    return {
        "first_seed": page.first,
        "seed_count": page.count,
        "delivered": page.delivered,
        "delivered_count": page.delivered_count,
        "next_seed": page.next,
        "end_seed": page.end,
        "model_digest": page.model.digest,
    }


def model_fields(model: ServedModel) -> dict[str, Any]:
    """The fields of a model, without its label names and its calibration."""
    return {
        "name": model.name,
        "version": model.version,
        "pipeline": model.pipeline,
        "task": model.task.name,
        "digest": model.digest,
        "resolution": model.resolution,
        "z_dim": model.z_dim,
        "num_ws": model.num_ws,
        "layout": model.layout,
        "num_heads": model.num_heads,
        "score_kind": model.score_kind,
        "executor": model.executor.name,
    }


def label_name_fields(model: ServedModel, labels: list[Any]) -> dict[str, Any]:
    """Put `labels`, one message per label name, into the field of the model's task; other tasks' fields are empty."""
    return {task.names_field: labels if task is model.task else [] for task in TASKS.values()}
