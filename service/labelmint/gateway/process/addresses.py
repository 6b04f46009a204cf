"""Binds the addresses of the REST and gRPC servers, over IPv4 or IPv6, before anything else starts.

Rules of this file:
- A socket is bound first and listens later. Until its server starts, a connection is refused instead of hanging.
- Both servers listen on the same host address. For a host with several addresses, this is its first IPv4 address.
- An error names its cause: the port is in use, the host is not an address of this machine, or a permission is missing.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from labelmint.core.errors import CannotListen


def bracketed(host: str, port: int) -> str:
    """HOST:PORT as URLs and gRPC write it, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def take(host: str, port: int, flag: str) -> socket.socket:
    """Return a socket bound to the address; port 0 is any free port. Raises CannotListen, which names `flag`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CannotListen(f"--host {host!r} is not an address: {getattr(error, 'strerror', error)}") from error
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    try:
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise cannot_listen(error, host, port, flag=flag) from error
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` accepts IPv4 too, as in gRPC
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise cannot_listen(error, host, port, flag=flag) from error
    return taken


@dataclass(frozen=True)
class Listening:
    """Sockets that are bound but not listening yet, and their ports: of REST and of gRPC.

    The servers take the sockets over and may close them; the ports stay known.
    """

    http: socket.socket
    grpc: socket.socket
    ports: tuple[int, int]


@contextmanager
def take_ports(host: str, http_port: int, grpc_port: int) -> Iterator[Listening]:
    """Bind both addresses until the end of the block. Raises CannotListen."""
    with take(host, http_port, "--http-port") as http, take(host, grpc_port, "--grpc-port") as grpc:
        yield Listening(http, grpc, (http.getsockname()[1], grpc.getsockname()[1]))


def cannot_listen(error: OSError, host: str, port: int, *, flag: str) -> CannotListen:
    where = f"cannot listen on {bracketed(host, port)}"
    if error.errno == errno.EADDRINUSE:
        return CannotListen(f"{where}; is another labelmint running? Choose a port with {flag}")
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return CannotListen(f"{where}: this machine has no such address; choose one with --host")
    if error.errno in (errno.EACCES, errno.EPERM):
        return CannotListen(f"{where}: this process has no permission for it; choose a port with {flag}")
    return CannotListen(f"{where}: {os.strerror(error.errno or 0)}")
