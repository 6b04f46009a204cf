"""The JavaScript example, installed by npm from its lock file, against live services."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from labelmint_client import Client, Sample, SampleOptions
from tests.clients.conftest import StartGateway
from tests.conftest import ROOT, Service, need_program

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SOURCE = ROOT / "clients" / "javascript"
SECONDS = 300
COUNT = 600  # seconds of minting: the gateway is killed at the first


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example alone, without the rest of the checkout; with what `npm ci` brings."""
    need_program("node", "nodejs")
    npm = need_program("npm", "npm")
    directory = tmp_path_factory.mktemp("javascript") / "example"
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


def walk(endpoint: str, request: dict[str, object], printed: str = "sample.jsScore") -> list[str]:
    """The command that prints the seeds of a walk, and what else is asked for."""
    script = (
        'import { connect, streamSamples } from "./labelmint.mjs";'
        'import { createHash } from "node:crypto";'
        'const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");'
        f"const client = connect({json.dumps(endpoint)});"
        f"for await (const sample of streamSamples(client, {json.dumps(request)}))"
        f" console.log(sample.seed, {printed});"
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


def test_conditions_and_ignored_pixels(example: Path, service: Service) -> None:
    with Client(service.grpc) as client:
        unfiltered = list(client.stream_samples("faces", count=8))
        low = sorted((sample.label == 1).mean() for sample in unfiltered if sample.label is not None)[4]
        name = client.get_model("faces").class_names[1]
        options = SampleOptions(where=(f"{name}:{low!r}..",), ignore_js_quantile=0.9)
        samples = list(client.stream_samples("faces", count=3, options=options))
    assert [sample.seed for sample in samples] != [sample.seed for sample in unfiltered[:3]]
    asked = {"where": [{"name": name, "minArea": low}], "ignoreJsQuantile": 0.9}
    request = {"model": "faces", "count": 3, "options": asked}
    lines = run(
        example,
        walk(
            service.grpc,
            request,
            "sample.content.map(({ name, value }) => `${name}=${value}`).join(), sha256(sample.label.data)",
        ),
    )
    for line, sample in zip(lines, samples, strict=True):
        assert sample.label is not None and (sample.label == 255).any()
        digest = hashlib.sha256(sample.label.tobytes()).hexdigest()
        assert line == f"{sample.seed} {name}={sample.content[name]!r} {digest}"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"where": [{"name": "hair", "minArea": 0}]}, "where"),
        ({"ignoreJsQuantile": 0}, "ignoreJsQuantile"),
        ({"classIndex": 0}, "classIndex"),
    ],
)
def test_a_gateway_that_ignores_an_option_is_noticed(example: Path, options: object, named: str) -> None:
    with serving(CancelledOnce()) as endpoint:
        command = walk(endpoint, {"model": "tiny", "count": 3, "options": options})
        done = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0 and done.stdout == ""
    assert f"the gateway is older than this client and does not know: {named}\n" in done.stderr


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
    gateway = CancelledOnce()
    with serving(gateway) as endpoint:
        lines = run(example, walk(endpoint, {"model": "tiny", "count": 3}))
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert gateway.asked == [(0, 3), (1, 2)]


def test_what_cannot_be_repaired_is_thrown(example: Path, service: Service) -> None:
    command = ["node", "print_samples.mjs", service.grpc, "dogs"]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0 and "NOT_FOUND: no model named 'dogs'" in done.stderr


def test_the_client_runs_in_an_empty_project(example: Path, service: Service, tmp_path: Path) -> None:
    """The two files that the page names, and the packages that its command installs."""
    page = (SOURCE / "README.md").read_text()
    (install,) = re.findall(r"`(npm install [^`]*)`", page)
    for name in ("labelmint.mjs", "sample_service.proto"):
        shutil.copy(SOURCE / name, tmp_path)
    (tmp_path / "package.json").write_text("{}")
    run(tmp_path, [*install.split(), "--no-audit", "--no-fund", "--prefer-offline"])
    assert len(run(tmp_path, walk(service.grpc, {"model": "faces", "count": 2}))) == 2


