"""Single calls of both clients, over real sockets: types, options, errors, TLS and tokens."""

import asyncio
import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import trustme

from labelmint_client import (
    AsyncClient,
    Client,
    InvalidRequest,
    LabelmintError,
    ModelNotFound,
    Rejection,
    Sample,
    SampleOptions,
    SampleRejected,
    Tls,
    Unauthenticated,
    Unavailable,
    Uncalibrated,
)
from tests.clients.conftest import StartGateway
from tests.conftest import Service
from tests.support.metrics import GRPC_IN_FLIGHT, metric_of
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]


NONE = SampleOptions(max_js=0)
ALL = SampleOptions(max_js=1e9)


@pytest.fixture(scope="module")
def demo(service: Service) -> Iterator[Client]:
    with Client(service.grpc) as connected:
        yield connected


def test_models_are_described(demo: Client) -> None:
    faces, keypoints = demo.list_models()
    assert (faces.name, keypoints.name) == ("faces", "faces_keypoints")
    described = demo.get_model("faces", faces.version)
    assert described.digest == faces.digest and len(described.digest) == 64
    assert (described.task, described.resolution) == ("segmentation", 128)
    assert described.palette.shape == (len(described.class_names), 3) and described.palette.dtype == np.uint8
    assert described.calibration is not None and len(described.calibration.quantiles) == 101
    assert keypoints.task == "keypoints" and len(keypoints.palette) == len(keypoints.keypoint_names) > 0


def test_a_sample_has_arrays(demo: Client) -> None:
    sample = demo.get_sample("faces", 7, SampleOptions(include_js_map=True))
    assert sample.image is not None and (sample.image.shape, sample.image.dtype) == ((128, 128, 3), np.uint8)
    assert sample.label is not None and (sample.label.shape, sample.label.dtype) == ((128, 128), np.uint8)
    assert sample.js_map is not None and (sample.js_map.shape, sample.js_map.dtype) == ((128, 128), np.float32)
    assert sample.js_score == pytest.approx(sample.js_map.sum(), rel=1e-3)
    assert sample.accepted and sample.js_score <= sample.threshold and sample.calibration_id
    assert sample.keypoints is None and sample.style_seed is None and sample.group_id == ""


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_images_may_travel_compressed(demo: Client, encoding: Any) -> None:
    raw = demo.get_sample("faces", 7)
    packed = demo.get_sample("faces", 7, SampleOptions(image_encoding=encoding))
    assert raw.image is not None and packed.image is not None and packed.image.shape == raw.image.shape
    assert np.abs(packed.image.astype(int) - raw.image).mean() < (4 if encoding == "jpeg" else 1e-9)
    assert np.array_equal(packed.label, raw.label)  # type: ignore[arg-type]


def test_what_is_omitted_is_none(demo: Client) -> None:
    sample = demo.get_sample("faces", 7, SampleOptions(omit_image=True, omit_label=True))
    assert sample.image is None and sample.label is None and sample.js_map is None


def test_keypoints(demo: Client) -> None:
    sample = demo.get_sample("faces_keypoints", 3, SampleOptions(max_quantile=1))
    names = demo.get_model("faces_keypoints").keypoint_names
    assert sample.label is None and sample.keypoints is not None and sample.keypoints.shape == (len(names), 3)


def test_mixing(demo: Client) -> None:
    options = SampleOptions(crossover=7, max_js=1e9)
    outcomes = demo.batch_get_samples("faces", [7, 7], options, style_seeds=[1, 2])
    samples = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
    assert [sample.style_seed for sample in samples] == [1, 2] and samples[0].group_id == samples[1].group_id != ""


def test_a_batch_tells_of_rejections(client: Client) -> None:
    outcomes = client.batch_get_samples("tiny", [3, 1], NONE)
    assert all(isinstance(outcome, Rejection) for outcome in outcomes)
    assert [outcome.seed for outcome in outcomes] == [3, 1]


