"""A running `labelmint annotate` in a process of its own, on the demo's generator or on a small one."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from labelmint.models.store import save_generator
from tests.support.models import small

ADDRESS = re.compile(r"annotate at (http://\S+)")
START_SECONDS = 120


@dataclass
class Desk:
    """A running page: its address with the secret, its directory and its process."""

    address: str
    directory: Path
    process: subprocess.Popen[str]
    log: Path

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the process may grow beyond a few bytes meanwhile."""
        usual = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (8, usual[1]))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, usual)

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def small_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "generator.safetensors"
    save_generator(path, small()[0], {})
    return path


@pytest.fixture(scope="module")
def start_desk() -> Iterator[Callable[..., Desk]]:
    """Starts pages; those that still run at the end of the file are stopped."""
    desks: list[Desk] = []

    def start(generator: Path, directory: Path, *options: str) -> Desk:
        log = directory.with_name(f"{directory.name}-{len(desks)}.log")
        command = [sys.executable, "-m", "labelmint.cli", "annotate", "--generator", str(generator), *options]
        with log.open("w") as stream:
            process = subprocess.Popen([*command, str(directory)], stdout=stream, stderr=subprocess.STDOUT, text=True)
        ends = time.monotonic() + START_SECONDS
        while not (found := ADDRESS.search(log.read_text())):
            assert process.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        desks.append(Desk(found[1], directory, process, log))
        return desks[-1]

    yield start
    for desk in desks:
        if desk.process.poll() is None:
            desk.stop()
