"""Starting, losing Triton, and ending: with real processes and real signals."""

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2

from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import REPOSITORY, start_service
from tests.support.metrics import metric
from tests.support.processes import alive, descendants, refused_start, regions, triton_pid
from tests.support.waiting import until, wait_for
from tests.support.wire import health_of, pause_of

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SAMPLE = "/v1/models/tiny/samples/7.npz?max_js=1e9"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(tmp_path: Path, tiny_repository: Path, number: int) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    processes, shared = descendants(service.process.pid), regions(service)
    assert len(processes) >= 3 and shared  # Triton and one process a step
    assert service.stop(number) == 0
    assert alive(processes) == set()
    assert not any(region.exists() for region in shared)
    log = service.log.read_text()
    assert "curl -so pair.png" in log and log.endswith("labelmint: stopping\n")


def test_a_killed_gateway_takes_triton_with_it(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    processes = descendants(service.process.pid)
    assert len(processes) >= 3
    service.stop(signal.SIGKILL)
    wait_for(lambda: not alive(processes))


def test_a_killed_triton_is_started_again(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    killed = triton_pid(service)

    def next_triton() -> int | None:
        with contextlib.suppress(ValueError, OSError):  # there is none yet
            return triton_pid(service) if triton_pid(service) != killed else None
        return None

    try:
        with httpx.Client(base_url=service.http, timeout=60.0) as http:
            before = http.get(SAMPLE)
            assert before.status_code == 200
            wait_for(lambda: health_of(service) == health_pb2.HealthCheckResponse.SERVING)
            os.kill(killed, signal.SIGKILL)
            following = wait_for(next_triton)
            assert following is not None
            os.kill(following, signal.SIGSTOP)  # it is not ready before we have looked
            wait_for(lambda: http.get("/readyz").status_code == 503)
            assert http.get("/healthz").status_code == 200
            wait_for(lambda: health_of(service) == health_pb2.HealthCheckResponse.NOT_SERVING)
            assert http.get(SAMPLE).status_code == 503
            os.kill(following, signal.SIGCONT)
            wait_for(lambda: http.get("/readyz").status_code == 200)
            after = http.get(SAMPLE)
            assert after.status_code == 200 and after.content == before.content
            wait_for(lambda: health_of(service) == health_pb2.HealthCheckResponse.SERVING)
            assert metric(http, "labelmint_triton_restarts_total") == 1
        assert "starting Triton again in" in service.log.read_text()
    finally:
        service.stop()


async def test_an_external_triton_comes_and_goes(tmp_path: Path, tiny_repository: Path) -> None:
    triton = TritonServer(tiny_repository, ["tiny"])
    await triton.start()
    try:
        await wait_until_ready(triton)
        service = await asyncio.to_thread(
            start_service, tmp_path / "serve.log", "--triton-url", triton.grpc_url, repository=tmp_path / "unused"
        )
        try:
            async with httpx.AsyncClient(base_url=service.http, timeout=30.0) as http:
                assert (await http.get(SAMPLE)).status_code == 200
                await triton.stop()
                # Alive, but not ready: starting the gateway again would not bring Triton back.
                assert (await http.get("/healthz")).status_code == 200
                for path in ("/readyz", SAMPLE, "/v1/models"):
                    answer = await http.get(path)
                    assert answer.status_code == 503, path
                    assert answer.json()["reason"] == "TRITON_UNAVAILABLE"
                    assert answer.headers["retry-after"] == "2"
                with grpc.insecure_channel(service.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
                    pb_grpc.SampleServiceStub(channel).GetSample(pb.GetSampleRequest(model="tiny", seed=1))
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert pause_of(caught.value) == 2
                await triton.start()

                async def ready() -> bool:
                    return (await http.get("/readyz")).status_code == 200

                await until(ready)
                assert (await http.get(SAMPLE)).status_code == 200
        finally:
            assert await asyncio.to_thread(service.stop) == 0
    finally:
        await triton.stop()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))


def test_damaged_repositories_are_named(tmp_path: Path, copy: Path) -> None:
    missing = tmp_path / "nothing"
    assert f"{missing} is not a directory" in refused_start("--model-repository", str(missing))
    (tmp_path / "empty").mkdir()
    assert "holds no labelmint ensemble" in refused_start("--model-repository", str(tmp_path / "empty"))
    model = copy / "faces_generator" / "1" / "model.onnx"
    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])
    assert f"{model} is cut off or damaged" in refused_start("--model-repository", str(copy))
    spoiled = bytearray(data)
    spoiled[len(data) // 2] ^= 1  # amid a weight
    model.write_bytes(spoiled)
    assert "a file is damaged or was replaced" in refused_start("--model-repository", str(copy))
    model.unlink()
    assert f"{model} is missing" in refused_start("--model-repository", str(copy))
    config = copy / "faces" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size", "max_bach_size"))
    assert "config.pbtxt is not a Triton model configuration" in refused_start("--model-repository", str(copy))


def test_what_triton_refuses_is_told_in_its_own_words(copy: Path) -> None:
    config = copy / "faces_generator" / "config.pbtxt"
    config.write_text(config.read_text().replace('"crossover"', '"nonesuch"'))
    said = refused_start("--model-repository", str(copy))
    assert "Triton could not load the model repository" in said and "nonesuch" in said
