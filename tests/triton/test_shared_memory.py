"""A /dev/shm that is too small, or full while the service runs: not ready or as before, and one line says why.

Each has a /dev/shm of its own, in a mount namespace.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import grpc
import httpx
import pytest

from labelmint.triton.model_config import read_config
from labelmint.triton.shared_memory import bytes_of
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import start_service
from tests.support.processes import refused_start, triton_pid
from tests.support.repositories import add
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ALL = pb.SampleOptions(max_js=1e9)


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """What gives a command a mount namespace, which only some may have."""
    command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    try:
        done = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed (package util-linux)")
    if done.returncode != 0:
        pytest.skip(f"this user may not mount a /dev/shm of its own: {done.stderr.strip()}")
    return command


def with_room(unshare: list[str], size: int) -> list[str]:
    """A command's /dev/shm of so many bytes, in whole pages."""
    mounted = f'mount -t tmpfs -o size={math.ceil(size / 4096) * 4}k tmpfs /dev/shm && exec "$@"'
    return [*unshare, "sh", "-c", mounted, "sh"]


def needed(repository: Path, *models: str) -> int:
    steps = [f"{model}_{step}" for model in models for step in ("generator", "style_interpreter")]
    return sum(bytes_of(read_config(repository / step / "config.pbtxt")) for step in steps)


def code_of(stub: pb_grpc.SampleServiceStub, request: pb.BatchGetSamplesRequest) -> grpc.StatusCode:
    """How the service answers."""
    try:
        stub.BatchGetSamples(request)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_too_little_is_refused_before_triton_starts(unshare: list[str], tiny_repository: Path) -> None:
    for room in (4096, needed(tiny_repository, "tiny") - 4096):
        said = refused_start("--model-repository", str(tiny_repository), under=with_room(unshare, room))
        assert said.count("\n") == 1 and "/dev/shm has" in said and "--shm-size" in said, said


@pytest.mark.parametrize("size", [[2**40, 2**40], [-1, 2**62]])
def test_shapes_that_no_machine_holds_are_refused(tmp_path: Path, tiny_repository: Path, size: list[int]) -> None:
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    path = repository / "tiny_generator" / "config.pbtxt"
    config = read_config(path)
    config.output[0].dims[:] = size
    path.write_text(str(config))
    said = refused_start("--model-repository", str(repository))
    assert said.count("\n") == 1 and "has output.dims" in said, said


def test_what_fills_it_up_later_is_outlived(unshare: list[str], tmp_path: Path, light_repository: Path) -> None:
    room = needed(light_repository, "light")
    service = start_service(tmp_path / "serve.log", repository=light_repository, under=with_room(unshare, room))
    try:
        with grpc.insecure_channel(service.grpc) as channel, httpx.Client(base_url=service.http, timeout=60.0) as http:
            stub = pb_grpc.SampleServiceStub(channel)
            request = pb.BatchGetSamplesRequest(model="light", seeds=range(64), options=ALL)
            filler = Path(f"/proc/{service.process.pid}/root/dev/shm/filler")
            left = os.statvfs(filler.parent)
            filler.write_bytes(bytes(left.f_bavail * left.f_frsize))
            # Full batches need more than what the processes have so far: an error, or Triton's end.
            # Batches are full only when enough seeds arrive together, so it asks until they are.
            wait_for(lambda: code_of(stub, request) is grpc.StatusCode.UNAVAILABLE)
            told = ("labelmint: Triton's shared memory is full", "starting Triton again")
            wait_for(lambda: any(line in service.log.read_text() for line in told))  # the answer may come first
            with contextlib.suppress(ValueError, OSError):  # it may have ended by itself
                os.kill(triton_pid(service), signal.SIGKILL)
            wait_for(lambda: "s: /dev/shm has" in service.log.read_text())
            assert http.get("/healthz").status_code == 200
            wait_for(lambda: http.get("/readyz").status_code == 503)  # asked at most once a second
            filler.unlink()
            wait_for(lambda: http.get("/readyz").status_code == 200)
            assert len(stub.BatchGetSamples(request).outcomes) == 64
        assert "Traceback" not in service.log.read_text()
    finally:
        assert service.stop() == 0


def test_a_version_for_which_there_is_no_room_changes_nothing(
    unshare: list[str], tmp_path: Path, tiny_repository: Path, second: Path
) -> None:
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    room = needed(repository, "tiny") + 4096
    service = start_service(tmp_path / "serve.log", repository=repository, under=with_room(unshare, room))
    try:
        with httpx.Client(base_url=service.http, timeout=60.0) as http:
            before = http.get("/v1/models/tiny/samples/7.npz?max_js=1e9").content
            add(second, repository, "tiny_v2")
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda: "nothing changes: /dev/shm has" in service.log.read_text())
            assert http.get("/readyz").status_code == 200
            assert http.get("/v1/models/tiny/samples/7.npz?max_js=1e9").content == before
    finally:
        assert service.stop() == 0
