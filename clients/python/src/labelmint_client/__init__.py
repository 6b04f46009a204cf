"""Client of labelmint: image-label pairs for training jobs, streamed from a gateway.

Rules of this file:
- The public interface is the names below, plus `labelmint_client.torch`, `.huggingface` and `.tensorflow`. Those three
  modules are not imported here because they need the libraries of the same names.
"""

import labelmint_client.forks  # noqa: F401  # isort: split
from labelmint_client.aio import AsyncClient, AsyncSampleStream
from labelmint_client.client import Client, SampleStream
from labelmint_client.connection import Tls
from labelmint_client.errors import (
    ContentMissing,
    ContentNotFound,
    DeadlineExceeded,
    InvalidRequest,
    LabelmintError,
    LimitReached,
    ModelNotFound,
    ModelVersionGone,
    NotIndexed,
    Overloaded,
    SampleRejected,
    ServerDraining,
    StreamExpired,
    Unauthenticated,
    Unavailable,
    Uncalibrated,
)
from labelmint_client.messages import Calibration, Filtered, ListedSeeds, Model, Rejection, Sample, SampleOptions

__all__ = [
    "AsyncClient",
    "AsyncSampleStream",
    "Calibration",
    "Client",
    "ContentMissing",
    "ContentNotFound",
    "DeadlineExceeded",
    "Filtered",
    "InvalidRequest",
    "LabelmintError",
    "LimitReached",
    "ListedSeeds",
    "Model",
    "ModelNotFound",
    "ModelVersionGone",
    "NotIndexed",
    "Overloaded",
    "Rejection",
    "Sample",
    "SampleOptions",
    "SampleRejected",
    "SampleStream",
    "ServerDraining",
    "StreamExpired",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Uncalibrated",
]
