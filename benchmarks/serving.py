"""A gateway for a benchmark: `labelmint serve` in a process of its own, on free ports.

Rules of this file:
- It is the installed program, with the arguments that a user would give.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

START_SECONDS = 120


@dataclass(frozen=True)
class Service:
    """A running `labelmint serve`: the address of gRPC, the URL of REST, and its process."""

    grpc: str
    http: str
    pid: int


@contextlib.contextmanager
def gateway(*arguments: str) -> Iterator[str]:
    """Serve until the block ends; yields the gRPC address, at which it answers."""
    with service(*arguments) as served:
        yield served.grpc


@contextlib.contextmanager
def service(*arguments: str) -> Iterator[Service]:
    """Serve until the block ends; both doors answer."""
    with socket.socket() as grpc_socket, socket.socket() as http_socket:
        for each in (grpc_socket, http_socket):
            each.bind(("127.0.0.1", 0))
        grpc_port, http_port = (each.getsockname()[1] for each in (grpc_socket, http_socket))
    ports = ("--grpc-port", str(grpc_port), "--http-port", str(http_port))
    command = [sys.executable, "-m", "labelmint.cli", "serve", *ports, "--log-level", "warning", *arguments]
    with subprocess.Popen(command) as process:
        try:
            served = Service(f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", process.pid)
            with grpc.insecure_channel(served.grpc) as channel:
                grpc.channel_ready_future(channel).result(timeout=START_SECONDS)
            _wait_for_rest(served.http)
            yield served
        finally:
            process.terminate()


def _wait_for_rest(url: str) -> None:
    """Its door opens a moment after that of gRPC."""
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
