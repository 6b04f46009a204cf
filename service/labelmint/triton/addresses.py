"""The addresses behind the name of a Triton, so that each Triton is told apart from the others of that name.

Rules of this file:
- A target is what gRPC takes. Where it names a host (HOST:PORT, dns:///HOST:PORT) the system's resolver is asked, again
  and again; a list (ipv4:A:PORT,B:PORT) is its addresses; any other is one address, which gRPC resolves.
- Nobody waits for a name that was resolved once: the addresses it had hold until others are told.
- What a proxy of the environment would carry stays one address too: the proxy resolves the name.
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
    """What `target` stands for."""

    def __init__(self, target: str) -> None:
        self.failure = f"the name in {target} is not resolved"
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
        """gRPC's options for a connection to one of the addresses."""
        if self._host:
            # The proxy was decided upon by the name; to no proxy would the address mean what the name does.
            return [("grpc.enable_http_proxy", 0), ("grpc.default_authority", f"{self._host}:{self._port}")]
        return [("grpc.enable_http_proxy", int(is_proxied(address)))]

    def doubt(self) -> None:
        """An address did not answer: resolve the name again when somebody asks next."""
        self._due = float("-inf")

    async def now(self) -> tuple[str, ...]:
        """The addresses as gRPC takes them; none, and `failure` says why, where the name never had any."""
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
