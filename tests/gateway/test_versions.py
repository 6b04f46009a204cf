"""Models and versions come, are exchanged and go without a restart, and a stream keeps to the one it began with."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import onnx
import pytest
import pytest_asyncio
import tritonclient.grpc.aio as triton
from prometheus_client.parser import text_string_to_metric_families

from labelmint.calibrate import calibrate_repository
from labelmint.core.errors import ModelNotFound, UnusableFile
from labelmint.export.repository import export_repository
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.settings import ServeSettings
from labelmint.triton.model_config import check_artifacts, ensembles, read_config, version_of
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import start_service
from tests.support.models import tiny_weights
from tests.support.processes import triton_pid
from tests.support.repositories import add, exchange
from tests.support.running import Running, read
from tests.support.waiting import until
from tests.support.wire import info_of

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ALL = pb.SampleOptions(max_js=1e9, image_encoding=pb.ENCODING_RAW, label_encoding=pb.ENCODING_RAW, include_js_map=True)
SAMPLES = "/v1/models/tiny/samples"


def take_away_first_version(repository: Path) -> None:
    for path in list(repository.glob("tiny*")):
        if not path.name.startswith("tiny_v2"):
            shutil.rmtree(path)


def test_versions_stand_side_by_side(second: Path, tiny_repository: Path) -> None:
    found = ensembles(second)
    assert set(found) == {"tiny", "tiny_staged", "tiny_v2", "tiny_v2_staged", "other", "other_staged"}
    for name, config in found.items():
        check_artifacts(second, config)
        assert version_of(second / name) == (2 if "_v2" in name else 1)
    digests = {found[name].parameters["model_digest"].string_value for name in ("tiny", "tiny_v2", "other")}
    assert len(digests) == 3
    for path in tiny_repository.rglob("*.*"):  # version 1 is untouched
        assert (second / path.relative_to(tiny_repository)).read_bytes() == path.read_bytes()


def test_the_digest_of_weights_does_not_depend_on_the_version(tmp_path: Path, tiny_repository: Path) -> None:
    export_repository(tmp_path, "tiny", tiny_weights(), version=7)
    parameters = ensembles(tmp_path)["tiny_v7"].parameters
    assert parameters["model_digest"] == ensembles(tiny_repository)["tiny"].parameters["model_digest"]


def test_a_model_cannot_take_the_name_of_another_ones_version(second: Path) -> None:
    with pytest.raises(UnusableFile, match="belongs to the model 'tiny'"):
        export_repository(second, "tiny_v2", tiny_weights())


async def test_a_version_is_calibrated_by_its_number(tmp_path: Path, second: Path) -> None:
    repository = Path(shutil.copytree(second, tmp_path / "repository"))
    (calibration,) = await calibrate_repository(repository, "tiny", 0, count=1000, truncation_psi=1.0, version=2)
    for name in ensembles(repository):
        held = read_config(repository / name / "config.pbtxt").parameters["calibration.kernel"].string_value
        assert held == (calibration.to_json() if name.startswith("tiny_v2") else "")
    with pytest.raises(ModelNotFound, match="no version '3' of model 'tiny'; served: 1, 2"):
        await calibrate_repository(repository, "tiny", 0, count=1000, truncation_psi=1.0, version=3)
    with pytest.raises(ModelNotFound, match="no model named 'tiny_v2'; served: other, tiny"):
        await calibrate_repository(repository, "tiny_v2", 0, count=1000, truncation_psi=1.0)


@pytest_asyncio.fixture
async def running(tmp_path: Path, tiny_repository: Path) -> AsyncIterator[Running]:
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    service = await asyncio.to_thread(start_service, tmp_path / "serve.log", repository=repository)
    found = Running(service, repository)
    yield found
    await found.close()


async def rest_of(stream: grpc.aio.UnaryStreamCall) -> tuple[list[pb.StreamSamplesResponse], grpc.aio.AioRpcError]:
    """What still comes, and the error that ends it."""
    messages = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in stream:
            messages += [message] if message.HasField("sample") else []
    return messages, caught.value


async def test_a_new_version_comes_and_an_old_one_goes(running: Running, second: Path) -> None:
    first = await running.sample(7)
    assert first.model_version == "1"
    pinned = running.stream(0)
    messages = await read(pinned, 3)
    add(second, running.repository, "tiny_v2", "other")
    await running.reload([("other", "1"), ("tiny", "1"), ("tiny", "2")])

    # The highest is what a request means that names none; the old one is there for who names it.
    newest = await running.sample(7)
    assert newest.model_version == "2" and newest.model_digest != first.model_digest
    assert newest.js_map != first.js_map
    assert await running.sample(7, "1") == first
    assert (await running.sample(7, model="other")).model_digest not in (first.model_digest, newest.model_digest)
    for version, digest in (("1", first.model_digest), ("2", newest.model_digest), ("", newest.model_digest)):
        found = (await running.stub.GetModel(pb.GetModelRequest(model="tiny", model_version=version))).model
        assert found.digest == digest and len(found.classes) == 2
        over_rest = (await running.http.get("/v1/models/tiny", params={"model_version": version})).json()
        assert over_rest["digest"] == digest
        sample = (await running.http.get(f"{SAMPLES}/7", params={"model_version": version, "max_js": 1e9})).json()
        assert sample["model_digest"] == digest
    body = {"seeds": [7], "max_js": 1e9, "model_version": "1"}
    batch = (await running.http.post(f"{SAMPLES}:batchGet", json=body)).json()
    assert batch["outcomes"][0]["model_version"] == "1"

    # A stream keeps to the version that it began with, until that one goes.
    messages += await read(pinned, 3)
    take_away_first_version(running.repository)
    await running.reload([("other", "1"), ("tiny", "2")])
    rest, error = await rest_of(pinned)
    messages += rest
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    info = info_of(error)
    assert info.reason == "MODEL_VERSION_GONE"
    assert (info.metadata["model_version"], info.metadata["model_digest"]) == ("1", first.model_digest)
    seeds = [message.sample.seed for message in messages]
    assert seeds == list(range(len(seeds))) and int(info.metadata["next_seed"]) == len(seeds)
    assert {message.sample.model_digest for message in messages} == {first.model_digest}

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.sample(7, "1")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "no version '1' of model 'tiny'; served: 2" in str(caught.value.details())
    for version in ("1", "x" * 500, "-2", "9" * 500, "2.0"):
        answer = await running.http.get(f"{SAMPLES}/7", params={"model_version": version})
        assert answer.status_code == 404 and answer.json()["reason"] == "MODEL_NOT_FOUND", version
        assert len(answer.text) < 500
    families = text_string_to_metric_families((await running.http.get("/metrics")).text)
    served = [each.labels for family in families for each in family.samples if each.name == "labelmint_model_info"]
    assert [(each["model"], each["version"]) for each in served] == [("other", "1"), ("tiny", "2")]


async def test_a_version_exchanged_in_place_is_never_mistaken(running: Running, tiny_repository: Path) -> None:
    first = await running.sample(7)
    pinned = running.stream(0)
    messages = await read(pinned, 2)
    export_repository(running.repository, "tiny", tiny_weights(5))
    running.service.process.send_signal(signal.SIGHUP)
    rest, error = await rest_of(pinned)
    assert info_of(error).reason == "MODEL_VERSION_GONE"
    messages += rest
    await running.come_to([("tiny", "1")])
    after = await running.sample(7)
    assert after.model_digest != first.model_digest and after.js_map != first.js_map
    # Every sample under the old digest is the old model's.
    add(tiny_repository, running.repository, "tiny")
    running.service.process.send_signal(signal.SIGHUP)

    async def back() -> bool:
        try:
            return (await running.sample(7)).model_digest == first.model_digest
        except grpc.aio.AioRpcError as failed:
            assert info_of(failed).reason in ("TRITON_UNAVAILABLE", "MODEL_VERSION_GONE")
            return False

    await until(back)
    assert await running.sample(7) == first
    for message in messages:
        assert await running.sample(message.sample.seed) == message.sample


async def test_a_new_calibration_is_taken_over_without_a_pause(running: Running) -> None:
    stream = running.stream(0)
    await read(stream, 1)
    (calibration,) = await calibrate_repository(running.repository, "tiny", 0, count=1000, truncation_psi=1.0)
    running.service.process.send_signal(signal.SIGHUP)

    async def taken_over() -> bool:
        model = (await running.stub.GetModel(pb.GetModelRequest(model="tiny"))).model
        return model.calibration.id == calibration.id

    await until(taken_over)
    await read(stream, 3)  # the samples are the same ones
    stream.cancel()


async def test_what_cannot_be_read_changes_nothing(running: Running, second: Path) -> None:
    add(second, running.repository, "tiny_v2")
    damaged = running.repository / "tiny_v2_generator" / "2" / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    stream = running.stream(0)
    await read(stream, 1)
    running.service.process.send_signal(signal.SIGHUP)
    await running.logged("was not read again, nothing changes")
    assert f"{damaged} is cut off" in running.service.log.read_text()
    assert await running.versions() == [("tiny", "1")]
    await read(stream, 3)
    stream.cancel()
    # Whole again, it is loaded.
    add(second, running.repository, "tiny_v2")
    await running.reload([("tiny", "1"), ("tiny", "2")])


async def test_what_triton_cannot_load_is_told_and_the_rest_served(running: Running, second: Path) -> None:
    add(second, running.repository, "tiny_v2", "other")
    config = running.repository / "tiny_v2_generator" / "config.pbtxt"
    config.write_text(config.read_text().replace('"crossover"', '"nonesuch"'))
    await running.reload([("other", "1"), ("tiny", "1")])
    await running.logged("Triton could not load 'tiny_v2'")
    assert (await running.http.get("/readyz")).status_code == 200


def spoil(model: Path) -> None:
    """Change the lowest bit of one weight."""
    weights = bytes(onnx.load(model).graph.initializer[0].raw_data)
    data = bytearray(model.read_bytes())
    data[data.index(weights)] ^= 1
    model.write_bytes(data)


async def test_a_spoiled_weight_is_not_served_after_a_crash(running: Running, second: Path) -> None:
    add(second, running.repository, "other")
    await running.reload([("other", "1"), ("tiny", "1")])
    first, other = await running.sample(7), await running.sample(7, model="other")
    weights = running.repository / "tiny_style_interpreter" / "1" / "model.onnx"
    whole = weights.read_bytes()
    spoil(weights)
    os.kill(triton_pid(running.service), signal.SIGKILL)
    await running.logged("starting Triton again in 0.5 s: Triton was killed by SIGKILL\n")
    await running.come_to([("other", "1")])
    assert await running.sample(7, model="other") == other
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.sample(7)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    log = running.service.log.read_text()
    assert log.count("tiny is not served; repair it and send SIGHUP") == 1
    assert "has a model digest that does not match its steps: a file is damaged" in log and "Traceback" not in log
    weights.write_bytes(whole)
    await running.reload([("other", "1"), ("tiny", "1")])
    assert await running.sample(7) == first


async def test_a_version_that_was_exchanged_before_a_crash_has_its_own_digest(
    running: Running, second: Path, tiny_repository: Path
) -> None:
    first = await running.sample(7)
    pinned = running.stream(0)
    messages = await read(pinned, 2)
    exchange(second, running.repository)
    os.kill(triton_pid(running.service), signal.SIGKILL)
    rest, error = await rest_of(pinned)
    assert info_of(error).reason in ("TRITON_UNAVAILABLE", "MODEL_VERSION_GONE")
    messages += rest

    async def exchanged() -> pb.Sample | None:
        try:
            found = await running.sample(7)
        except grpc.aio.AioRpcError as failed:
            assert info_of(failed).reason in ("TRITON_UNAVAILABLE", "MODEL_VERSION_GONE")
            return None
        assert found == first or found.model_digest != first.model_digest
        return found if found != first else None

    after = await until(exchanged)
    assert after is not None and after.model_digest != first.model_digest and after.js_map != first.js_map
    assert {message.sample.model_digest for message in messages} == {first.model_digest}
    add(tiny_repository, running.repository, "tiny")
    running.service.process.send_signal(signal.SIGHUP)
    await running.logged(f"serving tiny version 1, digest {first.model_digest[:12]}", 2)
    for message in messages:
        assert await running.sample(message.sample.seed) == message.sample


async def test_what_changes_while_it_is_read_is_not_loaded(tmp_path: Path, second: Path, tiny_repository: Path) -> None:
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    own = OwnTriton(ServeSettings(model_repository=repository))
    checked = own._read_model("tiny")
    spoil(repository / "tiny_style_interpreter" / "1" / "model.onnx")
    with pytest.raises(UnusableFile, match="has a model digest that does not match"):
        await own._load(None, "tiny", checked)  # type: ignore[arg-type]
    exchange(second, repository)
    with pytest.raises(UnusableFile, match="changed while it was read"):
        await own._load(None, "tiny", checked)  # type: ignore[arg-type]


async def test_what_an_external_triton_loads_is_served(tmp_path: Path, second: Path) -> None:
    server = TritonServer(second, ["tiny"])
    await server.start()
    try:
        await wait_until_ready(server)
        service = await asyncio.to_thread(
            start_service, tmp_path / "serve.log", "--triton-url", server.grpc_url, repository=tmp_path / "unused"
        )
        running = Running(service, second)
        operator = triton.InferenceServerClient(server.grpc_url)
        try:
            pinned = running.stream(0)
            await read(pinned, 2)
            server.show(["tiny_v2"])  # as an operator puts it into the directory
            await operator.load_model("tiny_v2")
            await running.come_to([("tiny", "1"), ("tiny", "2")])
            assert (await running.sample(7)).model_version == "2"
            await operator.unload_model("tiny", unload_dependents=True)
            _, error = await rest_of(pinned)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert info_of(error).reason == "MODEL_VERSION_GONE"
            await running.come_to([("tiny", "2")])
            await operator.unload_model("tiny_v2", unload_dependents=True)

            async def nothing_is_left() -> bool:
                return (await running.http.get("/readyz")).status_code == 503  # asked at most once a second

            await until(nothing_is_left)
        finally:
            await operator.close()
            await running.close()
    finally:
        await server.stop()
