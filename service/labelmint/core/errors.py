"""Every error that a user can see, defined once with its gRPC code and HTTP status.

Rules of this file:
- The tree below is the documentation. It says when each class is raised and what the caller should do.
- An error carries data (`metadata`, `retry_after_seconds`) in addition to its message. Neither contains secrets.
- Errors of other libraries are translated where they enter. Triton's are translated in `labelmint.triton.client` only.
  The gRPC and REST servers turn these classes into a status or problem+json without a case for any single class.

    LabelmintError
    |- InvalidRequest          the request cannot be fulfilled; names the field
    |  `- Uncalibrated         the model was not calibrated for the gate that these options need
    |- ModelNotFound           there is no model of that name, or no such version of it
    |- ModelVersionGone        the version that a request or a stream began with is no longer served
    |- SampleRejected          the sample exists, but its JS score is above the threshold of the gate
    |- ContentMissing          the sample exists, but the conditions of the request keep it from being delivered
    |- ContentNotFound         so many seeds in a row gave a stream no sample that it stopped: change its conditions
    |- NotIndexed              the gateway has no index of these seeds, so it cannot list them
    |- RevisionChanged         a pinned URL names a different revision of the model than the served one
    |- Unauthenticated         the request has no token or an unknown one
    |- RequestTooLarge         the body is larger than any request needs to be
    |- Overloaded              try again later
    |  `- LimitReached         a limit of the caller's token is reached; other tokens may still be served
    |- TritonUnavailable       Triton or the model in it is not ready
    |- ServerDraining          this gateway is shutting down: continue at another one
    |- StreamExpired           a stream reached its maximum duration: resume it
    |- DeadlineExceeded
    |- InferenceFailed         Triton ran the model and failed
    |- IncompatibleWeights     two files do not fit together (command line only)
    |- UnusableFile            a file on disk is missing, damaged or of the wrong kind (command line only)
    |- CannotSave              a drawing cannot be written, such as on a full disk (annotation page only)
    |- ChangedElsewhere        another tab, window or program has changed what is to be saved (annotation page only)
    |- TooFew                  more must be drawn before this can be answered (annotation page only)
    |- CannotListen            an address or port is not available (command line only)
    |- InsufficientResources   the machine has fewer resources than serving needs (command line only)
    `- Exposed                 other machines could send requests without authentication (command line only)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import ClassVar

import grpc


def shortened(text: str) -> str:
    """A caller's text, cut so that a response can repeat it."""
    return text if len(text) <= 64 else f"{text[:64]}..."


class LabelmintError(Exception):
    """Base class. `reason` is the stable, machine-readable name (google.rpc.ErrorInfo).

    `retry_after_seconds` is the pause after which the same request may succeed (google.rpc.RetryInfo, Retry-After).
    It is None where waiting does not help or the pause is unknown.
    """

    reason: ClassVar[str] = "INTERNAL"
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retry_after_seconds: int | None = None
    # Whether the same request to the same model always ends with this error. If so, a cache may keep the response.
    lasting: ClassVar[bool] = False

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})

    def __copy__(self) -> LabelmintError:
        error = type(self).__new__(type(self), *self.args)
        error.__dict__.update(self.__dict__)
        return error

    def with_metadata(self, **metadata: str) -> LabelmintError:
        """A copy of this error with more metadata; a copy, because several callers may have received the same error."""
        error = copy(self)
        error.metadata = {**self.metadata, **metadata}
        return error

    @property
    def http_headers(self) -> dict[str, str]:
        """The headers that the error adds to an HTTP response."""
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


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

    def __init__(self, model: str, known: tuple[str, ...], version: str = "") -> None:
        """`known` are the served names or, if only the `version` is unknown, the served versions."""
        shown, shown_version = shortened(model), shortened(version)
        wanted = f"version {shown_version!r} of model {shown!r}" if version else f"model named {shown!r}"
        metadata = {"model": shown} | ({"model_version": shown_version} if version else {})
        super().__init__(f"no {wanted}; served: {', '.join(known) or 'none'}", metadata)


class ModelVersionGone(LabelmintError):
    reason = "MODEL_VERSION_GONE"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 410
    title = "The model version is no longer served"

    def __init__(self, model: str, version: str, digest: str) -> None:
        super().__init__(
            f"version {version} of model {model!r} with digest {digest[:12]}... is no longer served; another version "
            "generates different samples for the same seeds; start again with a version that ListModels returns",
            {"model": model, "model_version": version, "model_digest": digest},
        )


class SampleRejected(LabelmintError):
    reason = "SAMPLE_REJECTED"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Sample rejected by the JS gate"
    lasting = True

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


