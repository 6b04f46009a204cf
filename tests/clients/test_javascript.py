"""The JavaScript example, installed by npm from its lock file, against live services."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
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


def walk(endpoint: str, request: dict[str, object]) -> list[str]:
    """The command that prints the seeds and scores of a walk."""
    script = (
        'import { connect, streamSamples } from "./labelmint.mjs";'
        f"const client = connect({json.dumps(endpoint)});"
        f"for await (const sample of streamSamples(client, {json.dumps(request)}))"
        " console.log(sample.seed, sample.jsScore);"
        "client.close();"
    )
    return ["node", "--input-type=module", "--eval", script]


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
    command = walk(service.grpc, {"model": "tiny", "count": COUNT, "options": {"maxJs": options.max_js}})
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


class CancelledOnce(pb_grpc.SampleServiceServicer):
    """What a gateway without processor time looks like: gRPC's core ends the first stream behind its first sample."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=pb.Model(name=request.model, version="1", digest="d"))

    def StreamSamples(
        self, request: pb.StreamSamplesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamSamplesResponse]:
        self.asked.append((request.start_seed, request.count))
        for seed in range(request.start_seed, request.start_seed + request.count):
            yield pb.StreamSamplesResponse(sample=pb.Sample(seed=seed, model_digest="d"), next_seed=seed + 1)
            if len(self.asked) == 1:
                context.abort(grpc.StatusCode.CANCELLED, "call not taken up in time")


def test_a_walk_survives_what_grpc_cancels(example: Path) -> None:
    gateway, server = CancelledOnce(), grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_SampleServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        lines = run(example, walk(f"127.0.0.1:{port}", {"model": "tiny", "count": 3}))
    finally:
        server.stop(None)
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert gateway.asked == [(0, 3), (1, 2)]


def test_what_cannot_be_repaired_is_thrown(example: Path, service: Service) -> None:
    command = ["node", "print_samples.mjs", service.grpc, "dogs"]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0 and "NOT_FOUND: no model named 'dogs'" in done.stderr


def run(directory: Path, command: list[str]) -> list[str]:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
