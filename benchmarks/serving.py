"""Runs `labelmint serve` for benchmarks in a separate process on free ports, and requests single raw samples from it.

Rules of this file:
- The gateway is the installed program with command-line arguments, as a user starts it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

START_SECONDS = 120
PATIENCE_SECONDS = 600.0
# Rejected samples are delivered too, so that each seed is one sample.
RAW = pb.SampleOptions(include_rejected=True, image_encoding=pb.ENCODING_RAW, label_encoding=pb.ENCODING_RAW)


@dataclass(frozen=True)
class Served:
    """A running `labelmint serve`: the address of gRPC, the URL of REST, and its process."""

    grpc: str
    http: str
    pid: int


@contextlib.contextmanager
def gateway(*arguments: str) -> Iterator[Served]:
    """Run the gateway until the block ends. Enters the block when REST and gRPC answer."""
    with socket.socket() as grpc_socket, socket.socket() as http_socket:
        for each in (grpc_socket, http_socket):
            each.bind(("127.0.0.1", 0))
        grpc_port, http_port = (each.getsockname()[1] for each in (grpc_socket, http_socket))
    ports = ("--grpc-port", str(grpc_port), "--http-port", str(http_port))
    command = [sys.executable, "-m", "labelmint.cli", "serve", *ports, "--log-level", "warning", *arguments]
    with subprocess.Popen(command) as process:
        try:
            served = Served(f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", process.pid)
            with grpc.insecure_channel(served.grpc) as channel:
                grpc.channel_ready_future(channel).result(timeout=START_SECONDS)
            _wait_for_rest(served.http)
            yield served
        finally:
            process.terminate()


def _wait_for_rest(url: str) -> None:
    """Wait until REST answers: its port opens a moment after that of gRPC."""
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


@contextlib.asynccontextmanager
async def samples_of(
    endpoint: str, model: str, options: pb.SampleOptions = RAW
) -> AsyncIterator[Callable[[int], Awaitable[pb.Sample]]]:
    """Yield a function that requests the sample of a seed from a gateway, over one channel."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = pb_grpc.SampleServiceStub(channel)  # type: ignore[no-untyped-call]  # generated, without types

        async def ask(seed: int) -> pb.Sample:
            request = pb.GetSampleRequest(model=model, seed=seed, options=options)
            outcome: pb.GetSampleResponse = await stub.GetSample(request, timeout=PATIENCE_SECONDS)
            return outcome.sample

        yield ask
