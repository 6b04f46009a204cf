"""The two addresses that we listen on: taken before anything else is started, for IPv4 and IPv6.

Rules of this file:
- A port is taken without listening at it: until the door opens, a connection is refused and does not hang.
- Both doors listen on one address; a host with several is its first IPv4 one.
- What is refused is named for what it is: the port is in use, the host is not this machine's, a right is missing.
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
    """HOST:PORT as URLs and gRPC write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def take(host: str, port: int, flag: str) -> socket.socket:
    """A socket bound to the address; 0 is any free port. `flag` chooses the port. Raises CannotListen."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CannotListen(f"--host {host!r} is no address: {getattr(error, 'strerror', error)}") from error
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    try:
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise cannot_listen(error, host, port, flag) from error
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` is IPv4 too, as gRPC has it
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise cannot_listen(error, host, port, flag) from error
    return taken


@dataclass(frozen=True)
class Listening:
    """Where the servers are to listen: sockets that are bound and do not listen yet."""

    http: socket.socket
    grpc: socket.socket

    @property
    def ports(self) -> tuple[int, int]:
        """Of REST and of gRPC."""
        return self.http.getsockname()[1], self.grpc.getsockname()[1]


@contextmanager
def take_ports(host: str, http_port: int, grpc_port: int) -> Iterator[Listening]:
    """Both addresses, until the end of the block; raises CannotListen."""
    with take(host, http_port, "--http-port") as http, take(host, grpc_port, "--grpc-port") as grpc:
        yield Listening(http, grpc)


def cannot_listen(error: OSError, host: str, port: int, flag: str) -> CannotListen:
    where = f"cannot listen on {bracketed(host, port)}"
    if error.errno == errno.EADDRINUSE:
        return CannotListen(f"{where}; is another labelmint running? Choose a port with {flag}")
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return CannotListen(f"{where}: this machine has no such address; choose one with --host")
    if error.errno in (errno.EACCES, errno.EPERM):
        return CannotListen(f"{where}: that takes more rights than this process has; choose a port with {flag}")
    return CannotListen(f"{where}: {os.strerror(error.errno or 0)}")
