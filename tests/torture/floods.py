"""Floods: many times the gateway's capacity, from clients that read slowly, disconnect or send incomplete requests.

Rules of this file:
- Triton has the last core for itself, and the gateway shares the others with the clients, like separate nodes in k8s/.
  So the cost of refusing depends on the gateway, and not on the scheduling of a core.
- Capacity is measured first, in a closed loop on the same gateway. Then arrivals come at a fixed rate.
- The steady state before the flood has the same clients at the gateway's pace: after batches of all sizes, with the
  flood's streams, slow readers and half-open connections, and a closed loop of REST and gRPC requests.
- An arrival ends with an answer, an explicit refusal, or its client's disconnect. Anything else is a finding.
- Goodput, memory and latency are returned as figures. They can be judged only on an idle machine (`Flood.judge`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import httpx
import numpy as np

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service, start_service
from tests.support.memory import memory
from tests.support.metrics import DEMAND, IN_TRITON, metric_of
from tests.support.processes import descendants
from tests.support.waiting import until

OPTIONS = pb.SampleOptions(max_js=1e9)
DEADLINE_SECONDS = 60.0
MAX_IN_FLIGHT = 32  # admitted requests: their wait is well below the deadline even at one sample per second
CLOSED_LOOP = 32  # concurrent requests: enough to keep Triton's batches full
WARM_LOOPS = 2 * (1, 2, 3, 5, 8, 13, 21, 32)
STREAMS = 8
SLOW_READERS = 4
SLOW_READER_PAUSE_SECONDS = 5.0
# Otherwise a channel reads megabytes ahead, and it takes minutes until backpressure reaches the gateway.
SLOW_READER_CHANNEL = (("grpc.http2.bdp_probe", 0),)
HALF_OPEN = 20
HALF_SENTENCES = (
    b"",
    b"GET /v1/models HT",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0",
    b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\n{",
)
Row = tuple[str, str]
Door = Callable[[], Awaitable[str]]  # sends one request over REST or gRPC and returns its result


@dataclass
class Flood:
    """The results of a flood: rates in samples per second, latencies in seconds, memory in megabytes by process."""

    arrivals_per_second: float = 0.0
    capacity: float = 0.0
    goodput: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    memory_before: dict[str, float] = field(default_factory=dict)
    memory_most: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def rows(self) -> list[Row]:
        told = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        latency = ", ".join(f"p{q} {np.percentile(self.latencies, q):.1f} s" for q in (50, 95, 100))
        memory = ", ".join(f"{n} {b:.0f} to {self.memory_most[n]:.0f} MB" for n, b in self.memory_before.items())
        return [
            ("arrivals", f"{self.arrivals_per_second:.1f} per second, {told}"),
            ("goodput", f"{self.goodput:.2f} samples/s of {self.capacity:.2f}, {self.goodput / self.capacity:.0%}"),
            ("latency of what was admitted", latency),
            ("resident memory at most", memory),
        ]

    def judge(self) -> list[str]:
        """Return the findings, and the missed targets, which need an idle machine."""
        judged = list(self.findings)
        if self.goodput < 0.9 * self.capacity:
            judged.append(f"goodput is {self.goodput / self.capacity:.0%} of the capacity, not 90 %")
        for name, before in self.memory_before.items():
            if self.memory_most[name] > 1.1 * before:
                judged.append(f"{name} grew from {before:.0f} to {self.memory_most[name]:.0f} MB")
        return judged


async def flood(directory: Path, seconds: float, factor: float = 10.0, warm_loops: Sequence[int] = WARM_LOOPS) -> Flood:
    """Flood a gateway of the demo for `seconds` with `factor` times its capacity.

    Before that, closed loops of `warm_loops` callers bring its memory to a steady state, for figures to be judged.
    """
    service = await asyncio.to_thread(start_service, directory / "serve.log", "--max-in-flight", str(MAX_IN_FLIGHT))
    found = Flood()
    cores = os.sched_getaffinity(0)
    try:
        separate(service)
        async with (
            grpc.aio.insecure_channel(service.grpc) as channel,
            httpx.AsyncClient(base_url=service.http, timeout=DEADLINE_SECONDS) as http,
        ):
            attack = _Attack(service, pb_grpc.SampleServiceStub(channel), http, found)
            for callers in warm_loops:
                await attack.closed_loop(seconds / 6 / len(warm_loops), callers)
            found.capacity = await attack.closed_loop(seconds / 6)
            found.arrivals_per_second = factor * found.capacity
            async with attack.company():
                await attack.closed_loop(seconds / 6)
                found.memory_before = memory_of_all(service)
                await attack.run(seconds)
            await attack.everything_is_as_before()
    finally:
        os.sched_setaffinity(0, cores)
        assert await asyncio.to_thread(service.stop) == 0
    if "Traceback" in service.log.read_text():
        found.findings.append("a traceback in the log")
    return found


def separate(service: Service) -> None:
    """Pin Triton's processes to the last available core, and the gateway and this thread to the others, if any."""
    *shared, last = sorted(os.sched_getaffinity(0))
    if not shared:
        return
    os.sched_setaffinity(0, shared)
    cores = {service.process.pid: shared} | {pid: [last] for pid in descendants(service.process.pid)}
    for pid, some in cores.items():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), some)


def memory_of_all(service: Service) -> dict[str, float]:
    """Return the resident megabytes of the gateway, Triton and Triton's model processes."""
    found: dict[str, float] = {}
    for pid in sorted({service.process.pid, *descendants(service.process.pid)}):
        name = "gateway" if pid == service.process.pid else Path(f"/proc/{pid}/comm").read_text().strip()
        found[f"{name} {len([n for n in found if n.startswith(name)])}"] = memory(pid)
    return found


