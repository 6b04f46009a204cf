"""Authentication by tokens from a file, and the limits of each token.

Rules of this file:
- The file contains SHA-256 hashes, never tokens. Tokens are random, so a plain hash of one cannot be reversed.
- A presented token is compared with every line in constant time. Presented tokens are neither stored nor logged.
- A changed file is read again. If the new file is unusable, the last good state stays and the log gets one line.
- Limits belong to a name, not to a connection. What a name has used of them survives a change of the file.
- A request is charged before any sample is generated for it. A stream is slowed to the rate, not ended.
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
_STAT_SECONDS = 1.0  # a changed file takes effect within this time


@dataclass(frozen=True)
class TokenLimits:
    """The limits of a token; None means no limit.

    `samples_per_second` counts cached and rejected samples too; `concurrency` counts requests and streams.
    """

    samples_per_second: float | None = None
    concurrency: int | None = None


class Caller:
    """One name of the tokens file, and what it has used of its limits.

    The rate is a token bucket that one request may overdraw: a batch larger than the bucket is served, and the next
    request waits longer in return.
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
        """Count a request or stream while it runs; raises LimitReached beyond the concurrency limit."""
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
        """Take samples from the bucket; if it is empty, raises LimitReached with the time until it has some."""
        if samples > 0 and (wait := self._wait_seconds()) > 0.0:
            raise LimitReached(
                f"{self.name!r} has exceeded its limit of {self.limits.samples_per_second} samples per second; "
                f"try again in {wait:.1f} s",
                math.ceil(wait),
            )
        self._take(samples)

    async def pace(self, samples: int) -> None:
        """Wait until the bucket has samples, then take them."""
        while samples > 0 and (wait := self._wait_seconds()) > 0.0:
            await asyncio.sleep(wait)
        self._take(samples)

    def _take(self, samples: int) -> None:
        self.samples += samples
        self._balance -= samples

    def _wait_seconds(self) -> float:
        """Refill the bucket for the time since the last call; returns the time until a sample may be taken."""
        rate, now = self.limits.samples_per_second, time.monotonic()
        passed, self._counted = now - self._counted, now
        if rate is None:
            self._balance = math.inf
            return 0.0
        # The bucket holds one second of samples (at least one), so a pause saves up no more than that.
        self._balance = min(self._balance + passed * rate, max(1.0, rate))
        return max(0.0, (1.0 - self._balance) / rate)


# The authenticated caller of the request that the running task serves; None where no token is required.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)


class Tokens:
    """The tokens file: each line has a name, the token's SHA-256 in hexadecimal, and optional limits.

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
        self._known: dict[str, Caller] = {}  # by name; a name that is removed and returns keeps its usage
        self._take(parse_tokens(path, self._read()))
        self._looked = time.monotonic()

    def charged(self) -> dict[str, int]:
        """The samples charged to each name that was ever in the file."""
        return {caller.name: caller.samples for caller in self._known.values()}

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller of an Authorization header, "Bearer TOKEN"; raises Unauthenticated."""
        self._renew()
        if authorization is None:
            raise Unauthenticated("this gateway requires a token; send 'Authorization: Bearer TOKEN'")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("the Authorization header is not 'Bearer TOKEN'")
        presented = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found: Caller | None = None
        for known, caller in self._callers.items():  # no early exit, so that the time does not reveal the line
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
            logger.error("keeping the previous tokens: %s", error.message)
        else:
            logger.warning("reloaded %s: %d tokens", self._path, len(self._callers))

    def _take(self, entries: Mapping[bytes, tuple[str, TokenLimits]]) -> None:
        callers = {}
        for key, (name, limits) in entries.items():
            caller = callers[key] = self._known.setdefault(name, Caller(name, limits))
            caller.limits = limits
        self._callers = callers

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8-sig")  # editors on Windows may write a byte order mark first
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
    """Names and limits by SHA-256 digest; raises UnusableFile with the line's number, never with its content."""
    entries: dict[bytes, tuple[str, TokenLimits]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"line {number}:"
        if len(fields) < 2:
            raise UnusableFile(path, f"{where} must have at least two fields: a name and the SHA-256 of its token")
        name, digest, *rest = fields
        if not _NAME.fullmatch(name):
            raise UnusableFile(path, f"{where} the name must be 1 to 64 letters, digits, '.', '_' or '-'")
        if not _SHA256.fullmatch(digest.lower()):
            raise UnusableFile(
                path, f"{where} the second field is not a SHA-256 in hexadecimal; the token itself does not belong here"
            )
        key = bytes.fromhex(digest)
        if key in entries or any(name == known for known, _ in entries.values()):
            raise UnusableFile(path, f"{where} repeats a name or token of a line above")
        entries[key] = name, _limits(path, where, rest)
    if not entries:
        raise UnusableFile(path, "holds no tokens, so no client could authenticate; add a line for each client")
    return entries


def _limits(path: Path, where: str, fields: list[str]) -> TokenLimits:
    values: dict[str, float] = {}
    for field in fields:
        key, _, value = field.partition("=")
        number = float(value) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else 0.0
        if key not in ("samples_per_second", "concurrency") or key in values or number <= 0.0:
            raise UnusableFile(
                path, f"{where} after the hash come only samples_per_second=N and concurrency=N, once each, above 0"
            )
        if key == "concurrency" and number != int(number):
            raise UnusableFile(path, f"{where} concurrency must be a whole number")
        values[key] = number
    concurrency = values.get("concurrency")
    return TokenLimits(values.get("samples_per_second"), None if concurrency is None else int(concurrency))
