"""Who may ask, and how much: tokens from a file, and their limits.

Rules of this file:
- The file holds SHA-256 hashes, never tokens; tokens are random, so that a plain hash of one cannot be reversed.
- A presented token is compared with every line in constant time. Nothing that was presented is kept or logged.
- The file is read again when it changes; one that cannot be read leaves the last good state and one line in the log.
- Limits belong to a name, not to a connection, and survive a change of the file.
- A request is charged before anything is minted for it; a stream is slowed to the rate, not ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from labelmint.core.errors import LabelmintError, LimitReached, Unauthenticated, UnusableFile

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STAT_SECONDS = 1.0  # a changed file holds within this time


@dataclass(frozen=True)
class TokenLimits:
    """What a token may take; None is no limit.

    `samples_per_second` counts minted samples, rejected ones included; `concurrency` counts requests and streams.
    """

    samples_per_second: float | None = None
    concurrency: int | None = None


class Caller:
    """One name of the tokens file, and what it has taken of its limits.

    The rate is a token bucket that may be overdrawn by one request: a batch larger than the bucket is served, and
    the time until the next one is longer for it.
    """

    def __init__(self, name: str, limits: TokenLimits) -> None:
        self.name = name
        self.limits = limits
        self.samples = 0  # charged so far
        self._in_flight = 0
        self._balance = math.inf  # samples; a full bucket
        self._counted = time.monotonic()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request or stream; raises LimitReached beyond the concurrency."""
        limit = self.limits.concurrency
        if limit is not None and self._in_flight >= limit:
            raise LimitReached(
                f"{self.name!r} has {self._in_flight} requests in flight and may have {limit}; "
                "wait for one of them to end"
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def charge(self, samples: int) -> None:
        """Take samples of the rate, or raise LimitReached with the time after which there are some."""
        if samples > 0 and (wait := self._wait_seconds()) > 0.0:
            raise LimitReached(
                f"{self.name!r} may have {self.limits.samples_per_second} samples a second and has had more; "
                f"try again in {wait:.1f} s",
                math.ceil(wait),
            )
        self._take(samples)

    async def pace(self, samples: int) -> None:
        """Take samples of the rate, after the time that it takes until there are some."""
        while samples > 0 and (wait := self._wait_seconds()) > 0.0:
            await asyncio.sleep(wait)
        self._take(samples)

    def _take(self, samples: int) -> None:
        self.samples += samples
        self._balance -= samples

    def _wait_seconds(self) -> float:
        """Time until a sample may be taken; fills the bucket for the time that went by."""
        rate, now = self.limits.samples_per_second, time.monotonic()
        passed, self._counted = now - self._counted, now
        if rate is None:
            self._balance = math.inf
            return 0.0
        # A caller who paused may take what it missed in one second, no more.
        self._balance = min(self._balance + passed * rate, max(1.0, rate))
        return max(0.0, (1.0 - self._balance) / rate)


# Who asks, for what runs in the task of the request; None where no token is asked for.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)


class Tokens:
    """The tokens file: a line each of name, SHA-256 of the token in hexadecimal, and optional limits.

    ::

        # name     SHA-256 of the token     limits
        training   9f86d081...              samples_per_second=200 concurrency=8
        prometheus 60303ae2...
    """

    def __init__(self, path: Path) -> None:
        """Raises UnusableFile."""
        self._path = path
        self._stamp = self._changed()
        self._callers: dict[bytes, Caller] = {}
        self._known: dict[str, Caller] = {}  # by name; who is withdrawn and comes back has taken what he has taken
        self._take(parse_tokens(path, self._read()))
        self._looked = time.monotonic()

    def charged(self) -> dict[str, int]:
        """The samples charged to each name that the file has had."""
        return {caller.name: caller.samples for caller in self._known.values()}

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller of an Authorization header, "Bearer TOKEN"; raises Unauthenticated."""
        self._renew()
        if authorization is None:
            raise Unauthenticated("this gateway wants a token; send 'Authorization: Bearer TOKEN'")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("the Authorization header is not 'Bearer TOKEN'")
        presented = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found: Caller | None = None
        for known, caller in self._callers.items():  # to the end, whoever is found
            if hmac.compare_digest(known, presented):
                found = caller
        if found is None:
            raise Unauthenticated("no such token; it may have been withdrawn")
        return found

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self._looked < _STAT_SECONDS:
            return
        self._looked = now
        stamp = self._changed()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(parse_tokens(self._path, self._read()))
        except LabelmintError as error:
            logger.error("the tokens stay as they were: %s", error.message)
        else:
            logger.warning("read %s again: %d tokens", self._path, len(self._callers))

    def _take(self, entries: Mapping[bytes, tuple[str, TokenLimits]]) -> None:
        callers = {}
        for key, (name, limits) in entries.items():
            caller = callers[key] = self._known.setdefault(name, Caller(name, limits))
            caller.limits = limits
        self._callers = callers

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8-sig")  # Windows puts a mark first
        except OSError as error:
            raise UnusableFile(self._path, f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UnusableFile(self._path, "is not UTF-8 text") from error

    def _changed(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def parse_tokens(path: Path, text: str) -> dict[bytes, tuple[str, TokenLimits]]:
    """Name and limits by SHA-256 digest; raises UnusableFile with the line's number, never with its content."""
    entries: dict[bytes, tuple[str, TokenLimits]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"line {number}:"
        if len(fields) < 2:
            raise UnusableFile(path, f"{where} holds no two fields; write a name and the SHA-256 of its token")
        name, digest, *rest = fields
        if not _NAME.fullmatch(name):
            raise UnusableFile(path, f"{where} the name is not made of letters, digits, '.', '_' and '-', 64 at most")
        if not _SHA256.fullmatch(digest.lower()):
            raise UnusableFile(
                path, f"{where} the second field is not a SHA-256 in hexadecimal; the token itself does not belong here"
            )
        key = bytes.fromhex(digest)
        if key in entries or any(name == known for known, _ in entries.values()):
            raise UnusableFile(path, f"{where} repeats a name or token of a line above")
        entries[key] = name, _limits(path, where, rest)
    if not entries:
        raise UnusableFile(path, "holds no token; nobody could ask")
    return entries


def _limits(path: Path, where: str, fields: list[str]) -> TokenLimits:
    values: dict[str, float] = {}
    for field in fields:
        key, _, value = field.partition("=")
        number = float(value) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else 0.0
        if key not in ("samples_per_second", "concurrency") or key in values or number <= 0.0:
            raise UnusableFile(
                path, f"{where} after the hash come samples_per_second=N and concurrency=N, each once, above 0"
            )
        if key == "concurrency" and number != int(number):
            raise UnusableFile(path, f"{where} concurrency is a whole number")
        values[key] = number
    concurrency = values.get("concurrency")
    return TokenLimits(values.get("samples_per_second"), None if concurrency is None else int(concurrency))
