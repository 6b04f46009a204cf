"""What ends a child is noticed, whatever it leaves behind; programs that misbehave stand in for Triton."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from labelmint.gateway.metrics import Metrics
from labelmint.gateway.own_triton import OwnTriton
from labelmint.triton import server
from labelmint.triton.server import TritonServer
from tests.conftest import REPOSITORY
from tests.triton.test_die_with_parent import running

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


async def test_a_start_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(HANGS_FROM_THE_SECOND_START_ON)
    monkeypatch.setattr(server, "DIE_WITH_PARENT", program)
    monkeypatch.setattr(server, "START_TIMEOUT_SECONDS", 0.5)
    triton = OwnTriton(REPOSITORY, "fused", None, "")
    with pytest.raises(server.TritonUnavailable):
        await triton.start(asyncio.Event())
    registry = CollectorRegistry()
    triton.supervise(Metrics(registry))
    while (registry.get_sample_value("labelmint_triton_restarts_total") or 0) < 2:
        await asyncio.sleep(0.1)
    first, second, *_ = map(int, program.with_suffix(".pids").read_text().split())
    assert not running(first) and not running(second)
    await triton.stop()


def test_no_outgoing_connection_takes_the_ports_while_triton_is_away(tmp_path: Path) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    triton = TritonServer(tmp_path, [])
    for url in (triton.grpc_url, triton.metrics_url.removeprefix("http://").removesuffix("/metrics")):
        assert int(url.rpartition(":")[2]) < first
