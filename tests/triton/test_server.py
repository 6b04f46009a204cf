"""What ends a child is noticed, whatever it leaves behind; programs that misbehave stand in for Triton."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from labelmint.core.errors import TritonUnavailable
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.triton import server
from labelmint.triton.client import TritonClient
from labelmint.triton.server import TritonServer, wait_until_ready
from tests.conftest import REPOSITORY
from tests.support.processes import running
from tests.support.waiting import until

pytestmark = pytest.mark.triton


LEAVES_A_PROCESS = """
import subprocess, sys
print(subprocess.Popen(["sleep", "1000"]).pid, flush=True)
sys.exit(3)
"""
HANGS_FROM_THE_SECOND_START_ON = """
import os, pathlib, time
pids = pathlib.Path(__file__).with_suffix(".pids")
first = not pids.exists()
with pids.open("a") as file:
    print(os.getpid(), file=file)
time.sleep(0 if first else 1000)
"""


# As ONNX Runtime warns on the terminal; then an operator, or the kernel, ends Triton.
WARNS_AND_IS_KILLED = r"""
import os
print("\x1b[0;93m2026-11-28 [W:onnxruntime:, graph.cc:118] a warning of nothing\x1b[m", flush=True)
{more}
os.kill(os.getpid(), {number})
"""
ERROR = """print('\x1b[0;31mE1128 02:00:00.000001 77 a.cc:1] "out of luck"\x1b[m', flush=True)"""


@pytest.mark.parametrize(
    ("number", "more", "said"),
    [
        (9, "", "Triton was killed by SIGKILL"),
        (9, ERROR, "Triton was killed by SIGKILL. Its last error: out of luck; --triton-log FILE keeps the whole log"),
        (35, "", "Triton was killed by signal 35"),
        (0, "", "Triton ended with exit code 0"),
    ],
)
async def test_the_signal_is_the_cause_and_no_warning_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, more: str, said: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(WARNS_AND_IS_KILLED.format(number=number, more=more))
    monkeypatch.setattr(server, "DIE_WITH_PARENT", program)
    triton = TritonServer(tmp_path, [])
    await triton.start()
    await asyncio.wait_for(triton.wait(), 60)
    assert await triton.explain_end() == said
    await triton.stop()


ABORTS_AT_THE_FIRST_STARTS = r"""
import os, pathlib, time
starts = pathlib.Path(__file__).with_suffix(".starts")
with starts.open("a") as file:
    file.write("x")
if len(starts.read_text()) <= {aborts}:
    print("terminate called after throwing an instance of 'boost::interprocess::lock_exception'", flush=True)
    print("  what():  {said}", flush=True)
    os.abort()
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("aborts", "said", "starts"),
    [
        (2, "boost::interprocess::lock_exception", 3),
        (9, "boost::interprocess::lock_exception", 3),
        (1, "out of luck", 1),
    ],
)
async def test_a_start_that_waited_too_long_for_a_lock_is_repeated_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, aborts: int, said: str, starts: int
) -> None:
    program = tmp_path / "program.py"
    program.write_text(ABORTS_AT_THE_FIRST_STARTS.format(aborts=aborts, said=said))
    monkeypatch.setattr(server, "DIE_WITH_PARENT", program)
    counted, stop = program.with_suffix(".starts"), asyncio.Event()
    triton = TritonServer(REPOSITORY, ["faces"])
    await triton.start()
    waiting = asyncio.ensure_future(wait_until_ready(triton, stop))
    if starts > aborts:  # the last start hangs, and is waited for
        await until(lambda: counted.exists() and len(counted.read_text()) == starts and triton.running)
        assert not waiting.done()
        stop.set()
        await asyncio.wait_for(waiting, 60)
    else:
        with pytest.raises(TritonUnavailable, match=said):
            await asyncio.wait_for(waiting, 60)
    assert len(counted.read_text()) == starts
    await triton.stop()


async def test_the_watch_over_triton_does_not_end_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something that nobody thought of: it is logged, and Triton is started again all the same."""
    program = tmp_path / "program.py"
    program.write_text(HANGS_FROM_THE_SECOND_START_ON)
    monkeypatch.setattr(server, "DIE_WITH_PARENT", program)
    explain, raised = TritonServer.explain_end, []

    async def explain_end(self: TritonServer) -> str:
        if not raised:
            raised.append(True)
            raise RuntimeError("nobody thought of this")
        return await explain(self)

    triton = OwnTriton(ServeSettings(model_repository=REPOSITORY))
    await triton.server.start()
    monkeypatch.setattr(TritonServer, "explain_end", explain_end)
    registry = CollectorRegistry()
    triton.supervise(Metrics(registry), catalog_of(triton))
    await until(lambda: registry.get_sample_value("labelmint_triton_restarts_total"))
    assert caplog.text.count("the supervision of Triton failed") == 1 and "nobody thought of this" in caplog.text
    await triton.stop()


async def test_the_end_of_the_child_is_seen_while_its_output_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(LEAVES_A_PROCESS)
    monkeypatch.setattr(server, "DIE_WITH_PARENT", program)
    triton = TritonServer(tmp_path, [], tmp_path / "log")
    await triton.start()
    assert await asyncio.wait_for(triton.wait(), 60) == 3
    left = int((tmp_path / "log").read_text())
    assert running(left)
    await triton.stop()
    assert not running(left)


def catalog_of(triton: OwnTriton) -> Catalog:
    return Catalog(TritonClient(triton.server.grpc_url), "fused")


async def test_a_start_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(HANGS_FROM_THE_SECOND_START_ON)
    monkeypatch.setattr(server, "DIE_WITH_PARENT", program)
    monkeypatch.setattr(server, "START_TIMEOUT_SECONDS", 0.5)
    triton = OwnTriton(ServeSettings(model_repository=REPOSITORY))
    with pytest.raises(server.TritonUnavailable):
        await triton.start(asyncio.Event())
    registry = CollectorRegistry()
    triton.supervise(Metrics(registry), catalog_of(triton))

    def begun() -> list[int]:  # on a busy machine a start may be given up before it has written this
        return [int(pid) for pid in program.with_suffix(".pids").read_text().split()]

    await until(lambda: (registry.get_sample_value("labelmint_triton_restarts_total") or 0) >= 2 and len(begun()) > 2)
    first, second, *_ = begun()
    assert not running(first) and not running(second)
    await triton.stop()


def test_no_outgoing_connection_takes_the_ports_while_triton_is_away(tmp_path: Path) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    triton = TritonServer(tmp_path, [])
    for url in (triton.grpc_url, triton.metrics_url.removeprefix("http://").removesuffix("/metrics")):
        assert int(url.rpartition(":")[2]) < first
