"""Which proxy of the environment gRPC goes through, as gRPC's core decides it.

Rules of this file:
- This machine is reached directly: no proxy leads to its loopback addresses.
- What is said of a proxy leaves out the name and password that its URL may hold.
"""

from __future__ import annotations

import ipaddress
import os

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the first that is set; gRPC reads lower case only
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def is_proxied(target: str) -> bool:
    """Whether gRPC goes through a proxy to HOST:PORT."""
    host = _host(target)
    exceptions = next((os.environ[name] for name in _EXCEPTIONS if os.environ.get(name)), "")
    direct = any(each and host.endswith(each) for each in map(str.strip, exceptions.split(",")))
    return _variable() is not None and not direct and not _is_loopback(host)


def proxy_advice(target: str) -> str:
    """What an error of a connection to HOST:PORT has to add; "" where no proxy lies between."""
    if (variable := _variable()) is None or not is_proxied(target):
        return ""
    shown = os.environ[variable].rpartition("@")[2].rpartition("://")[2]
    return f"; the way goes through the proxy {shown} ({variable}): to go past it, set no_proxy={_host(target)}"


def _variable() -> str | None:
    return next((name for name in _PROXIES if os.environ.get(name)), None)


def _is_loopback(host: str) -> bool:
    """By the name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(target: str) -> str:
    return target.rpartition("/")[2].rpartition(":")[0].strip("[]")