def test_a_model_of_keypoints(example: Path, service: Service) -> None:
    head, line = run(example, ["node", "print_samples.mjs", service.grpc, "faces_keypoints", "1"])
    with Client(service.grpc) as client:
        model = client.get_model("faces_keypoints")
        (sample,) = client.stream_samples("faces_keypoints", count=1)
    assert head == f"faces_keypoints: 128x128, keypoints {', '.join(model.keypoint_names)}"
    places = [tuple(map(float, place.split(","))) for place in line.split()[3:]]
    assert sample.keypoints is not None
    assert places == [tuple(float(value) for value in keypoint[:2]) for keypoint in sample.keypoints]


class Busy(pb_grpc.SampleServiceServicer):
    """Turns the first GetModel and the first stream away, with the pause that it asks for."""

    def __init__(self, pause_seconds: float, forever: bool = False) -> None:
        self.pause_seconds = pause_seconds
        self.forever = forever
        self.asked: dict[str, list[float]] = {"GetModel": [], "StreamSamples": []}

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        self.turn_away("GetModel", context)
        return pb.GetModelResponse(model=pb.Model(name=request.model, version="1", digest="d"))

    def StreamSamples(
        self, request: pb.StreamSamplesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamSamplesResponse]:
        self.turn_away("StreamSamples", context)
        yield pb.StreamSamplesResponse(sample=pb.Sample(seed=0, model_digest="d"), next_seed=1)

    def turn_away(self, method: str, context: grpc.ServicerContext) -> None:
        self.asked[method].append(time.monotonic())
        if len(self.asked[method]) == 1 or self.forever:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(self.pause_seconds * 1000))
            abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry)


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, *details: Message) -> None:
    """Ends a call as the gateway does, with its reason in the trailer."""
    status = status_pb2.Status(code=code.value[0], message=reason)
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain="labelmint"), *details):
        status.details.add().Pack(detail)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, reason)


@contextmanager
def serving(gateway: pb_grpc.SampleServiceServicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_SampleServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_it_waits_as_long_as_the_gateway_asks(example: Path) -> None:
    gateway = Busy(1.5)  # well above the 0.1 s of a first pause of its own
    with serving(gateway) as endpoint:
        assert len(run(example, walk(endpoint, {"model": "tiny", "count": 1}))) == 1
    for first, second in gateway.asked.values():
        assert second - first >= 1.5


def give_up(example: Path, gateway: Busy, patience_ms: int) -> list[str]:
    script = (
        'import { connect, getModel } from "./labelmint.mjs";'
        "const client = connect(process.argv[1]);"
        f'try {{ await getModel(client, "tiny", {{ patienceMs: {patience_ms} }}); }}'
        " catch (error) { console.log(error.reason, error.retryDelayMs); }"
        "client.close();"
    )
    with serving(gateway) as endpoint:
        return run(example, ["node", "--input-type=module", "--eval", script, endpoint])


def test_it_gives_up_and_says_why(example: Path) -> None:
    """The second pause would end after the patience. The patience is long enough for two attempts on a busy machine."""
    gateway = Busy(12, forever=True)
    assert give_up(example, gateway, 20_000) == ["OVERLOADED 12000"]
    assert len(gateway.asked["GetModel"]) == 2


class Silent(Busy):
    """Turns the first call away and never answers the second."""

    def turn_away(self, method: str, context: grpc.ServicerContext) -> None:
        super().turn_away(method, context)
        while context.is_active():
            time.sleep(0.05)


def test_a_try_that_the_patience_cuts_off_hides_nothing(example: Path) -> None:
    gateway = Silent(1)
    assert give_up(example, gateway, 10_000) == ["OVERLOADED 1000"]
    assert len(gateway.asked["GetModel"]) == 2


class Late(Busy):
    """Rejects the first call as overloaded and answers the second with DEADLINE_EXCEEDED."""

    def turn_away(self, method: str, context: grpc.ServicerContext) -> None:
        super().turn_away(method, context)
        abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


def test_a_deadline_that_the_gateway_reports_is_thrown(example: Path) -> None:
    gateway = Late(1)
    assert give_up(example, gateway, 60_000) == ["DEADLINE_EXCEEDED undefined"]
    assert len(gateway.asked["GetModel"]) == 2


def test_a_token_is_refused_without_tls(example: Path) -> None:
    script = 'import { connect } from "./labelmint.mjs"; connect("localhost:1", undefined, "secret");'
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script], cwd=example, capture_output=True, text=True
    )
    assert done.returncode != 0 and "insecure credentials" in done.stderr


def run(directory: Path, command: list[str]) -> list[str]:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
