"""A child that ends with its parent, started without running anything of ours between fork and exec."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from labelmint.triton.server import DIE_WITH_PARENT
from tests.support.processes import running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.unit


PACKAGE = Path(__file__).parent.parent.parent / "service" / "labelmint"
START = (sys.executable, "-I", "-S", str(DIE_WITH_PARENT))


def test_the_command_takes_the_place_of_the_program() -> None:
    done = subprocess.run([*START, str(os.getpid()), "/bin/echo", "a b", "c"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a b c\n")


def test_a_killed_parent_takes_its_child_along() -> None:
    script = f"import os, subprocess; p = subprocess.Popen([*{START!r}, str(os.getpid()), '/bin/sleep', '1000']);"
    script += "print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not running(child))


def test_nobody_runs_for_a_parent_that_is_gone() -> None:
    done = subprocess.run([*START, "1", "/bin/echo", "unwanted"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""


def test_nothing_of_ours_runs_between_fork_and_exec() -> None:
    # A process with threads of gRPC dies in there about once in four times.
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.keyword) and node.arg == "preexec_fn"), path