async def _answered(door: Door) -> None:
    """Send a request that must not be refused."""
    outcome = await door()
    assert outcome == "answered", outcome


class _Attack:
    def __init__(
        self, service: Service, stub: pb_grpc.SampleServiceStub, http: httpx.AsyncClient, found: Flood
    ) -> None:
        self._service = service
        self._stub = stub
        self._http = http
        self._found = found
        self._draw = random.Random(0)
        self._seeds = iter(range(2**32))
        self._minted = 0
        self._doors: tuple[Door, Door] = (self._unary, self._rest)

    async def closed_loop(self, seconds: float, callers: int = CLOSED_LOOP) -> float:
        """Return samples per second of a closed loop of callers, half over REST and half over gRPC."""
        end = time.monotonic() + seconds
        done = 0

        async def ask(door: Door) -> None:
            nonlocal done
            while time.monotonic() < end:
                await _answered(door)
                done += 1

        began = time.monotonic()
        await asyncio.gather(*(ask(self._doors[number % 2]) for number in range(callers)))
        return done / (time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def company(self) -> AsyncIterator[None]:
        """Run streams, some of them with slow readers, and half-open connections."""
        async with self._half_open():
            streams = [asyncio.create_task(self._stream(self._stub, 0.0)) for _ in range(STREAMS)]
            streams += [asyncio.create_task(self._slow_stream()) for _ in range(SLOW_READERS)]
            try:
                yield
            finally:
                await self._end(*streams)

    async def run(self, seconds: float) -> None:
        found = self._found
        arrivals: set[asyncio.Task[None]] = set()
        watching = asyncio.create_task(self._watch_memory())
        began, minted_before = time.monotonic(), self._minted
        for number in range(int(seconds * found.arrivals_per_second)):
            await asyncio.sleep(max(0.0, began + number / found.arrivals_per_second - time.monotonic()))
            arrival = asyncio.create_task(self._arrival())
            arrivals.add(arrival)
            arrival.add_done_callback(arrivals.discard)
        found.goodput = (self._minted - minted_before) / (time.monotonic() - began)
        await asyncio.gather(*arrivals)
        await self._end(watching)

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        """Cancel tasks that would not end otherwise, and wait for them."""
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(error, asyncio.CancelledError):
                self._found.findings.append(f"a stream or the watch ended with {error!r}")

    async def everything_is_as_before(self) -> None:
        """Check that no work is left, and that a request is answered at once."""

        async def nothing_is_left() -> bool:
            return await metric_of(self._http, DEMAND) == 0 and await metric_of(self._http, IN_TRITON) == 0

        try:
            await until(nothing_is_left)
        except AssertionError:
            self._found.findings.append("work is left after the flood")
        for door in self._doors:
            await _answered(door)

    async def _arrival(self) -> None:
        kind = self._draw.choice(("unary", "unary", "rest"))
        asked = self._unary() if kind == "unary" else self._rest()
        patience = self._draw.uniform(0.0, 2.0) if self._draw.random() < 0.1 else None
        began = time.monotonic()
        try:
            outcome = await asyncio.wait_for(asked, patience)
        except asyncio.TimeoutError:
            outcome = "vanished"
        self._found.outcomes[outcome] += 1
        if outcome == "answered":
            self._minted += 1
            self._found.latencies.append(time.monotonic() - began)
        elif outcome not in ("refused", "vanished"):
            self._found.findings.append(f"{kind}: {outcome}")

    async def _unary(self) -> str:
        request = pb.GetSampleRequest(model="faces", seed=next(self._seeds), options=OPTIONS)
        try:
            await self._stub.GetSample(request, timeout=DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            return "refused" if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else str(error.code())
        return "answered"

    async def _rest(self) -> str:
        try:
            answer = await self._http.get(f"/v1/models/faces/samples/{next(self._seeds)}?max_js=1e9")
        except httpx.HTTPError as error:
            return repr(error)
        if answer.status_code == 429:
            return "refused" if "retry-after" in answer.headers else "429 without retry-after"
        return "answered" if answer.status_code == 200 else f"HTTP {answer.status_code}"

    async def _slow_stream(self) -> None:
        async with grpc.aio.insecure_channel(self._service.grpc, options=SLOW_READER_CHANNEL) as channel:
            await self._stream(pb_grpc.SampleServiceStub(channel), SLOW_READER_PAUSE_SECONDS)

    async def _stream(self, stub: pb_grpc.SampleServiceStub, pause_seconds: float) -> None:
        start = self._draw.randrange(2**31)
        request = pb.StreamSamplesRequest(model="faces", start_seed=start, window=16, options=OPTIONS)
        call = stub.StreamSamples(request)
        try:
            async for message in call:
                self._minted += message.HasField("sample")
                if pause_seconds:
                    await asyncio.sleep(pause_seconds)
        finally:
            call.cancel()

    async def _watch_memory(self) -> None:
        most = self._found.memory_most
        while True:
            for name, megabytes in memory_of_all(self._service).items():
                most[name] = max(most.get(name, 0.0), megabytes)
            await asyncio.sleep(1.0)

    @contextlib.asynccontextmanager
    async def _half_open(self) -> AsyncIterator[None]:
        """Open connections to REST and gRPC whose clients stop in the middle of a request."""
        sockets = []
        try:
            for number in range(HALF_OPEN):
                door = (self._service.grpc, self._service.http)[number % 2].rpartition("/")[2]
                host, _, port = door.rpartition(":")
                sockets.append(socket.create_connection((host, int(port))))
                sockets[-1].sendall(HALF_SENTENCES[number // 2 % len(HALF_SENTENCES)])
            yield
        finally:
            for each in sockets:
                each.close()
