"""The interpreter's executor at the gateway: the kernel by default, named everywhere, with its own calibration."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from labelmint.core.calibration import calibrate
from labelmint.export.repository import export_repository
from labelmint.triton.model_config import read_config, write_config
from labelmint_client import Client, SampleOptions
from labelmint_client.pull import PullError, PullOptions, pull, verify
from labelmint_client.pull.samples import other_executor
from tests.conftest import Service, start_service
from tests.support.models import tiny_weights
from tests.support.processes import triton_pid
from tests.support.repositories import exchange
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]

ALL = SampleOptions(max_js=1e9)
SAMPLE = "/v1/models/tiny/samples/7?max_js=1000000000"


def set_calibration(repository: Path, model: str, parameter: str, scale: float) -> None:
    """As `labelmint calibrate` writes it, without the measurement."""
    path = repository / model / "config.pbtxt"
    config = read_config(path)
    digest = config.parameters["model_digest"].string_value
    measured = calibrate(
        np.arange(2000) * scale, model_digest=digest, score_kind="sum", truncation_psi=1.0, first_seed=0
    )
    config.parameters[parameter].string_value = measured.to_json()
    write_config(path, config)


@pytest.fixture(scope="module")
def repository(second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` is calibrated for both executors, and `other` for ONNX Runtime only."""
    directory = Path(shutil.copytree(second, tmp_path_factory.mktemp("executors") / "repository"))
    set_calibration(directory, "tiny", "calibration", 1.0)
    set_calibration(directory, "tiny", "calibration.kernel", 2.0)
    set_calibration(directory, "other", "calibration", 1.0)
    return directory


