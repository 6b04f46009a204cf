"""A gateway for a benchmark: `labelmint serve` in a process of its own, on free ports.

Rules of this file:
- It is the installed program, with the arguments that a user would give.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import grpc


@contextlib.contextmanager
def gateway(*arguments: str) -> Iterator[str]:
    """Serve until the block ends; yields the gRPC address, at which it answers."""
    with socket.socket() as grpc_socket, socket.socket() as http_socket:
        for each in (grpc_socket, http_socket):
            each.bind(("127.0.0.1", 0))
        grpc_port, http_port = (each.getsockname()[1] for each in (grpc_socket, http_socket))
    ports = ("--grpc-port", str(grpc_port), "--http-port", str(http_port))
    command = [sys.executable, "-m", "labelmint.cli", "serve", *ports, "--log-level", "warning", *arguments]
    with subprocess.Popen(command) as process:
        try:
            endpoint = f"127.0.0.1:{grpc_port}"
            with grpc.insecure_channel(endpoint) as channel:
                grpc.channel_ready_future(channel).result(timeout=120)
            yield endpoint
        finally:
            process.terminate()
