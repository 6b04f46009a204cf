"""Resolves a gRPC target to the addresses of its Tritons, and tells which proxy of the environment gRPC uses for them.

Rules of this file:
- A target has the form that gRPC accepts. If it names a host (HOST:PORT, dns:///HOST:PORT), the system resolver looks
  the host up again and again. A list (ipv4:A:PORT,B:PORT) stands for its addresses. Any other target is one address,
  which gRPC resolves.
- Once a name was resolved, no caller waits for a lookup. The known addresses stay valid until a lookup returns others.
- A target behind a proxy of the environment is one address as well, because the proxy resolves the name. The proxy is
  determined by the rules of gRPC's core. Loopback addresses are reached directly, because a proxy cannot reach them.
- A message about a proxy leaves out the user name and password that its URL may contain.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import time
from typing import Any
from urllib.parse import unquote

_RESOLVE_SECONDS = 5.0
_HOST_AND_PORT = re.compile(r"(?:dns:(?:///)?)?(?P<host>\[[^\[\]]+\]|[^:/,\[\]]+):(?P<port>\d+)")
_LIST = re.compile(r"ipv[46]:(?P<addresses>[^/].*)")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the first that is set counts; gRPC reads lower case only
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


class Addresses:
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


def is_proxied(target: str) -> bool:
    """Whether gRPC connects to HOST:PORT through a proxy."""
    host = _host(target)
    exceptions = next((os.environ[name] for name in _EXCEPTIONS if os.environ.get(name)), "")
    direct = any(each and host.endswith(each) for each in map(str.strip, exceptions.split(",")))
    return _variable() is not None and not direct and not _is_loopback(host)


def proxy_advice(target: str) -> str:
    """Return what to add to a connection error of HOST:PORT; "" if gRPC uses no proxy."""
    if (variable := _variable()) is None or not is_proxied(target):
        return ""
    shown = os.environ[variable].rpartition("@")[2].rpartition("://")[2]
    return f"; the connection uses the proxy {shown} ({variable}): to go past it, set no_proxy={_host(target)}"


def _variable() -> str | None:
    return next((name for name in _PROXIES if os.environ.get(name)), None)


def _is_loopback(host: str) -> bool:
    """Decide by the name, without resolving it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(target: str) -> str:
    return target.rpartition("/")[2].rpartition(":")[0].strip("[]")