@pytest.fixture(scope="module")
def services(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    logs = tmp_path_factory.mktemp("logs")
    both = {
        "kernel": start_service(logs / "kernel.log", repository=repository),
        "onnxruntime": start_service(logs / "ort.log", "--executor", "onnxruntime", repository=repository),
    }
    yield both
    for service in both.values():
        assert service.stop() == 0


def described(service: Service, model: str, version: int = 1) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{service.http}/v1/models/{model}?model_version={version}").json()
    return found


def test_both_apis_name_the_executor(services: dict[str, Service]) -> None:
    for name, service in services.items():
        with Client(service.grpc) as client:
            assert client.get_model("tiny").executor == name
            assert [model.executor for model in client.list_models()] == [name] * 3
        assert described(service, "tiny")["executor"] == name
        metrics = httpx.get(f"{service.http}/metrics").text
        assert f'executor="{name}"' in metrics
        assert "runs in ONNX Runtime" not in service.log.read_text()


def test_the_same_files_have_one_digest_and_two_revisions(services: dict[str, Service]) -> None:
    kernel, onnx = (described(services[name], "tiny") for name in ("kernel", "onnxruntime"))
    assert kernel["digest"] == onnx["digest"] and kernel["revision"] != onnx["revision"]
    tags = {name: httpx.get(service.http + SAMPLE).headers["etag"] for name, service in services.items()}
    assert len(set(tags.values())) == 2
    for name, service in services.items():
        for other, tag in tags.items():
            answer = httpx.get(service.http + SAMPLE, headers={"If-None-Match": tag})
            assert answer.status_code == (304 if name == other else 200), (name, other)


def test_each_executor_has_its_own_gate(services: dict[str, Service], repository: Path) -> None:
    parameters = read_config(repository / "tiny" / "config.pbtxt").parameters
    for name, parameter in (("kernel", "calibration.kernel"), ("onnxruntime", "calibration")):
        threshold = json.loads(parameters[parameter].string_value)["threshold"]
        with Client(services[name].grpc) as client:
            calibration = client.get_model("tiny", "1").calibration
            sample = client.get_sample("tiny", 3, SampleOptions(include_rejected=True), model_version="1")
        assert calibration is not None and calibration.threshold == sample.threshold == threshold
        assert sample.calibration_id == calibration.id


def test_a_calibration_of_another_executor_is_no_gate(services: dict[str, Service]) -> None:
    assert described(services["onnxruntime"], "other")["calibration"] is not None
    assert described(services["kernel"], "other")["calibration"] is None
    answer = httpx.get(services["kernel"].http + "/v1/models/other/samples/3")
    what = (
        "model 'other' is not calibrated for the executor 'kernel', only for 'onnxruntime'; "
        "give max_js or run `labelmint calibrate other`"
    )
    assert answer.status_code == 400 and answer.json()["detail"] == f"max_js: {what}"
    assert f"no gate: {what}" in services["kernel"].log.read_text(), "it is said at the start, too"
    with Client(services["kernel"].grpc) as client:
        assert client.get_sample("other", 3, ALL).calibration_id == ""


def test_labels_agree_and_every_batch_gives_the_same(services: dict[str, Service]) -> None:
    found = {}
    for name, service in services.items():
        with Client(service.grpc) as client:
            alone = [client.get_sample("tiny", seed, ALL) for seed in range(16)]
            batched = client.batch_get_samples("tiny", range(16), ALL)
        for one, other in zip(alone, batched, strict=True):
            assert one.label.tobytes() == other.label.tobytes() and one.js_score == other.js_score
        found[name] = alone
    for one, other in zip(found["kernel"], found["onnxruntime"], strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.js_score == pytest.approx(other.js_score, rel=1e-4)
        assert (one.label == other.label).mean() >= 0.9999


def test_a_data_set_has_one_executor(services: dict[str, Service], tmp_path: Path) -> None:
    """A pull begun with one is not continued with the other, nor verified against it."""
    options = PullOptions("tiny", 4, "webdataset", sample=ALL)
    with Client(services["kernel"].grpc) as client:
        manifest = pull(client, options, tmp_path / "out")
        assert manifest["model"]["executor"] == "kernel"
        assert verify(tmp_path / "out", client).problems == []
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with Client(services["onnxruntime"].grpc) as client:
        with pytest.raises(
            PullError, match="the pull has labels from the executor 'kernel', the service now runs 'onn"
        ):
            pull(client, replace(options, count=8), tmp_path / "out")
        assert len(verify(tmp_path / "out", client).problems) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with Client(services["kernel"].grpc) as client:
        assert pull(client, replace(options, count=8), tmp_path / "out")["model"]["executor"] == "kernel"


def test_what_earlier_versions_did_not_record(services: dict[str, Service]) -> None:
    with Client(services["kernel"].grpc) as client:
        model = client.get_model("tiny", "1")
    for before, now, refused in (
        (None, "kernel", True),
        (None, "onnxruntime", False),
        (None, "pytorch", False),
        (None, "", False),
        ("", "kernel", True),
        ("kernel", "", True),
        ("kernel", "kernel", False),
        ("onnxruntime", "pytorch", True),
        ("onnxruntime", "", False),
    ):
        pulled = {} if before is None else {"executor": before}
        assert bool(other_executor(pulled, replace(model, executor=now))) == refused, (before, now)


def test_a_reload_and_a_new_start_keep_the_decision_right(second: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(second, tmp_path / "repository"))
    service = start_service(tmp_path / "serve.log", repository=repository)
    try:
        with Client(service.grpc) as client:
            before = client.get_model("tiny", "1")
            sample = client.get_sample("tiny", 5, ALL, model_version="1")
            os.kill(triton_pid(service), signal.SIGKILL)
            wait_for(lambda: service.log.read_text().count("ready again") > 0)
            again = client.get_sample("tiny", 5, ALL, model_version="1")
            assert again.label.tobytes() == sample.label.tobytes() and again.js_score == sample.js_score
            assert client.get_model("tiny", "1").executor == "kernel"

            exchange(second, repository)  # other weights
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda: service.log.read_text().count("was read again") == 1)
            after = client.get_model("tiny", "1")
            assert after.executor == "kernel" and after.digest != before.digest
            other = client.get_sample("other", 5, ALL)
            assert client.get_sample("tiny", 5, ALL, model_version="1").js_score == other.js_score

            export_repository(repository, "tiny", tiny_weights(4), file_format="torchscript", staged=False)
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda: service.log.read_text().count("was read again") == 2)
            assert client.get_model("tiny", "1").executor == "pytorch"
            assert client.get_model("other").executor == "kernel"
            client.get_sample("tiny", 5, ALL, model_version="1")
    finally:
        assert service.stop() == 0
