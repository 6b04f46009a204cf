"""The base classes of the blocking and the asyncio client: settings, retry logs and the progress of a stream.

Rules of this file:
- Nothing here makes a call or waits, because the two clients do that in different ways.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from labelmint_client.connection import Connection, Tls
from labelmint_client.errors import LabelmintError, StreamExpired
from labelmint_client.messages import Model, Sample
from labelmint_client.policy import Attempts, Endpoints, Healing, Walk
from labelmint_client.progress import Bar, Progress
from labelmint_client.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0


class BaseClient:
    """A client of one or several gateways that serve the same models.

    endpoints: HOST:PORT of a gateway's gRPC server, or several. The client spreads calls over all of them and goes on
    with another one when one fails. Any gRPC target works; dns:///HOST:PORT uses all addresses of a name.
    token: sent with each call. Without TLS it is sent to this machine only, unless `insecure` is set.
    tls: None for plain text.
    deadline_seconds: the time limit of a call, including all its retries.
    patience_seconds: how long a stream retries without receiving a message before it raises the last error.

    Each method raises `LabelmintError` or one of its subclasses. In a process that was forked after the client was
    created, it raises RuntimeError, because gRPC connections do not survive a fork.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        token: str | None = None,
        tls: Tls | None = None,
        insecure: bool = False,
        deadline_seconds: float = DEADLINE_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        several = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        self._connection = Connection(several, token, tls, insecure)
        self._channels = self._open_channels()
        self._stubs = [pb_grpc.SampleServiceStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        self._process = os.getpid()
        self._endpoints = Endpoints(several)
        self._deadline_seconds = deadline_seconds
        self._patience_seconds = patience_seconds
        # The task of each model, requested once; it decides which encodings a request may set.
        self._tasks: dict[tuple[str, str], str] = {}

    def _open_channels(self) -> list[Any]:
        raise NotImplementedError

    @property
    def _forked(self) -> bool:
        """Whether this process was forked after the client was created. The connections are then the parent's."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._forked:
            raise RuntimeError(
                f"this client was created in process {self._process} and is used in {os.getpid()}, which was forked "
                "from it: create a client in each process"
            )

    def _attempts(self) -> Attempts:
        self._check_process()
        return Attempts(self._endpoints, time.monotonic() + self._deadline_seconds)

    def _stream_attempts(self, walk: Walk) -> Attempts:
        self._check_process()
        # The shard index spreads the streams of one job over the endpoints, even if they run in different processes.
        turn = walk.shard_index if walk.shard_count > 1 else None
        return Attempts(self._endpoints, time.monotonic() + self._patience_seconds, turn)


class HealingLog:
    """Logs that a call or stream failed and is retried, and that it recovered. `Healing` limits how often."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._healing = Healing()

    def cut(self, what: str, failure: LabelmintError) -> None:
        if isinstance(failure, StreamExpired):  # routine: gateways end every stream after some time
            logger.info("%s: %s", what, failure)
        elif self._healing.cut(time.monotonic()):
            logger.log(self._level, "%s: %s", what, failure)

    def healed(self, what: str) -> None:
        if (seconds := self._healing.healed(time.monotonic())) is not None:
            logger.log(self._level, "%s after %.1f s", what, seconds)


class BaseStream:
    """The progress of a walk. `model`: the model of the walk; its version and digest stay the same throughout."""

    def __init__(self, model: Model, walk: Walk, bar: Bar | None) -> None:
        self.model = model
        self._walk = walk
        self._log = HealingLog(logging.WARNING)
        self._bar = bar
        self._delivered = self._accepted = 0

    @property
    def model_digest(self) -> str:
        """SHA-256 over the model's artifacts, hexadecimal. Every sample of the walk has this digest."""
        return self.model.digest

    @property
    def next_seed(self) -> int:
        """The seed to resume at, the whole state of a walk: all lower seeds of the shard are delivered or rejected."""
        return self._walk.next_seed

    @property
    def rejected_count(self) -> int:
        """How many seeds were rejected so far."""
        return self._walk.rejected_count

    @property
    def filtered_count(self) -> int:
        """How many seeds were filtered so far: accepted by the gate, without the content that `where` asks for."""
        return self._walk.filtered_count

    def _tell_cut(self, failure: LabelmintError) -> None:
        self._log.cut(f"the stream of {self.model.name} resumes at seed {self._walk.next_seed}", failure)

    def _shown(self) -> AbstractContextManager[object]:
        """Begin to show the progress, until the end of the context."""
        self._show(None)
        return self._bar or nullcontext()

    def _show(self, sample: Sample | None) -> None:
        if self._bar is None:
            return
        if sample is not None:
            self._delivered += 1
            self._accepted += sample.accepted
        seeds = self._accepted + self.filtered_count + self.rejected_count
        self._bar.show(Progress(self._delivered, self._accepted, self.filtered_count, seeds))

    def _tell_healed(self) -> None:
        self._log.healed(f"the stream of {self.model.name} recovered")
