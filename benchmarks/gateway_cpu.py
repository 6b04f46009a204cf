"""Measures the gateway's CPU time per sample, against a bare gRPC server that has the same bytes ready.

Rules of this file:
- The figure is user and system CPU seconds of the server's process, as the kernel counts them, per sample that arrived.
  The rate of samples does not matter.
- Behind the gateway is a model of the demo's shapes that computes almost nothing (`null_model.py`). Pixels are raw, and
  rejected samples are delivered too. The bare server (`bare_server.py`) answers the same bytes. As a relay it first
  sends a request to the same Triton, as every gateway in front of Triton must.
- The loads are single calls of 16 callers, batches of 16 from 2 callers, one stream, and 4 streams. Servers and methods
  take turns, each round begins with another server, and a ratio is taken within a round.

Run it as `python benchmarks/gateway_cpu.py` (a minute per round; `--rounds 1` adds one round to the stored ones); it
writes benchmarks/results/gateway_cpu.json and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bare_server
import direct
import floor
import grpc.aio
import load
import null_model
import resuming
from load import spread
from resuming import BUILD, ROOT, Figures, rotated
from serving import PATIENCE_SECONDS, RAW, gateway, samples_of

from labelmint.pipeline import serving
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

RESULTS = ROOT / "benchmarks" / "results" / "gateway_cpu.json"
KEPT = BUILD / "gateway_cpu"
MODEL = null_model.MODEL
GATEWAY, BARE, RELAY = "gateway", "bare", "relay"
SERVERS = (GATEWAY, BARE, RELAY)
SECONDS = 3.0  # of each measurement
WARM_UP = 0.1  # seconds of the warm-up before it, as a share
CALLERS, BATCH_CALLERS, BATCH, STREAMS = 16, 2, 16, 4
BAR = 1.5  # target: at most this many times the bare server's
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A server at an address, in the process `pid`."""

    grpc: str
    pid: int


Count = Callable[[pb_grpc.SampleServiceStub, float], Awaitable[int]]  # samples that arrived in the given seconds


async def singles(stub: pb_grpc.SampleServiceStub, seconds: float) -> int:
    async def ask(seed: int) -> None:
        request = pb.GetSampleRequest(model=MODEL, seed=seed, options=RAW)
        await stub.GetSample(request, timeout=PATIENCE_SECONDS)

    return len((await load.closed(ask, CALLERS, itertools.count(), seconds=seconds)).calls)


async def batches(stub: pb_grpc.SampleServiceStub, seconds: float) -> int:
    async def ask(number: int) -> None:
        seeds = range(number * BATCH, (number + 1) * BATCH)
        await stub.BatchGetSamples(pb.BatchGetSamplesRequest(model=MODEL, seeds=seeds, options=RAW))

    return BATCH * len((await load.closed(ask, BATCH_CALLERS, itertools.count(), seconds=seconds)).calls)


def streams(count: int) -> Count:
    async def read(stub: pb_grpc.SampleServiceStub, index: int, ends: float) -> int:
        call = stub.StreamSamples(
            pb.StreamSamplesRequest(model=MODEL, shard_index=index, shard_count=count, options=RAW)
        )
        samples = 0
        async for message in call:
            samples += message.HasField("sample")
            if time.perf_counter() > ends:
                break
        call.cancel()
        return samples

    async def all_of(stub: pb_grpc.SampleServiceStub, seconds: float) -> int:
        ends = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(read(stub, index, ends) for index in range(count))))

    return all_of


METHODS: dict[str, Count] = {
    f"GetSample, {CALLERS} callers": singles,
    f"BatchGetSamples of {BATCH}, {BATCH_CALLERS} callers": batches,
    "StreamSamples, 1 stream": streams(1),
    f"StreamSamples, {STREAMS} streams": streams(STREAMS),
}


