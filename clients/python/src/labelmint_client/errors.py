"""Every error of a call, one class a reason, and the one place where gRPC's own errors become ours.

Rules of this file:
- A class is chosen by the gateway's reason (google.rpc.ErrorInfo), and by the gRPC code where there is none.
- An error is `retryable` only where the protocol says that asking again is safe and of use.
- An error carries data (`code`, `reason`, `metadata`, `retry_after_seconds`), not only prose.

    LabelmintError                anything else: INTERNAL, INFERENCE_FAILED; report it
    |- InvalidRequest             what was asked cannot be: `field` names it
    |  `- Uncalibrated            a gate was asked for where nothing was measured
    |- ModelNotFound              no model, or no version of it, of that name
    |- ModelVersionGone           the version that a request or a stream began with is no longer served
    |- SampleRejected             the sample exists, its JS score is above the gate
    |- Unauthenticated            no token, or none that is known
    |- Overloaded                 retryable: too much is in flight
    |  `- LimitReached            retryable: a limit of this token
    |- Unavailable                retryable: no gateway answers, or it has no Triton
    |  |- ServerDraining          retryable: this gateway is shutting down
    |  `- StreamExpired           retryable at once: streams are renewed so that load spreads
    `- DeadlineExceeded           it was not ready in the time that was given
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from labelmint_client.proxies import proxy_advice

_DOMAIN = "labelmint"


class LabelmintError(Exception):
    """Base class. `retry_after_seconds` is the pause that the gateway asked for, None where it did not."""

    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross from DataLoader workers to the trainer.
        return type(self), (self.message, self.code, self.reason, self.metadata, self.retry_after_seconds)


class InvalidRequest(LabelmintError):
    @property
    def field(self) -> str:
        """The field of the request that is wrong."""
        return self.metadata.get("field", "")


class Uncalibrated(InvalidRequest):
    pass


class ModelNotFound(LabelmintError):
    pass


class ModelVersionGone(LabelmintError):
    pass


class SampleRejected(LabelmintError):
    @property
    def seed(self) -> int:
        return int(self.metadata["seed"])

    @property
    def js_score(self) -> float:
        """In nats, above `threshold`."""
        return float(self.metadata["js_score"])

    @property
    def threshold(self) -> float:
        """The gate that was applied, in nats."""
        return float(self.metadata["threshold"])

    @property
    def calibration_id(self) -> str:
        """Where the threshold came from; empty when max_js was given."""
        return self.metadata["calibration_id"]


class Unauthenticated(LabelmintError):
    pass


class Overloaded(LabelmintError):
    retryable = True


class LimitReached(Overloaded):
    pass


class Unavailable(LabelmintError):
    retryable = True


class ServerDraining(Unavailable):
    pass


class StreamExpired(Unavailable):
    pass


class DeadlineExceeded(LabelmintError):
    pass


_BY_REASON: Mapping[str, type[LabelmintError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "UNCALIBRATED": Uncalibrated,
    "MODEL_NOT_FOUND": ModelNotFound,
    "MODEL_VERSION_GONE": ModelVersionGone,
    "SAMPLE_REJECTED": SampleRejected,
    "UNAUTHENTICATED": Unauthenticated,
    "OVERLOADED": Overloaded,
    "LIMIT_REACHED": LimitReached,
    "TRITON_UNAVAILABLE": Unavailable,
    "SERVER_DRAINING": ServerDraining,
    "STREAM_EXPIRED": StreamExpired,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "INFERENCE_FAILED": LabelmintError,
    "INTERNAL": LabelmintError,
}
# For errors that no gateway of ours wrote: gRPC itself, or a proxy. CANCELLED is the far side's: a gateway that ends
# cuts what outlasts its grace so, and what this side gave up is never translated. RESOURCE_EXHAUSTED is none of these:
# without a gateway's word it is a limit on the size of messages, which stays.
_BY_CODE: Mapping[grpc.StatusCode, type[LabelmintError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def translated(error: grpc.RpcError, endpoint: str) -> LabelmintError:
    """What a failed call of either API of gRPC means; `endpoint` is named where no gateway spoke."""
    code, details = error.code(), error.details() or ""
    info, retry_after_seconds = _details(dict(error.trailing_metadata() or ()))  # type: ignore[arg-type]
    if info is None:
        kind = _BY_CODE.get(code, LabelmintError)
        proxy = proxy_advice(endpoint) if kind is Unavailable else ""
        return kind(f"{endpoint}: {code.name}: {details}{proxy}", code)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, LabelmintError)
    return kind(details, code, info.reason, info.metadata, retry_after_seconds)


def _details(trailers: Mapping[str, str | bytes]) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    """The gateway's own words in a status, and the pause in seconds that it asks for."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in _status(trailers).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    pause = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
    return (info if info.domain == _DOMAIN else None), pause


def _status(trailers: Mapping[str, str | bytes]) -> status_pb2.Status:
    packed = trailers.get("grpc-status-details-bin", b"")
    try:
        return status_pb2.Status.FromString(packed if isinstance(packed, bytes) else b"")
    except DecodeError:
        return status_pb2.Status()  # a proxy's: the code alone has to do