ERRORS: list[tuple[Callable[[Any], Any], type[LabelmintError], str]] = [
    (lambda client: client.get_model("nobody"), ModelNotFound, "served: tiny"),
    (lambda client: client.get_model("tiny", "9"), ModelNotFound, "version '9'"),
    (lambda client: client.get_sample("tiny", 0), Uncalibrated, "give max_js"),
    (lambda client: client.get_sample("tiny", 2**32, ALL), InvalidRequest, "out of range"),
    (lambda client: client.get_sample("tiny", 5, NONE), SampleRejected, "above the threshold"),
    (lambda client: client.batch_get_samples("tiny", range(65), ALL), InvalidRequest, "65 given"),
    (lambda client: client.stream_samples("nobody"), ModelNotFound, "served: tiny"),
]


@pytest.mark.parametrize(("call", "kind", "says"), ERRORS)
async def test_errors_are_those_of_the_protocol(
    gateway: Service, call: Callable[[Any], Any], kind: type[LabelmintError], says: str
) -> None:
    with Client(gateway.grpc) as client, pytest.raises(kind, match=says) as caught:
        await asyncio.to_thread(call, client)
    assert type(caught.value) is kind
    async with AsyncClient(gateway.grpc) as asynchronous:
        with pytest.raises(kind, match=says):
            await call(asynchronous)


def test_a_rejection_carries_its_figures(client: Client) -> None:
    with pytest.raises(SampleRejected) as caught:
        client.get_sample("tiny", 5, NONE)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.seed, error.threshold, error.calibration_id) == (5, 0.0, "") and error.js_score > 0.0
    assert error.reason == "SAMPLE_REJECTED" and str(error) == str(caught.value)


