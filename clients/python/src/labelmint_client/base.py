"""What the blocking client and the one for asyncio share: their settings, and what a stream says of itself.

Rules of this file:
- No call is made here, and nothing waits.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from labelmint_client.connection import Connection, Tls
from labelmint_client.errors import LabelmintError, StreamExpired
from labelmint_client.messages import Model
from labelmint_client.policy import Attempts, Endpoints, Healing, Walk
from labelmint_client.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0


class BaseClient:
    """Calls to one or several gateways that serve the same models.

    endpoints: HOST:PORT of a gateway's gRPC, or several: calls are spread over them and go to another one when one
    fails. Any gRPC target will do; dns:///HOST:PORT spreads over all addresses of a name.
    token: sent with each call; in plain text to this machine only, unless `insecure` is set.
    tls: None for plain text.
    deadline_seconds: the time that a call may take, all its retries included.
    patience_seconds: how long a stream may go without a message, trying to come back, before its error is raised.

    Each method raises `LabelmintError` or a subclass of it; and RuntimeError in a process that was forked after the
    client was made, since gRPC's connections do not come along.
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
        # A model's task, asked for once: what encodings a request may name depends on it.
        self._tasks: dict[tuple[str, str], str] = {}

    def _open_channels(self) -> list[Any]:
        raise NotImplementedError

    @property
    def _forked(self) -> bool:
        """Whether this process was forked after the client was made: then its connections are the parent's."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._forked:
            raise RuntimeError(
                f"this client was made in process {self._process} and is used in {os.getpid()}, which was forked from "
                "it: make a client in each process"
            )

    def _attempts(self) -> Attempts:
        self._check_process()
        return Attempts(self._endpoints, time.monotonic() + self._deadline_seconds)

    def _stream_attempts(self, walk: Walk) -> Attempts:
        self._check_process()
        # The streams of one job are spread by their shards, whatever processes they live in.
        turn = walk.shard_index if walk.shard_count > 1 else None
        return Attempts(self._endpoints, time.monotonic() + self._patience_seconds, turn)


class HealingLog:
    """Says that what is tried again was cut, and that it is back, as often as `Healing` finds fit."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._healing = Healing()

    def cut(self, what: str, failure: LabelmintError) -> None:
        if isinstance(failure, StreamExpired):  # it is renewed, as all are now and then
            logger.info("%s: %s", what, failure)
        elif self._healing.cut(time.monotonic()):
            logger.log(self._level, "%s: %s", what, failure)

    def healed(self, what: str) -> None:
        if (seconds := self._healing.healed(time.monotonic())) is not None:
            logger.log(self._level, "%s after %.1f s", what, seconds)


class BaseStream:
    """How far a walk is. `model`: what it keeps to, version and digest included."""

    def __init__(self, model: Model, walk: Walk) -> None:
        self.model = model
        self._walk = walk
        self._log = HealingLog(logging.WARNING)

    @property
    def model_digest(self) -> str:
        """The weights that the walk keeps to: SHA-256, hexadecimal."""
        return self.model.digest

    @property
    def next_seed(self) -> int:
        """All seeds of the shard below it are done: the whole state of a walk. It moves past rejected seeds too."""
        return self._walk.next_seed

    @property
    def rejected_count(self) -> int:
        """Seeds rejected so far."""
        return self._walk.rejected_count

    def _tell_cut(self, failure: LabelmintError) -> None:
        self._log.cut(f"the stream of {self.model.name} goes on at seed {self._walk.next_seed}", failure)

    def _tell_healed(self) -> None:
        self._log.healed(f"the stream of {self.model.name} is back")
