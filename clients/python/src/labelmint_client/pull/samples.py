"""What is told of a sample and of its model in JSON.

Rules of this file:
- `evidence` and `model_json` have the gateway's names and values: those of samples.tar and of /v1/models.
"""

from __future__ import annotations

import hashlib
from typing import Any

from labelmint_client import Model, Sample
from labelmint_client.pull.pixels import Bytes


def evidence(sample: Sample, model: Model) -> dict[str, Any]:
    """A sample without its pixels, ready for JSON."""
    points = [] if sample.keypoints is None else sample.keypoints.tolist()
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
        "keypoints": [
            {"name": name, "x": x, "y": y, "confidence": confidence}
            for name, (x, y, confidence) in zip(model.keypoint_names if points else (), points, strict=True)
        ],
    }


def digests(image: Bytes, label: Bytes | None) -> dict[str, str | None]:
    """SHA-256 over the raw pixels, rows from top to bottom: the image's RGB, and the label as it is written."""
    return {
        "image_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "label_sha256": None if label is None else hashlib.sha256(label.tobytes()).hexdigest(),
    }


def model_json(model: Model, calibrated: bool) -> dict[str, Any]:
    """The model that samples came from; with its calibration where that decides which are accepted."""
    names = model.class_names or model.keypoint_names
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
        "classes": labels if model.class_names else [],
        "keypoint_classes": [] if model.class_names else labels,
        "calibration": None if measured is None else {"id": measured.id, "threshold": measured.threshold},
    }
