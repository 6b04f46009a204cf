"""Builds the JSON descriptions of a sample and of its model.

Rules of this file:
- `evidence` and `model_json` use the gateway's names and values: those of samples.tar and of /v1/models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from labelmint_client import Model, Sample
from labelmint_client.pull.labels import NO_FIELDS, labels_of
from labelmint_client.pull.pixels import Bytes
from labelmint_client.tasks import TASKS, task_of

# Of a model whose executor is not recorded: earlier services had no kernel that ran in the place of a backend.
EARLIER_EXECUTOR = "onnxruntime"
# The fields of a model's JSON with the label names, empty. Each task has one; those of the other tasks stay empty.
NO_NAMES: Mapping[str, Any] = {task.names_field: [] for task in TASKS.values()}


def evidence(sample: Sample, model: Model) -> dict[str, Any]:
    """Return the fields of a sample without its pixels, ready for JSON."""
    return {
        "model": sample.model,
        "model_version": sample.model_version,
        "model_digest": sample.model_digest,
        "seed": sample.seed,
        "accepted": sample.accepted,
        "js_score": sample.js_score,
        "threshold": sample.threshold,
        "calibration_id": sample.calibration_id,
        "truncation_psi": sample.truncation_psi,
        "style_seed": sample.style_seed,
        "crossover": sample.crossover,
        "group_id": sample.group_id,
        **NO_FIELDS,
        **labels_of(model).fields(sample, model),
        **({"content": dict(sample.content)} if sample.content else {}),
        **({"class_index": sample.class_index} if sample.class_index is not None else {}),
    }


def other_executor(pulled: Mapping[str, Any], model: Model) -> str:
    """Say that a service runs the interpreter in another executor than that of a pull; "" if it is the same.

    `pulled` is the pull's `model_json`. Earlier clients did not record the executor, and earlier services do not name
    it. Theirs was the repository's own, so only the kernel is certainly another one.
    """
    before, now = pulled.get("executor", ""), model.executor
    if before == now or (not (before and now) and "kernel" not in (before, now)):
        return ""
    return (
        f"the pull has labels from the executor {before or EARLIER_EXECUTOR!r}, the service now runs "
        f"{now or EARLIER_EXECUTOR!r}, whose labels may differ"
    )


def digests(image: Bytes, label: Bytes | None) -> dict[str, str | None]:
    """Return the SHA-256 of the raw pixels, rows from top to bottom: of the RGB image, and of the label as written."""
    return {
        "image_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "label_sha256": None if label is None else hashlib.sha256(label.tobytes()).hexdigest(),
    }


def model_json(model: Model, calibrated: bool) -> dict[str, Any]:
    """Return the model of the samples, with its calibration if `calibrated`: if that decides which are accepted."""
    task = task_of(model)
    names = getattr(model, task.names)
    colours = [f"#{bytes(colour).hex()}" for colour in model.palette]
    labels = [{"id": i, "name": name, "rgb": rgb} for i, (name, rgb) in enumerate(zip(names, colours, strict=True))]
    measured = model.calibration if calibrated else None
    return {
        "name": model.name,
        "version": model.version,
        "digest": model.digest,
        "task": model.task,
        "resolution": model.resolution,
        "score_kind": model.score_kind,
        "executor": model.executor,
        **{**NO_NAMES, task.names_field: labels},
        **({"generator_classes": list(model.generator_classes)} if model.generator_classes else {}),
        "calibration": None if measured is None else {"id": measured.id, "threshold": measured.threshold},
    }
