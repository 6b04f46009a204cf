"""The errors of a call, one class per reason, and the translation of gRPC errors into them.

Rules of this file:
- The gateway's reason (google.rpc.ErrorInfo) selects the class. Without a reason, the gRPC code selects it.
- An error is `retryable` only if the protocol says that a retry is safe and may help.
- An error carries data (`code`, `reason`, `metadata`, `retry_after_seconds`), so programs need not parse its text.
- No other file translates gRPC errors.

    LabelmintError                all other errors: INTERNAL, INFERENCE_FAILED; report them
    |- InvalidRequest             the request is invalid; `field` names the wrong field
    |  `- Uncalibrated            the gate needs a calibration that was not measured
    |- ModelNotFound              no model has that name, or it has no such version
    |- ModelVersionGone           the version that a request or a stream began with is no longer served
    |- SampleRejected             the sample exists, but its JS score is above the gate
    |- ContentMissing             the sample exists, but `where` keeps it from being delivered
    |- ContentNotFound            a long run of seeds gave a stream no sample that satisfies `where`
    |- NotIndexed                 the gateway has no index of these seeds, so it cannot list them
    |- Unauthenticated            the token is missing or unknown
    |- Overloaded                 retryable: too many requests are in flight
    |  `- LimitReached            retryable: a limit of this token is reached
    |- Unavailable                retryable: no gateway answers, or the gateway has no Triton
    |  |- ServerDraining          retryable: this gateway is shutting down
    |  `- StreamExpired           retryable at once: gateways end streams regularly so that load spreads
    `- DeadlineExceeded           the answer was not ready before the deadline
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from labelmint_client.proxies import proxy_advice

_DOMAIN = "labelmint"


class LabelmintError(Exception):
    """Base class. `retry_after_seconds` is the pause that the gateway requested; None if it requested none."""

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
        # Errors must be picklable: DataLoader workers send them to the training process.
        return type(self), (self.message, self.code, self.reason, self.metadata, self.retry_after_seconds)


class InvalidRequest(LabelmintError):
    @property
    def field(self) -> str:
        """The wrong field of the request."""
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
        """The calibration that gave the threshold; empty if the request set max_js."""
        return self.metadata["calibration_id"]


class ContentMissing(LabelmintError):
    @property
    def seed(self) -> int:
        return int(self.metadata["seed"])

    @property
    def content(self) -> dict[str, float]:
        """What the conditions asked about, by name, as in `Sample.content`."""
        found: dict[str, float] = json.loads(self.metadata["content"])
        return found


class ContentNotFound(LabelmintError):
    @property
    def seed_count(self) -> int:
        """How many seeds in a row gave no sample. The `next_seed` of the stream is behind them."""
        return int(self.metadata["seed_count"])


class NotIndexed(LabelmintError):
    @property
    def indexed(self) -> list[tuple[int, int]]:
        """The ranges of seeds that an index has under the same conditions, each with its end excluded."""
        return [(start, end) for start, end in json.loads(self.metadata["indexed"])]


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
    "CONTENT_MISSING": ContentMissing,
    "CONTENT_NOT_FOUND": ContentNotFound,
    "NOT_INDEXED": NotIndexed,
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
# For errors without a labelmint reason: gRPC itself or a proxy produced them. CANCELLED always comes from the server
# side here: a gateway that shuts down cancels the calls that outlast its grace period. Calls that this client cancels
# are never translated. RESOURCE_EXHAUSTED is not in the table: without a reason it means that a message is above a size
# limit, and a retry would fail again.
_BY_CODE: Mapping[grpc.StatusCode, type[LabelmintError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def translated(error: grpc.RpcError, endpoint: str) -> LabelmintError:
    """Translate the error of a blocking or asyncio call. The message names `endpoint` if no gateway wrote the error."""
    code, details = error.code(), error.details() or ""
    info, retry_after_seconds = _details(dict(error.trailing_metadata() or ()))  # type: ignore[arg-type]
    if info is None:
        kind = _BY_CODE.get(code, LabelmintError)
        proxy = proxy_advice(endpoint) if kind is Unavailable else ""
        return kind(f"{endpoint}: {code.name}: {details}{proxy}", code)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, LabelmintError)
    return kind(details, code, info.reason, info.metadata, retry_after_seconds)


def _details(trailers: Mapping[str, str | bytes]) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    """Return the gateway's ErrorInfo, None if the error has none, and the requested pause in seconds."""
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
        return status_pb2.Status()  # a proxy wrote it; only the gRPC code is usable
