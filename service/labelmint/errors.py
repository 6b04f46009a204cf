"""Every error that a user can meet, defined once with its gRPC code and HTTP status.

Rules of this file:
- The tree is the documentation; a class says when it is raised and what the caller should do.
- An error carries data (`metadata`), not only prose. Nothing secret goes into either.
- Foreign errors are translated where they enter: Triton's in `labelmint.triton.client`, nowhere else. The wire
  adapters turn these classes into status and problem+json without looking at single classes.

    LabelmintError
    |- InvalidRequest          what was asked cannot be: names the field
    |  `- Uncalibrated         a gate was asked for where nothing was measured
    |- ModelNotFound
    |- SampleRejected          the sample exists, its JS score is above the gate
    |- Overloaded              try again later
    |- TritonUnavailable       Triton or the model in it is not ready
    |- DeadlineExceeded
    |- InferenceFailed         Triton ran the model and failed
    |- IncompatibleWeights     two files that do not belong together (command line only)
    |- UnusableFile            a file on disk is not what it should be (command line only)
    `- AddressInUse            a port is taken (command line only)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import grpc


class LabelmintError(Exception):
    """Base class. `reason` is the stable, machine-readable name (google.rpc.ErrorInfo)."""

    reason: ClassVar[str] = "INTERNAL"
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})


class InvalidRequest(LabelmintError):
    reason = "INVALID_REQUEST"
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    title = "Invalid request"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", {"field": field})


class Uncalibrated(InvalidRequest):
    reason = "UNCALIBRATED"
    title = "No calibration for these options"


class ModelNotFound(LabelmintError):
    reason = "MODEL_NOT_FOUND"
    grpc_code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    title = "Model not found"

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        shown = model if len(model) <= 64 else f"{model[:64]}..."
        super().__init__(f"no model named {shown!r}; served: {', '.join(known) or 'none'}", {"model": shown})


class SampleRejected(LabelmintError):
    reason = "SAMPLE_REJECTED"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Sample rejected by the JS gate"

    def __init__(self, seed: int, js_score: float, threshold: float, calibration_id: str) -> None:
        super().__init__(
            f"seed {seed} has JS score {js_score:.6g}, above the threshold {threshold:.6g}; "
            "ask for another seed, loosen max_js or max_quantile, or set include_rejected",
            {
                "seed": str(seed),
                "js_score": repr(js_score),
                "threshold": repr(threshold),
                "calibration_id": calibration_id,
            },
        )


class Overloaded(LabelmintError):
    reason = "OVERLOADED"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    title = "Too many requests in flight"
    retry_after_seconds: ClassVar[int] = 1


class TritonUnavailable(LabelmintError):
    reason = "TRITON_UNAVAILABLE"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "Triton is not ready"


class DeadlineExceeded(LabelmintError):
    reason = "DEADLINE_EXCEEDED"
    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    title = "Deadline exceeded"


class InferenceFailed(LabelmintError):
    reason = "INFERENCE_FAILED"
    grpc_code = grpc.StatusCode.INTERNAL
    http_status = 502
    title = "Triton failed to run the model"


class IncompatibleWeights(LabelmintError):
    reason = "INCOMPATIBLE_WEIGHTS"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Weights that do not belong together"


class UnusableFile(LabelmintError):
    reason = "UNUSABLE_FILE"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Unusable file"

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}", {"path": str(path)})


class AddressInUse(LabelmintError):
    reason = "ADDRESS_IN_USE"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "Address in use"