class ContentMissing(LabelmintError):
    reason = "CONTENT_MISSING"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Sample without the wanted content"
    lasting = True

    def __init__(self, seed: int, content: Mapping[str, float], missed: str) -> None:
        """`content`: the measured values by name. `missed`: the conditions that they do not satisfy, in words."""
        super().__init__(
            f"seed {seed} does not satisfy where: {missed}; ask for another seed, or change where",
            {"seed": str(seed), "content": json.dumps(content, ensure_ascii=False)},
        )


class ContentNotFound(LabelmintError):
    reason = "CONTENT_NOT_FOUND"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "No sample with the wanted content"

    def __init__(self, seed_count: int, conditions: str) -> None:
        super().__init__(
            f"none of {seed_count} seeds in a row gave a sample with where {conditions}; change where, or go on at "
            "next_seed",
            {"seed_count": str(seed_count)},
        )


class NotIndexed(LabelmintError):
    reason = "NOT_INDEXED"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Seeds without an index"

    def __init__(self, model: str, indexed: Sequence[tuple[int, int]], message: str) -> None:
        """`indexed`: the ranges of seeds that an index has under the same conditions, each with its end excluded."""
        super().__init__(message, {"model": model, "indexed": json.dumps([list(each) for each in indexed[:16]])})


class RevisionChanged(LabelmintError):
    reason = "REVISION_CHANGED"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    title = "The served revision is not the one in the URL"

    def __init__(self, model: str, served: str) -> None:
        super().__init__(
            f"model {model!r} is served at revision {served!r}, not at the requested one; "
            "omit revision, or request the served one",
            {"model": model, "revision": served},
        )


class Unauthenticated(LabelmintError):
    reason = "UNAUTHENTICATED"
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    title = "A token is required"

    @property
    def http_headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Bearer realm="labelmint"'}


class RequestTooLarge(LabelmintError):
    reason = "REQUEST_TOO_LARGE"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 413
    title = "Request too large"


class Overloaded(LabelmintError):
    reason = "OVERLOADED"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    title = "Too many requests in flight"
    retry_after_seconds = 1


class LimitReached(Overloaded):
    reason = "LIMIT_REACHED"
    title = "A limit of this token is reached"

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TritonUnavailable(LabelmintError):
    reason = "TRITON_UNAVAILABLE"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "Triton is not ready"
    retry_after_seconds = 2  # the longest pause between the gateway's own attempts to reconnect


class ServerDraining(LabelmintError):
    reason = "SERVER_DRAINING"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "The gateway is shutting down"
    retry_after_seconds = 1

    def __init__(self) -> None:
        super().__init__("this gateway is shutting down; continue at another one (resume a stream at next_seed)")


class StreamExpired(LabelmintError):
    reason = "STREAM_EXPIRED"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "The stream reached its maximum duration"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"streams end after {seconds:g} s so that load spreads over gateways; resume at next_seed")


class DeadlineExceeded(LabelmintError):
    reason = "DEADLINE_EXCEEDED"
    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    title = "Deadline exceeded"

    def __init__(self) -> None:
        super().__init__("the sample was not ready within the deadline; allow more time or request fewer samples")


class InferenceFailed(LabelmintError):
    reason = "INFERENCE_FAILED"
    grpc_code = grpc.StatusCode.INTERNAL
    http_status = 502
    title = "Triton failed to run the model"


class IncompatibleWeights(LabelmintError):
    reason = "INCOMPATIBLE_WEIGHTS"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Incompatible weights"


class UnusableFile(LabelmintError):
    reason = "UNUSABLE_FILE"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Unusable file"

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}", {"path": str(path)})


class CannotSave(LabelmintError):
    reason = "CANNOT_SAVE"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 507
    title = "Not saved"

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be written: {error.strerror}; what was saved before is not lost; make room and try again",
            {"path": str(path)},
        )


class ChangedElsewhere(LabelmintError):
    reason = "CHANGED_ELSEWHERE"
    grpc_code = grpc.StatusCode.ABORTED
    http_status = 409
    title = "Changed elsewhere"


class TooFew(LabelmintError):
    reason = "TOO_FEW"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    title = "Too little is drawn"


class CannotListen(LabelmintError):
    reason = "CANNOT_LISTEN"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "Cannot listen"


class InsufficientResources(LabelmintError):
    reason = "INSUFFICIENT_RESOURCES"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    title = "The machine has too few resources"


class Exposed(LabelmintError):
    reason = "EXPOSED"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422
    title = "Reachable without authentication"