def test_an_error_ends_a_stream(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        next(client.stream_samples("tiny", options=ALL, window=10**6))
    assert caught.value.field == "window"


async def test_asyncio_gives_the_same(gateway: Service, client: Client) -> None:
    async with AsyncClient(gateway.grpc) as asynchronous:
        assert [model.digest for model in await asynchronous.list_models()] == [
            model.digest for model in client.list_models()
        ]
        one, many = await asyncio.gather(
            asynchronous.get_sample("tiny", 3, ALL), asynchronous.batch_get_samples("tiny", range(5), ALL)
        )
        walked = [sample async for sample in await asynchronous.stream_samples("tiny", options=ALL, end_seed=5)]
        assert isinstance(many[3], Sample) and one.image is not None
        images = [sample.image.tobytes() for sample in (one, many[3], walked[3], client.get_sample("tiny", 3, ALL))]  # type: ignore[union-attr]
        assert len(set(images)) == 1 and [sample.seed for sample in walked] == list(range(5))


async def test_a_cancelled_task_ends_its_stream(gateway: Service) -> None:
    """At the gateway too, while the client stays."""
    async with AsyncClient(gateway.grpc) as asynchronous, httpx.AsyncClient(base_url=gateway.http) as http:

        async def open_streams(count: int) -> bool:
            return await metric_of(http, GRPC_IN_FLIGHT) == count

        await until(lambda: open_streams(0))
        stream = await asynchronous.stream_samples("tiny", options=NONE)
        task = asyncio.ensure_future(anext(stream))
        await until(lambda: open_streams(1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: open_streams(0))
        assert (await asynchronous.get_model("tiny")).name == "tiny"


def test_heartbeats_move_the_cursor(client: Client) -> None:
    with client.stream_samples("tiny", options=NONE) as stream:
        for sample in stream.with_heartbeats():
            assert sample is None and stream.next_seed == stream.rejected_count
            if stream.next_seed > 0:
                break
    assert list(stream) == []


def test_a_range_is_walked_to_its_end(client: Client, options: SampleOptions, accepted: list[int]) -> None:
    with client.stream_samples("tiny", end_seed=256, options=options) as stream:
        assert [sample.seed for sample in stream] == accepted
        assert stream.next_seed == 256
    with client.stream_samples("tiny", end_seed=100, options=NONE) as stream:
        assert list(stream) == [] and stream.next_seed == 100


def test_an_address_without_a_gateway() -> None:
    with Client("localhost:1", deadline_seconds=5.0) as client, pytest.raises(Unavailable, match="localhost:1"):
        client.list_models()


def test_a_name_leads_to_its_addresses(gateway: Service) -> None:
    port = gateway.grpc.rpartition(":")[2]
    with Client(f"dns:///localhost:{port}") as client:
        assert client.get_model("tiny").name == "tiny"


@pytest.mark.parametrize(
    ("endpoints", "settings", "problem"),
    [
        ((), {}, "no endpoint"),
        ("http://localhost:8080", {}, "not the HOST:PORT"),
        ("localhost", {}, "not the HOST:PORT"),
        ("gateway:50051", {"token": "secret"}, "in plain text"),
        (("localhost:1", "10.0.0.1:1"), {"token": "secret"}, "in plain text"),
        ("dns:///gateway:1", {"token": "secret"}, "in plain text"),
    ],
)
def test_what_cannot_be_is_refused_at_once(endpoints: Any, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        Client(endpoints, **settings)
    assert "secret" not in str(caught.value)


def test_options_that_cannot_be_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="not both"):
        SampleOptions(max_js=1, max_quantile=1)
    with pytest.raises(ValueError, match="raw, png, jpeg"):
        SampleOptions(image_encoding="gif")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give both"):
        Tls(certificate="client.pem")


@pytest.mark.parametrize("endpoint", ["localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1", "unix:/run/it"])
def test_a_token_may_go_to_this_machine(endpoint: str) -> None:
    Client(endpoint, token="secret").close()
    Client("gateway:1", token="secret", insecure=True).close()


TOKEN = "t0ken-of-a-trainer"


@pytest.fixture(scope="module")
def locked(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> tuple[Service, dict[str, Path]]:
    """A gateway that asks for a token and a client certificate, and the client's files."""
    directory, authority = tmp_path_factory.mktemp("locked"), trustme.CA()
    files = {name: directory / f"{name}.pem" for name in ("ca", "server", "server_key", "certificate", "key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    for issued, certificate, key in (
        (authority.issue_cert("127.0.0.1"), "server", "server_key"),
        (authority.issue_cert("trainer@example.org"), "certificate", "key"),
    ):
        issued.private_key_pem.write_to_path(str(files[key]))
        files[certificate].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    tokens = directory / "tokens"
    tokens.write_text(f"trainer {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    service = start_gateway(
        *("--tls-certificate", str(files["server"]), "--tls-key", str(files["server_key"])),
        *("--tls-client-ca", str(files["ca"]), "--tokens-file", str(tokens)),
    )
    return service, {name: files[name] for name in ("ca", "certificate", "key")}


@pytest_asyncio.fixture
async def trusted(locked: tuple[Service, dict[str, Path]]) -> AsyncIterator[AsyncClient]:
    service, files = locked
    async with AsyncClient(service.grpc, token=TOKEN, tls=Tls(**files)) as asynchronous:
        yield asynchronous


async def test_tls_and_tokens(locked: tuple[Service, dict[str, Path]], trusted: AsyncClient) -> None:
    service, files = locked
    with Client(service.grpc, token=TOKEN, tls=Tls(**files)) as client:
        assert [sample.seed for sample in client.stream_samples("tiny", count=3, options=ALL)] == [0, 1, 2]
    assert (await trusted.get_sample("tiny", 1, ALL)).seed == 1
    for token in (None, "another"):
        with Client(service.grpc, token=token, tls=Tls(**files)) as client, pytest.raises(Unauthenticated):
            client.list_models()
    for tls in (None, Tls(), Tls(ca=files["ca"])):
        with Client(service.grpc, token=TOKEN, tls=tls, deadline_seconds=5.0) as client, pytest.raises(Unavailable):
            client.list_models()


def test_the_client_is_light() -> None:
    """It needs nothing of the service, and the libraries of its adapters only where they are asked for."""
    script = "import sys, labelmint_client; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    heavy = {"labelmint", "torch", "PIL", "datasets", "tensorflow", "pyarrow", "pandas", "pydantic", "tritonclient"}
    assert not heavy & set(done.stdout.split())


FORKED = """
import os, sys
from labelmint_client import Client, SampleOptions

options = SampleOptions(max_js=float(sys.argv[2]))
with Client(sys.argv[1]) as client, client.stream_samples("tiny", options=options) as begun:
    next(begun)
    again = lambda: next(begun)
    if os.fork() == 0:
        for use in (client.list_models, again, again, lambda: next(client.stream_samples("tiny", options=options))):
            try:
                use()
            except RuntimeError as error:
                assert f"created in process {os.getppid()} and is used in {os.getpid()}" in str(error), error
                print(error)
        sys.stdout.flush()
        os._exit(0)
    status = os.wait()[1]
    assert status == 0, status
    assert client.list_models() and next(begun).accepted, "the parent goes on"
"""


def test_a_client_that_came_through_a_fork_says_so(gateway: Service, options: SampleOptions) -> None:
    """A fork does not take over connections, so calls and streams of the child fail at once, instead of hanging.

    gRPC's own fork support is switched off: the threads that it starts in the child sometimes crash there.
    """
    lines = forked(FORKED, gateway, options)
    assert len(lines) == 4 and all("create a client in each process" in line for line in lines)


def forked(script: str, gateway: Service, options: SampleOptions) -> list[str]:
    """Return the lines that the child of the script prints."""
    command = [sys.executable, "-c", script, gateway.grpc, repr(options.max_js)]
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


FORKED_ASYNCIO = """
import asyncio, os, sys
from labelmint_client import AsyncClient, SampleOptions

async def use(call):
    try:
        await call()
    except RuntimeError as error:
        print(error)

async def run():
    client = AsyncClient(sys.argv[1])
    stream = await client.stream_samples("tiny", options=SampleOptions(max_js=float(sys.argv[2])))
    await anext(stream)
    if os.fork() == 0:
        for call in (client.list_models, lambda: anext(stream), lambda: anext(stream), client.close):
            await use(call)
        sys.stdout.flush()
        os._exit(0)
    status = os.wait()[1]
    assert status == 0, status
    await anext(stream)
    await client.close()

asyncio.run(run())
"""


def test_an_asyncio_client_that_came_through_a_fork_says_so(gateway: Service, options: SampleOptions) -> None:
    """gRPC supports forks for blocking calls only. Here it would start threads in the child that crash it now and then,
    so its support is off: docs/training.md says that a process with an AsyncClient may not fork."""
    lines = forked(FORKED_ASYNCIO, gateway, options)
    assert len(lines) == 3 and all("create a client in each process" in line for line in lines)


LEAVING = """
import gc, os, sys
from labelmint_client import Client, SampleOptions

gc.disable()

def walk():
    options = SampleOptions(max_js=float(sys.argv[2]))
    with Client(sys.argv[1]) as client, client.stream_samples("tiny", options=options) as stream:
        yield from stream

kept = [walk()]
next(kept[0])
kept.append(kept)  # a cycle, as loaders are in: collected when Python ends, after gRPC's threads have gone
if os.fork() == 0:
    kept[0].close()  # leaves the client's block, and the stream's
    sys.exit(0)
assert os.wait()[1] == 0
next(kept[0])
del kept
"""


@pytest.mark.parametrize("first", ["", "import grpc"])
def test_a_process_that_leaves_a_stream_open_ends(gateway: Service, options: SampleOptions, first: str) -> None:
    """As training on seeds without end does; a child that it has forked ends too, even without gRPC's fork support."""
    command = [sys.executable, "-c", first + LEAVING, gateway.grpc, repr(options.max_js)]
    quiet = {**os.environ, "GRPC_VERBOSITY": "ERROR"}  # gRPC reports the fork handlers that it skips
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet)
    # Sometimes gRPC's core logs this line in a forked child.
    said = re.sub(r"^E\d{4} .*\] epoll_ctl failed: file descriptor was created pre fork\n", "", done.stderr, flags=re.M)
    assert (done.returncode, said) == (0, "")
