"""`make serve` as a stranger runs it: a fresh copy of the checkout, no environment, one Ctrl-C."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import READY, ROOT, need_program
from tests.support.processes import alive, descendants
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.minutes]


INSTALL_SECONDS = 900


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    need_program("git", "git")
    need_program("make", "make")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    target = tmp_path / "labelmint"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def first_sample(checkout: Path, log: Path) -> float:
    """Seconds from the command to the first sample; everything must be gone after Ctrl-C."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LABELMINT_", "VIRTUAL_ENV"))}
    environment |= {"LABELMINT_HTTP_PORT": "0"}
    # What would have pip install elsewhere than into the environment, or not at all.
    environment |= {"PIP_USER": "1", "PIP_TARGET": str(checkout.parent / "elsewhere"), "PIP_REQUIRE_VIRTUALENV": "1"}
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["make", "serve", "ARGS=--grpc-port 0"],
            cwd=checkout,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: READY.search(log.read_text()) or process.poll() is not None, INSTALL_SECONDS)
        match = READY.search(log.read_text())
        assert match is not None, log.read_text()
        assert httpx.get(f"{match[1]}/v1/models/faces/samples/7", timeout=60).status_code == 200
        seconds = time.monotonic() - started
        processes = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        process.wait(60)
        wait_for(lambda: not alive(processes))
        return seconds
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(2 * INSTALL_SECONDS)
def test_from_nothing_to_the_first_sample(checkout: Path, tmp_path: Path) -> None:
    cold = first_sample(checkout, tmp_path / "cold.log")
    warm = first_sample(checkout, tmp_path / "warm.log")
    print(f"first sample after {cold:.1f} s cold (with installation), {warm:.1f} s warm")
    python = checkout / ".venv" / "bin" / "python"
    for name in ("torch", "onnx", "pytest"):
        done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, text=True)
        assert f"No module named '{name}'" in done.stderr, f"serving installed {name}"
    assert not (tmp_path / "elsewhere").exists()
    assert "installing" not in plan(checkout)
    moved = checkout.rename(tmp_path / "moved here")
    assert "installing into .venv" in plan(moved), "an environment that knows another place cannot be used"


def test_a_checkout_that_cannot_be_written_gets_its_environment_elsewhere(checkout: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "environment"
    planned = plan(checkout, f"SERVE={elsewhere}")
    assert f"'{elsewhere}/source[calibrate,docs,triton]'" in planned
    assert "--editable" not in planned and ".venv" not in planned


def plan(checkout: Path, *variables: str) -> str:
    """What `make serve` would do."""
    command = ["make", "--dry-run", "serve", *variables]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout
