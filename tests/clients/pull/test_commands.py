"""`labelmint pull` and `labelmint verify` as programs: what they say, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from labelmint_client import Client
from labelmint_client.pull import PullOptions, pull
from tests.conftest import Service
from tests.support.files import contents
from tests.support.waiting import wait_for

pytestmark = pytest.mark.triton


SECONDS = 300


def run(*arguments: object, module: str = "labelmint_client", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)


def shorten(out: Path, begun: int, count: int) -> None:
    """Change what an unfinished pull was asked for, as if it had been a pull of fewer from the beginning."""
    header = out / ".labelmint-pull" / "header.json"
    before = header.read_text()
    header.write_text(before.replace(f'"count": {begun}', f'"count": {count}'))
    assert header.read_text() != before


def test_a_pull_that_is_killed_and_started_again(service: Service, tmp_path: Path) -> None:
    """From outside, at a moment that the files tell: the demo's faces, by the service's program.

    It is begun with more samples than any machine has made by then, and goes on with twelve.
    """
    out, program = tmp_path / "out", "labelmint.cli"
    arguments = ["pull", "--endpoint", service.grpc, "--model", "faces", "--samples-per-shard", "4"]
    arguments += ["--format", "folder", str(out), "--count"]
    process = subprocess.Popen([sys.executable, "-m", program, *arguments, "4000"], stderr=subprocess.PIPE, text=True)
    wait_until(process, lambda: len(list(out.glob("images/*"))) >= 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "images").exists() and not (out / "manifest.json").exists()
    count = len(list(out.glob("images/*"))) + 6
    shorten(out, 4000, count)
    arguments.append(str(count))
    done = run(*arguments, module=program)
    assert done.returncode == 0, done.stderr
    assert f"{count}/{count}" in done.stderr and "% accepted]" in done.stderr and "sample/s" in done.stderr
    assert done.stdout.startswith(f"{out} is complete: {count} samples, ")
    with Client(service.grpc) as client:
        pull(client, PullOptions("faces", count, "folder", samples_per_shard=4), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert run(*arguments, module=program).stdout == done.stdout
    verified = run("verify", out, "--endpoint", service.grpc, "--sample", "5", module=program)
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout == (
        f"{out}: compared {2 * count + 3} files with the manifest, 5 samples with what is served: no difference\n"
    )


def test_verify_fails_with_a_line_for_each_difference(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("pull", "--endpoint", service.grpc, "--model", "faces", "--count", 2, out).returncode == 0
    with (out / "shard-000000.tar").open("r+b") as file:
        file.write(b"\1")
    done = run("verify", out)
    assert done.returncode == 1 and done.stderr == ""
    first, last = done.stdout.splitlines()
    assert first.startswith("shard-000000.tar: SHA-256 ")
    assert last == f"{out}: compared 3 files with the manifest: 1 difference"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_received(service: Service, tmp_path: Path, number: signal.Signals) -> None:
    """The whole pull is one shard, in whose midst the signal comes."""
    out = tmp_path / "out"
    arguments = ["pull", "--endpoint", service.grpc, "--model", "faces", "--format", "coco", "--count"]
    command = [sys.executable, "-m", "labelmint_client", *arguments, "400", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(process, lambda: len(list(out.glob("images/*"))) > 3)
    process.send_signal(number)
    assert process.wait(SECONDS) == 128 + number
    kept = json.loads((out / ".labelmint-pull" / "part-000000.json").read_text())["samples"]
    assert len(kept) > 3 and len(kept) == len(list(out.glob("images/*")))
    count = len(kept) + 2
    shorten(out, 400, count)
    before = {path: path.stat().st_mtime_ns for path in out.glob("images/*")}
    assert run(*arguments, count, out).returncode == 0
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert run(*arguments, count, tmp_path / "whole").returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_service_that_does_not_answer_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening: who connects is refused
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "labelmint_client", "pull", "--endpoint", endpoint, "--model", "faces"]
        process = subprocess.Popen([*command, "--count", "1", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline() == f"labelmint: waiting for {endpoint} for up to 60 s\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    def goes_on() -> bool:
        assert process.poll() is None
        return reached()

    wait_for(goes_on, SECONDS)


def test_errors_are_one_line(service: Service, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    asked = ("pull", "--endpoint", service.grpc, "--model", "faces", "--count")
    for arguments, said in (
        ((*asked, "0", tmp_path / "out"), "count is 0; give at least 1"),
        ((*asked, "1", "--ignore-js-quantile", "2", tmp_path / "out"), "ignore_js_quantile is 2.0; give 0 to 1"),
        ((*asked, "1", "--max-js", "1", "--max-quantile", "1", tmp_path / "out"), "max_js or max_quantile, not both"),
        ((*asked, "1", "--truncation-psi", "0.5", tmp_path / "out"), "0.5 was not calibrated, only 1"),
        ((*asked, "1", "--model", "dogs", tmp_path / "out"), "no model named 'dogs'"),
        ((*asked, "1", tmp_path), f"{tmp_path} exists and holds no unfinished pull"),
        ((*asked, "1", "--tls-ca", tmp_path / "no.pem", tmp_path / "out"), "No such file or directory"),
        ((*asked, "1", "--endpoint", "far:1", "--token-file", token, tmp_path / "out"), "far:1 in plain text"),
        (("verify", tmp_path), "has no manifest.json"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.startswith("labelmint: ") and done.stderr.count("\n") == 1, done.stderr
    # What the service refused has not begun: the directory is free for what it does not.
    assert run(*asked, "1", tmp_path / "out").returncode == 0


INSTALL = "run `pip install './clients/python[pull]'` in a clone of labelmint"


def test_help_and_what_is_missing(tmp_path: Path) -> None:
    told = run("--help", module="labelmint.cli").stdout
    for command in ("pull", "verify", "upload"):
        assert command in told
        assert run(command, "--help", module="labelmint.cli").stdout == run(command, "--help").stdout
    # A module that is None is as good as not installed.
    script = (
        "import sys; sys.modules[{!r}] = None; sys.argv = ['labelmint', 'verify', '.']; import {}.cli as c; c.main()"
    )
    for missing, program, said in (
        ("PIL", "labelmint_client", f"PIL is missing; {INSTALL}"),
        ("labelmint_client", "labelmint", f"`verify` is a client command; {INSTALL}"),
    ):
        command = [sys.executable, "-c", script.format(missing, program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"labelmint: {said}\n")
