"""The fields of messages that have the same names and values on both wires.

Rules of this file:
- The names are those of the proto, the values those of JSON; pixels are added by each wire in its own form.
"""

from __future__ import annotations

from typing import Any

from labelmint.core.served_model import ServedModel
from labelmint.core.task import TASKS
from labelmint.gateway.encoding.labels import NO_FIELDS, labels_of
from labelmint.gateway.sampling.sample import Sample


def sample_fields(sample: Sample) -> dict[str, Any]:
    """A sample without its pixels."""
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
    }


def rejection_fields(sample: Sample) -> dict[str, Any]:
    """A sample of a batch that the gate rejected."""
    return {
        "seed": sample.seed,
        "js_score": sample.js_score,
        "threshold": sample.gate.threshold,
        "calibration_id": sample.gate.calibration_id,
    }


def model_fields(model: ServedModel) -> dict[str, Any]:
    """A model without the names of its labels and its calibration."""
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
    }


def label_name_fields(model: ServedModel, labels: list[Any]) -> dict[str, Any]:
    """`labels`, a message for each label name, in the field of the model's task; empty in those of other tasks."""
    return {task.names_field: labels if task is model.task else [] for task in TASKS.values()}
