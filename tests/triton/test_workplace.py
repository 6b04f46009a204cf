"""Whatever the user's directories are called, Triton serves from them; what a killed run left is removed."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from labelmint.core.errors import InsufficientResources
from labelmint.triton import workplace
from labelmint.triton.workplace import Workplace
from tests.conftest import ROOT, start_service
from tests.support.processes import alive, descendants, triton_pid
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]


# To a shell: several words, a quote without end, and a command. The command's file would lie in the current directory.
HOSTILE = "a b;'\"r$(touch${IFS}marker)`touch marker`&touch marker;"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of that name, which is the TMPDIR, with the program and Triton's wheel in it."""
    directory = tmp_path / HOSTILE
    checkout = directory / "service" / "labelmint"
    shutil.copytree(ROOT / "service" / "labelmint", checkout, ignore=shutil.ignore_patterns("__pycache__"))
    spec = find_spec("pytriton")
    assert spec is not None and spec.origin is not None
    for name in ("pytriton", "nvidia_pytriton.libs"):
        (checkout.parent / name).symlink_to(Path(spec.origin).parent.parent / name)
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("PYTHONPATH", str(checkout.parent))
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


def test_no_name_of_the_users_reaches_a_shell(hostile: Path, tmp_path: Path, tiny_repository: Path) -> None:
    repository = Path(shutil.copytree(tiny_repository, hostile / HOSTILE))
    service = start_service(tmp_path / "serve.log", repository=repository)
    program = Path(f"/proc/{triton_pid(service)}/cmdline").read_text().split("\0")[0]
    assert Path(program).is_relative_to(hostile)
    assert httpx.get(f"{service.http}/v1/models/tiny/samples/7?max_js=1e9", timeout=60).status_code == 200
    assert service.stop() == 0
    command = [sys.executable, "-m", "labelmint.cli", "calibrate", "tiny", "--preview", "--count", "2"]
    done = subprocess.run(
        [*command, "--model-repository", str(repository)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "current").iterdir()), "a command in a name was run"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of this process and its children."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


def test_what_a_killed_gateway_left_goes_at_the_next_start(
    tmp_path: Path, temporary: Path, tiny_repository: Path
) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    try:
        processes = descendants(service.process.pid)
        (left,) = temporary.glob("labelmint-*")
        Workplace().remove()
        assert left.is_dir(), "that of a gateway that lives was taken"
    finally:
        service.stop(signal.SIGKILL)
    wait_for(lambda: not alive(processes))
    region = Path("/dev/shm") / f"labelmint_{left.name[-8:]}_left"  # as a killed Triton leaves them
    region.touch()
    assert left.is_dir()
    Workplace().remove()
    assert not left.exists() and not region.exists()


def test_only_what_is_ours_and_has_no_owner_goes(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living = Workplace()
    killed = [
        sys.executable,
        "-c",
        "import os; from labelmint.triton.workplace import Workplace as W; W(); os._exit(9)",
    ]
    assert subprocess.run(killed, check=False).returncode == 9
    (abandoned,) = [path for path in temporary.iterdir() if path != living.path]
    begun, elsewhere = temporary / "labelmint-triton-00000000", temporary / "labelmint-triton-11111111"
    begun.mkdir()  # it is not locked yet
    elsewhere.symlink_to(abandoned)
    everything = set(temporary.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # to another user
        Workplace().remove()
    assert set(temporary.iterdir()) == everything
    Workplace().remove()
    assert set(temporary.iterdir()) == everything - {abandoned}
    living.remove()


def test_a_directory_that_is_not_plain_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b"))
    found = Workplace()
    assert found.path.parent == Path("/tmp")
    found.remove()
    monkeypatch.setattr(workplace, "_USUAL", (str(tmp_path / "none"),))
    with pytest.raises(InsufficientResources, match="a b' is not one.*set TMPDIR"):
        Workplace()
