"""The attacks of tests/torture on both doors, briefly; `make torture` runs them at full length."""

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc.aio
import pytest

from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import Service
from tests.support.gateways import Gateway
from tests.support.memory import memory
from tests.support.waiting import wait_for
from tests.support.wire import info_of
from tests.torture import grpc_bytes, grpc_messages, http_bytes
from tests.torture import outcome as torture_outcome
from tests.torture.outcome import Outcome, Watch

pytestmark = [pytest.mark.triton, pytest.mark.torch]


def check(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.tries and not outcome.findings, outcome


async def test_spoiled_messages_are_their_senders_error(gateway: Gateway) -> None:
    check(await grpc_messages.fuzz(gateway.service, "light", 150))


async def test_broken_framing_and_bombs_are_refused(gateway: Gateway) -> None:
    check(await grpc_bytes.abuse(gateway.service, "light", 1))


async def test_memory_of_a_peak_goes_back(gateway: Gateway) -> None:
    """Each of these floods of calls finds other arenas of the allocator, and without an end to that 40 MB more."""
    watch, outcome = Watch(gateway.service), Outcome("floods of open streams")
    frames = grpc_bytes.floods()["a thousand streams"]
    for _ in range(4):
        await asyncio.gather(*(grpc_bytes.flood(gateway.service.grpc, frames) for _ in range(20)))
        outcome.tries += 1
    watch.look(outcome)
    check([outcome])


async def test_broken_http_is_refused(gateway: Gateway) -> None:
    check(await http_bytes.abuse(gateway.service, "light", 50))


async def test_what_cannot_be_parsed_is_an_invalid_request(gateway: Gateway) -> None:
    """On every kind of method, those of health and reflection too."""
    async with grpc.aio.insecure_channel(gateway.service.grpc) as channel:
        for path, method in grpc_messages.methods().items():
            code, details = await grpc_messages.ask(channel, path, method, b"\x0a\xff", ())
            assert code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith("message: cannot be parsed"), path
        call = channel.unary_unary("/labelmint.v1.SampleService/GetModel")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a\x02\xff\xfe")
        assert info_of(caught.value).reason == "INVALID_REQUEST"


def test_a_watch_sees_what_it_is_for(tmp_path: Path, gateway: Gateway) -> None:
    """An attack that finds nothing means something only where there is something to be found."""
    log = tmp_path / "log"
    log.write_text("labelmint: as usual\n")
    watched = Service(gateway.service.process, "", "", log)
    watch, outcome = Watch(watched), Outcome("none")
    watch.look(outcome)
    assert not outcome.findings
    log.write_text(log.read_text() + "Traceback (most recent call last):\n  File x\nValueError: y\n")
    watch.look(outcome)
    assert outcome.findings == ["traceback in the log: ValueError: y"]


def test_a_watch_sees_a_process_grow_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture_outcome, "PAUSE_SECONDS", 0.1)
    log = tmp_path / "log"
    log.touch()
    script = "input(); grown = b'x' * (200 << 20); print(flush=True); input()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        wait_for(lambda: memory(process.pid) > 5)  # it has begun
        watch = Watch(Service(process, "", "", log))
        process.stdin.write("\n")
        process.stdout.readline()
        grown = Outcome("grown")
        watch.look(grown)
        assert len(grown.findings) == 1 and grown.findings[0].startswith("memory grew from ")
        process.stdin.write("\n")
        process.wait(60)
        ended = Outcome("ended")
        watch.look(ended)
        assert ended.findings == ["the gateway ended with 0"]


def test_the_attack_covers_our_service() -> None:
    ours = {
        f"/labelmint.v1.SampleService/{name}"
        for name in pb.DESCRIPTOR.services_by_name["SampleService"].methods_by_name
    }
    assert ours <= grpc_messages.methods().keys()
