"""Faults: kills, cuts or fills up everything between a client and its samples; no sample may be lost or duplicated.

Rules of this file:
- The times of faults come from a fixed seed and are counted in samples. The next fault waits until the stream has
  recovered from the last one. A killed gateway is restarted on its port, as Kubernetes would do.
- One SHA-256 over seed, score, image and label of every sample is compared with that of an undisturbed stream.
- A limit on the file size replaces a full disk, because the same calls then fail in the same way.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from labelmint_client import Client, Sample, SampleOptions
from labelmint_client.pull import PullOptions, verify
from tests.conftest import ROOT, Service, start_service
from tests.support.files import contents
from tests.support.processes import triton_pid

ANY = SampleOptions(max_js=1e9)
Row = tuple[str, str]


class Proxy:
    """A TCP relay on its own port, whose connections can all be cut at once."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._relay, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection."""
        self._loop.call_soon_threadsafe(self._abort)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _abort(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._abort()  # asyncio logs a cancelled relay, but not one whose connections are gone
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, to_writer}
        self._open |= ends
        await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer), return_exceptions=True)
        self._open -= ends


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


class Healing(logging.Handler):
    """Counts how often the client logs that a stream resumes."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.times += "resumes at seed" in record.getMessage()


@contextmanager
def healing() -> Iterator[Healing]:
    handler = Healing()
    logger = logging.getLogger("labelmint_client")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def median_gate(endpoint: str) -> SampleOptions:
    """Return options with a gate that accepts half of the samples of `tiny`."""
    with Client(endpoint) as client:
        scores = sorted(sample.js_score for sample in client.batch_get_samples("tiny", range(64), ANY))
    return SampleOptions(max_js=scores[32])


def digest(samples: Iterable[Sample]) -> str:
    """Return one SHA-256 of all samples in their order."""
    found = hashlib.sha256()
    for sample in samples:
        assert sample.image is not None and sample.label is not None
        found.update(f"{sample.seed} {sample.js_score!r} ".encode())
        found.update(sample.image.tobytes())
        found.update(sample.label.tobytes())
    return found.hexdigest()


class Stage:
    """A gateway that starts a Triton with `tiny`, and a proxy in front of it."""

    def __init__(self, directory: Path, repository: Path) -> None:
        self._directory = directory
        self._repository = repository
        self._starts = itertools.count()
        self._starting = threading.Lock()
        self.service = self._start("0")
        self.proxy = Proxy(self.service.grpc)
        self.faults: dict[str, Callable[[], None]] = {
            "Triton killed": self._kill_triton,
            "gateway killed": self._restart_gateway,
            "connections cut": self.proxy.cut,
        }

    def close(self) -> None:
        self.proxy.close()
        with self._starting:
            assert self.service.stop() == 0, self.service.log.read_text()

    def _start(self, port: str) -> Service:
        log = self._directory / f"serve_{next(self._starts)}.log"
        return start_service(log, "--grpc-port", port, repository=self._repository)

    def _kill_triton(self) -> None:
        with self._starting:  # a gateway answers before `_start` returns, and before `service` is the new one
            os.kill(triton_pid(self.service), signal.SIGKILL)

    def _restart_gateway(self) -> None:
        self.service.stop(signal.SIGKILL)

        def start() -> None:
            with self._starting:
                self.service = self._start(self.service.grpc.rpartition(":")[2])

        threading.Thread(target=start).start()


def survive(directory: Path, repository: Path, samples: int, kinds: Sequence[str], pulled: int) -> list[Row]:
    """Stream `samples` samples of `tiny` through faults of these kinds, and pull `pulled` meanwhile with a full disk.

    Raises AssertionError if a sample is lost, duplicated or changed. Returns a row for each event.
    """
    stage = Stage(directory, repository)
    rows = []
    try:
        endpoint = stage.proxy.address
        gate = median_gate(endpoint)
        with Client(endpoint) as client, client.stream_samples("tiny", options=gate, count=samples) as stream:
            started = time.monotonic()
            undisturbed = digest(stream)
            rows.append(("undisturbed walk", f"{samples} samples, {time.monotonic() - started:.1f} s"))
        wanted = PullOptions("tiny", pulled, "webdataset", samples_per_shard=max(1, pulled // 10), sample=gate)
        assert pull_with(endpoint, directory / "whole", wanted).returncode == 0

        draw = random.Random(len(kinds))
        moments = sorted(draw.randrange(samples // 20, samples * 19 // 20) for _ in kinds)
        plan = list(zip(moments, draw.sample(list(kinds), len(kinds)), strict=True))
        with healing() as healed, ThreadPoolExecutor() as pool, Client(endpoint) as client:
            pulling = pool.submit(pull_on_a_full_disk, endpoint, directory / "pulled", wanted)

            def disturbed() -> Iterator[Sample]:
                fault, began = "", 0.0
                for count, sample in enumerate(client.stream_samples("tiny", options=gate, count=samples)):
                    if fault and healed.times:
                        rows.append((fault, f"back after {time.monotonic() - began:.2f} s"))
                        fault = ""
                    if plan and not fault and count >= plan[0][0]:
                        kind = plan.pop(0)[1]
                        fault, began, healed.times = f"{kind}, at sample {count}", time.monotonic(), 0
                        stage.faults[kind]()
                    yield sample
                assert not plan and not fault, "the walk ended before its faults"

            assert digest(disturbed()) == undisturbed, "the walk with faults gave other samples"
            rows.append((f"stream through {len(kinds)} faults", "0 lost, 0 doubled, the same SHA-256"))
            rows.append(("full disk", pulling.result()))
        assert contents(directory / "pulled") == contents(directory / "whole"), "the pull wrote other bytes"
        with Client(endpoint) as client:
            report = verify(directory / "pulled", client, 50)
        assert not report.problems, report.problems
        rows.append(("pull through the same faults", f"{pulled} samples, the same bytes, verified"))
    finally:
        stage.close()
    return rows


def pull_with(endpoint: str, out: Path, options: PullOptions, *limits: str) -> subprocess.CompletedProcess[str]:
    command = [*limits, sys.executable, "-m", "tests.support.killed_pull", endpoint, str(out)]
    command += [json.dumps(options.to_json()), "0"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def pull_on_a_full_disk(endpoint: str, out: Path, options: PullOptions) -> str:
    full = pull_with(endpoint, out, options, "bash", "-c", 'ulimit -f 4; exec "$@"', "limited")  # KiB
    said = full.stderr.splitlines()[-1]
    assert full.returncode == 1 and "File too large; completed shards are kept" in said, full.stderr
    done = pull_with(endpoint, out, options)
    assert done.returncode == 0, done.stderr
    return "one line, then the pull went on"


def rolling_restart(start: Callable[..., Service], gate: SampleOptions, rounds: int) -> list[Row]:
    """Restart two gateways behind one client, one after the other, during single requests and two streams.

    `start(*arguments)` starts a gateway. Raises the first error of a request or a stream.
    """
    services = [start(), start()]
    over = threading.Event()

    def ask(client: Client) -> int:
        for number in itertools.count():
            if over.is_set():
                return number
            client.get_sample("tiny", number % 64, ANY)
        raise AssertionError

    def walk(client: Client, shard: int) -> list[int]:
        with closing(client.stream_samples("tiny", options=gate, shard_index=shard, shard_count=2)) as stream:
            return [sample.seed for sample in itertools.takewhile(lambda _: not over.is_set(), stream)]

    with Client([service.grpc for service in services]) as client, ThreadPoolExecutor() as pool:
        requests = [pool.submit(ask, client) for _ in range(2)]
        walks = [pool.submit(walk, client, shard) for shard in range(2)]
        try:
            for place in [0, 1] * rounds:
                assert services[place].stop() == 0
                services[place] = start("--grpc-port", services[place].grpc.rpartition(":")[2])
        finally:
            over.set()
        asked = sum(request.result(60) for request in requests)
        seeds = [walk.result(60) for walk in walks]
    assert asked > 0
    with Client(services[0].grpc) as client:
        for shard, found in enumerate(seeds):
            alone = client.stream_samples("tiny", options=gate, shard_index=shard, shard_count=2, count=len(found))
            assert [sample.seed for sample in alone] == found
    answered = f"{asked} requests and {sum(map(len, seeds))} streamed samples, 0 failed"
    return [(f"rolling restart of 2 gateways, {rounds} times", answered)]