def cpu_seconds(pid: int) -> float:
    """Return the user and system CPU seconds of a process, over all its threads."""
    # The second field is the name in parentheses, which may contain spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def measure(server: Server, count: Count, seconds: float) -> Figures:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        await count(stub, WARM_UP * seconds)
        before, begun = cpu_seconds(server.pid), time.perf_counter()
        samples = await count(stub, seconds)
        elapsed, after = time.perf_counter() - begun, cpu_seconds(server.pid)
    return {"samples": samples, "cpu_seconds": (after - before) / samples, "samples_per_second": samples / elapsed}


@contextlib.contextmanager
def bare(sample: Path, *arguments: str) -> Iterator[Server]:
    command = [sys.executable, bare_server.__file__, str(sample), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(f"127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def null_service() -> AsyncIterator[tuple[str, Path]]:
    """Run a Triton with the null model. Yields its address and the repository."""
    repository = KEPT / "repository"
    null_model.export(repository)
    async with serving(repository, MODEL) as (client, _):
        yield client.url, repository


async def rounds_of(kept: resuming.Kept, rounds: int, seconds: float) -> None:
    async with null_service() as (triton, repository), contextlib.AsyncExitStack() as stack:
        served = stack.enter_context(gateway("--triton-url", triton))
        async with samples_of(served.grpc, MODEL) as ask:
            path = KEPT / "sample.bin"
            path.write_bytes((await ask(0)).SerializeToString())
        servers = {
            GATEWAY: Server(served.grpc, served.pid),
            BARE: stack.enter_context(bare(path)),
            RELAY: stack.enter_context(bare(path, "--relay", triton, "--model-repository", str(repository))),
        }
        for _ in range(rounds):
            index, done = kept.begin(PARTS)
            for method, count in METHODS.items():
                for name in rotated(SERVERS, index):
                    part = part_of(name, method)
                    if part in done:
                        continue
                    kept.keep(index, part, await measure(servers[name], count, seconds))
                    print(f"round {index + 1}, {part}: {1e3 * done[part]['cpu_seconds']:.3f} ms per sample", flush=True)


def part_of(server: str, method: str) -> str:
    return f"{server}: {method}"


PARTS = tuple(part_of(server, method) for method in METHODS for server in SERVERS)


def summary(rounds: list[dict[str, Figures]]) -> Figures:
    """Return medians over the rounds, by method: each server's figures, and the ratios within the rounds."""

    def values(server: str, method: str, key: str) -> list[float]:
        return [each[part_of(server, method)][key] for each in rounds]

    def ratio(one: str, other: str, method: str) -> dict[str, float]:
        pairs = zip(values(one, method, "cpu_seconds"), values(other, method, "cpu_seconds"), strict=True)
        return spread([a / b for a, b in pairs])

    return {
        "rounds": len(rounds),
        "cores": floor.available_cores(),
        "bar": BAR,
        "methods": {
            method: {
                "servers": {
                    server: {key: spread(values(server, method, key)) for key in ("cpu_seconds", "samples_per_second")}
                    for server in SERVERS
                },
                "ratios": {
                    f"{one} to {other}": ratio(one, other, method)
                    for one, other in ((GATEWAY, BARE), (RELAY, BARE), (GATEWAY, RELAY))
                },
            }
            for method in METHODS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds to add to the stored ones")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds of each measurement")
    arguments = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    files = [*resuming.serving_code(), *(Path(each.__file__) for each in (bare_server, direct, load, null_model))]
    kept = resuming.Kept("gateway_cpu", resuming.digest_of(files, arguments.seconds))
    asyncio.run(rounds_of(kept, arguments.rounds, arguments.seconds))
    found = summary(kept.complete(PARTS))
    resuming.write(RESULTS, found)
    for method, each in found["methods"].items():
        cells = ", ".join(f"{name} {1e3 * x['cpu_seconds']['median']:.3f} ms" for name, x in each["servers"].items())
        ratios = ", ".join(f"{name} {x['median']:.2f}" for name, x in each["ratios"].items())
        print(f"{method}: {cells}; {ratios}")
    print(f"in {found['rounds']} rounds; target: gateway to bare at most {BAR}")


if __name__ == "__main__":
    main()
