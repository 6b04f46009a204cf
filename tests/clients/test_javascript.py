"""The JavaScript example, installed by npm from its lock file, against live services."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from labelmint_client import Client, Sample, SampleOptions
from tests.clients.conftest import StartGateway
from tests.conftest import ROOT, Service, need_program

SOURCE = ROOT / "clients" / "javascript"
SECONDS = 300
COUNT = 600  # seconds of minting: the gateway is killed at the first


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example beside one of the protos, as in the checkout; with what `npm ci` brings."""
    need_program("node", "nodejs")
    npm = need_program("npm", "npm")
    root = tmp_path_factory.mktemp("javascript")
    shutil.copytree(ROOT / "protos", root / "protos")
    directory = root / "clients" / "javascript"
    shutil.copytree(SOURCE, directory, ignore=shutil.ignore_patterns("node_modules"))
    command = [npm, "ci", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return directory


def told(sample: Sample) -> tuple[int, float, str, str]:
    """What print_samples.mjs prints of a sample."""
    assert sample.image is not None and sample.label is not None
    image, label = (hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in (sample.image, sample.label))
    return sample.seed, sample.js_score, image, label


def read(line: str) -> tuple[int, float, str, str]:
    seed, score, image, label = line.split()
    return int(seed), float(score), image, label


def test_the_page_runs(example: Path, service: Service) -> None:
    """Its commands and its script; the pixels are those that the Python client gets."""
    page = (SOURCE / "README.md").read_text().replace("localhost:50051", service.grpc)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    install, program = commands.splitlines()
    assert install == "npm ci"  # the fixture's
    (script,) = re.findall(r"```javascript\n(.*?)```", page, re.DOTALL)
    with Client(service.grpc) as client:
        names = ", ".join(client.get_model("faces").class_names)
        samples = list(client.stream_samples("faces", count=3))
    head, *lines = run(example, program.split())
    assert head == f"faces: 128x128, classes {names}"
    assert [read(line) for line in lines] == [told(sample) for sample in samples]
    lines = run(example, ["node", "--input-type=module", "--eval", script])
    assert lines == [f"{sample.seed} {128 * 128 * 3} {128 * 128}" for sample in samples]


def test_a_walk_survives_a_restart(example: Path, start_gateway: StartGateway, options: SampleOptions) -> None:
    service = start_gateway()
    request = json.dumps({"model": "tiny", "count": COUNT, "options": {"maxJs": options.max_js}})
    script = (
        'import { connect, streamSamples } from "./labelmint.mjs";'
        f"const client = connect({json.dumps(service.grpc)});"
        f"for await (const sample of streamSamples(client, {request})) console.log(sample.seed, sample.jsScore);"
        "client.close();"
    )
    command = ["node", "--input-type=module", "--eval", script]
    with subprocess.Popen(command, cwd=example, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        service.stop(signal.SIGKILL)
        again = start_gateway("--grpc-port", service.grpc.rpartition(":")[2])
        lines += process.stdout.readlines()
    assert process.returncode == 0
    with Client(again.grpc) as client:
        wanted = [(s.seed, s.js_score) for s in client.stream_samples("tiny", count=COUNT, options=options)]
    assert [(int(seed), float(score)) for seed, score in map(str.split, lines)] == wanted


def test_what_cannot_be_repaired_is_thrown(example: Path, service: Service) -> None:
    command = ["node", "print_samples.mjs", service.grpc, "dogs"]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0 and "NOT_FOUND: no model named 'dogs'" in done.stderr


def run(directory: Path, command: list[str]) -> list[str]:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
