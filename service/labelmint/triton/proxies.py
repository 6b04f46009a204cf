"""Determines the proxy from the environment that gRPC uses, by the same rules as gRPC's core.

Rules of this file:
- Loopback addresses are reached directly, because a proxy cannot reach this machine's loopback.
- A message about a proxy leaves out the user name and password that its URL may contain.
"""

from __future__ import annotations

import ipaddress
import os

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the first that is set counts; gRPC reads lower case only
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


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
