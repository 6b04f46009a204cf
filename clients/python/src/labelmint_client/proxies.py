"""Finds the proxy from the environment that gRPC uses for an endpoint, by the rules of gRPC's core.

Rules of this file:
- gRPC reaches loopback addresses directly, because no proxy leads to them.
- A message about a proxy leaves out the user name and password that its URL may contain.
"""

from __future__ import annotations

import os
import re

from labelmint_client.connection import is_loopback

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the first that is set; gRPC reads lower case only
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def proxy_advice(target: str) -> str:
    """Return a hint for the error of a connection to HOST:PORT; "" if gRPC uses no proxy for it."""
    variable = next((name for name in _PROXIES if os.environ.get(name)), "")
    host = _host(target)
    exceptions = next((os.environ[name] for name in _EXCEPTIONS if os.environ.get(name)), "")
    direct = any(each and host.endswith(each) for each in map(str.strip, exceptions.split(",")))
    if not variable or direct or is_loopback(target):
        return ""
    shown = os.environ[variable].rpartition("@")[2].rpartition("://")[2]
    return f"; gRPC connects through the proxy {shown} ({variable}): to go past it, set no_proxy={host}"


def _host(target: str) -> str:
    return re.sub("^(ipv4:|ipv6:|dns:)", "", target.rpartition("/")[2]).rpartition(":")[0].strip("[]")
