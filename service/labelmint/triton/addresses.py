"""Resolves a gRPC target to the addresses of its Tritons, which lets the client treat each Triton separately.

Rules of this file:
- A target has the form that gRPC accepts. If it names a host (HOST:PORT, dns:///HOST:PORT), the system resolver looks
  the host up again and again. A list (ipv4:A:PORT,B:PORT) stands for its addresses. Any other target is one address,
  which gRPC resolves.
- Once a name was resolved, no caller waits for a lookup. The known addresses stay valid until a lookup returns others.
- A target behind a proxy of the environment is one address as well, because the proxy resolves the name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from typing import Any
from urllib.parse import unquote

from labelmint.triton.proxies import is_proxied

_RESOLVE_SECONDS = 5.0
_HOST_AND_PORT = re.compile(r"(?:dns:(?:///)?)?(?P<host>\[[^\[\]]+\]|[^:/,\[\]]+):(?P<port>\d+)")
_LIST = re.compile(r"ipv[46]:(?P<addresses>[^/].*)")


class Addresses:
    """The addresses of `target`."""

    def __init__(self, target: str) -> None:
        self.failure = f"the name in {target} is not resolved yet"
        self._target = target
        self._host, self._port = "", 0
        self._known: tuple[str, ...] = (target,)
        self._due = float("-inf")
        self._resolving: asyncio.Task[None] | None = None
        if (listed := _LIST.fullmatch(target)) is not None:
            self._known = tuple(dict.fromkeys(unquote(listed["addresses"]).split(",")))
        elif (named := _HOST_AND_PORT.fullmatch(target)) is not None:
            host = named["host"].strip("[]")
            if not _is_address(host) and not is_proxied(target):
                self._host, self._port, self._known = host, int(named["port"]), ()

    def options(self, address: str) -> list[tuple[str, Any]]:
        """Return gRPC's options for a connection to one of the addresses."""
        if self._host:
            # The host name already decided that no proxy is used. gRPC must not decide again by the bare address.
            return [("grpc.enable_http_proxy", 0), ("grpc.default_authority", f"{self._host}:{self._port}")]
        return [("grpc.enable_http_proxy", int(is_proxied(address)))]

    def doubt(self) -> None:
        """After an address did not answer: let the next call of `now` resolve the name again."""
        self._due = float("-inf")

    async def now(self) -> tuple[str, ...]:
        """Return the addresses in gRPC's form. Empty if the name was never resolved; `failure` then says why."""
        if self._host and time.monotonic() >= self._due and (self._resolving is None or self._resolving.done()):
            self._due = time.monotonic() + _RESOLVE_SECONDS
            self._resolving = asyncio.create_task(self._resolve())
        if not self._known and self._resolving is not None:
            await asyncio.wait([self._resolving], timeout=_RESOLVE_SECONDS)
        return self._known

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self.failure = f"the name in {self._target} cannot be resolved: {error}"
            self.doubt()
        else:
            hosts = [str(address[0]) for *_, address in found]
            self._known = tuple(
                sorted({f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}" for host in hosts})
            )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
