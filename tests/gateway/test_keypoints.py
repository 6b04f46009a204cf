"""Keypoints over the same calls and routes, for a small exported model and for every committed one of that task."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

from labelmint.core.served_model import MalformedModel, read_served_model
from labelmint.export.repository import export_repository
from labelmint.models.draw import draw
from labelmint.models.generator import Generator
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.models.tasks import build_interpreter
from labelmint.triton.model_config import ensembles, is_fused
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import REPOSITORY, Service, start_service
from tests.support.wire import LOOSE, LOOSE_QUERY, info_of, problem

pytestmark = [pytest.mark.triton, pytest.mark.torch]


TINY = "marks"
NAMES = ("crown", "chin", "cheek")
COMMITTED = [
    name
    for name, config in ensembles(REPOSITORY).items()
    if is_fused(config) and config.parameters["task"].string_value == "keypoints"
]
assert COMMITTED, "the demo has a model of keypoints"
RAW_IMAGE = pb.SampleOptions(max_quantile=1, include_rejected=True, include_js_map=True, image_encoding=pb.ENCODING_RAW)


@torch.no_grad()
def tiny_weights() -> tuple[Generator, StyleInterpreter]:
    torch.manual_seed(0)
    channels = {4: 4, 8: 4, 16: 4}
    generator = Generator(StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=16, channels=channels)).eval()
    palette = ((255, 0, 0), (0, 200, 0), (0, 0, 255))
    spec = InterpreterSpec("paper", 16, {4: 4, 8: 8, 16: 8}, 2, (4, 4), NAMES, palette, task="keypoints")
    interpreter = build_interpreter(spec).eval()
    for parameter in interpreter.parameters():
        parameter.normal_(std=0.4)
    return generator, interpreter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The small model, exported, calibrated by the program, and served."""
    directory = tmp_path_factory.mktemp("keypoints")
    repository = directory / "repository"
    export_repository(repository, TINY, tiny_weights())
    command = [sys.executable, "-m", "labelmint.cli", "calibrate", TINY, "--model-repository", str(repository)]
    done = subprocess.run([*command, "--count", "1000"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    running = start_service(directory / "serve.log", repository=repository)
    assert f"{TINY}, 16x16, 3 keypoints, gate at JS" in running.log.read_text()
    yield running
    assert running.stop() == 0


@dataclass
class Door:
    """A keypoint model and both ways to it."""

    model: str
    http: httpx.Client
    stub: pb_grpc.SampleServiceStub

    @property
    def samples(self) -> str:
        return f"/v1/models/{self.model}/samples"

    async def get(self, seed: int, options: pb.SampleOptions) -> pb.Sample:
        request = pb.GetSampleRequest(model=self.model, seed=seed, options=options)
        return (await self.stub.GetSample(request)).sample


@pytest.fixture(scope="module", params=[TINY, *COMMITTED])
def served(request: pytest.FixtureRequest) -> tuple[str, Service]:
    return request.param, request.getfixturevalue("tiny" if request.param == TINY else "service")


@pytest_asyncio.fixture(scope="module")
async def door(served: tuple[str, Service]) -> AsyncIterator[Door]:
    name, service = served
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        with httpx.Client(base_url=service.http, timeout=60.0) as client:
            yield Door(name, client, pb_grpc.SampleServiceStub(channel))


def positions(sample: pb.Sample) -> np.ndarray:
    return np.array([(point.x, point.y) for point in sample.keypoints], np.float32)


async def test_the_model_says_what_it_labels(door: Door) -> None:
    model = (await door.stub.GetModel(pb.GetModelRequest(model=door.model))).model
    assert model.task == "keypoints" and not model.classes and model.keypoint_classes
    assert model.calibration.seed_count >= 1000
    over_rest = door.http.get(f"/v1/models/{door.model}").json()
    assert (over_rest["task"], over_rest["classes"]) == ("keypoints", [])
    assert [(entry["id"], entry["name"], int(entry["rgb"][1:], 16)) for entry in over_rest["keypoint_classes"]] == [
        (index, entry.name, entry.rgb) for index, entry in enumerate(model.keypoint_classes)
    ]


async def test_a_sample_has_keypoints_and_no_label(door: Door) -> None:
    model = (await door.stub.GetModel(pb.GetModelRequest(model=door.model))).model
    sample = await door.get(7, RAW_IMAGE)
    assert not sample.HasField("label")
    assert len(sample.image.data) == 3 * model.resolution**2
    assert [point.name for point in sample.keypoints] == [entry.name for entry in model.keypoint_classes]
    assert positions(sample).min() >= 0 and positions(sample).max() <= model.resolution - 1
    js_map = np.frombuffer(sample.js_map, "<f4")
    assert js_map.size == model.resolution**2
    assert float(js_map.sum()) == pytest.approx(sample.js_score, rel=1e-4)


async def test_both_wires_say_the_same(door: Door) -> None:
    over_grpc = await door.get(7, RAW_IMAGE)
    body = door.http.get(f"{door.samples}/7", params=LOOSE_QUERY | {"encoding": "raw"}).json()
    assert body["label"] is None
    assert base64.b64decode(body["image"]["data"]) == over_grpc.image.data
    assert [pb.Keypoint(**point) for point in body["keypoints"]] == list(over_grpc.keypoints)
    assert body["js_score"] == over_grpc.js_score
    request = {"seeds": [3, 7], "encoding": "raw"} | LOOSE_QUERY
    assert door.http.post(f"{door.samples}:batchGet", json=request).json()["outcomes"][1] == body
    batch = pb.BatchGetSamplesRequest(model=door.model, seeds=[3, 7], options=RAW_IMAGE)
    assert (await door.stub.BatchGetSamples(batch)).outcomes[1].sample == over_grpc
    stream = pb.StreamSamplesRequest(model=door.model, start_seed=7, count=1, options=RAW_IMAGE)
    assert [m.sample async for m in door.stub.StreamSamples(stream) if m.HasField("sample")] == [over_grpc]


async def test_npz(door: Door) -> None:
    sample = await door.get(7, RAW_IMAGE)
    answer = door.http.get(f"{door.samples}/7.npz", params=LOOSE_QUERY)
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        assert "label" not in arrays
        np.testing.assert_array_equal(arrays["keypoints"], positions(sample))
        np.testing.assert_array_equal(arrays["confidence"], np.float32([p.confidence for p in sample.keypoints]))
        assert arrays["keypoints"].dtype == arrays["confidence"].dtype == np.float32
        assert arrays["keypoint_names"].tolist() == [point.name for point in sample.keypoints]
        assert arrays["js_map"].tobytes() == sample.js_map


def test_pictures(door: Door) -> None:
    for name in ("image", "overlay", "uncertainty"):
        answer = door.http.get(f"{door.samples}/7/{name}.png", params=LOOSE_QUERY)
        assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).mode == "RGB"


async def test_the_label_image_is_refused(door: Door) -> None:
    answer = door.http.get(f"{door.samples}/7/label.png", params=LOOSE_QUERY)
    assert problem(answer, 400, "INVALID_REQUEST") == {"field": "model"}
    assert f"model '{door.model}' has task 'keypoints' and no label image; request" in answer.json()["detail"]
    for encoding in (pb.ENCODING_RAW, pb.ENCODING_PNG):
        with pytest.raises(grpc.aio.AioRpcError, match="no label image; leave it unset") as caught:
            await door.get(7, pb.SampleOptions(max_js=1e9, label_encoding=encoding))
        assert dict(info_of(caught.value).metadata) == {"field": "options.label_encoding"}


async def test_the_gate(door: Door) -> None:
    score = (await door.get(7, LOOSE)).js_score
    assert score > 0
    assert (await door.get(7, pb.SampleOptions(max_js=score))).accepted
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.get(7, pb.SampleOptions(max_js=score * 0.999))
    assert info_of(caught.value).reason == "SAMPLE_REJECTED"


async def test_mixing(door: Door) -> None:
    plain = await door.get(7, RAW_IMAGE)
    options = {"max_js": 1e9, "crossover": 3, "image_encoding": pb.ENCODING_RAW}
    own = await door.get(7, pb.SampleOptions(style_seed=7, **options))  # type: ignore[arg-type]
    assert own.image == plain.image and own.keypoints == plain.keypoints and own.group_id
    other = await door.get(7, pb.SampleOptions(style_seed=8, **options))  # type: ignore[arg-type]
    assert other.image != plain.image and other.group_id == own.group_id


async def test_the_keypoints_are_the_interpreters(tiny: Service) -> None:
    generator, interpreter = tiny_weights()
    async with grpc.aio.insecure_channel(tiny.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        for seed in range(10):
            request = pb.GetSampleRequest(model=TINY, seed=seed, options=RAW_IMAGE)
            sample = (await stub.GetSample(request)).sample
            with torch.no_grad():
                _, features = draw(generator, seed, 1.0, layout="paper")
                keypoints, confidence, js_map, js_score = interpreter(features)
            np.testing.assert_array_equal(positions(sample), keypoints[0].numpy())
            assert [p.confidence for p in sample.keypoints] == pytest.approx(confidence[0].tolist(), rel=1e-4)
            np.testing.assert_allclose(np.frombuffer(sample.js_map, "<f4"), js_map[0].flatten().numpy(), atol=1e-5)
            assert sample.js_score == pytest.approx(float(js_score), rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "problem_"),
    [
        ("task", "depth", "unknown task 'depth'; known: segmentation, keypoints"),
        ("task", "keypoints", "lacks 'keypoint_names'"),
        ("class_names", '["a"]', "1 names of classes or keypoints but 16 colours"),
        ("num_ws", "many", "invalid literal"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(key: str, value: str, problem_: str) -> None:
    config = ensembles(REPOSITORY)["faces"]
    config.parameters[key].string_value = value
    with pytest.raises(MalformedModel, match=rf"model 'faces': .*{problem_}.*export it again"):
        read_served_model(config, "1")


def test_outputs_of_another_shape_are_refused() -> None:
    config = ensembles(REPOSITORY)["faces"]
    config.parameters["keypoint_names"].string_value = config.parameters["class_names"].string_value
    config.parameters["task"].string_value = "keypoints"
    with pytest.raises(MalformedModel, match="lacks 'keypoints'"):
        read_served_model(config, "1")
    config.output.add(name="keypoints", dims=[11, 2])
    with pytest.raises(MalformedModel, match=r"output keypoints is \[11, 2\], not \[16, 2\] as task 'keypoints'"):
        read_served_model(config, "1")


def test_a_calibration_of_another_model_is_refused() -> None:
    """The digest says what was measured; a threshold is never applied to something else."""
    config = ensembles(REPOSITORY)["faces"]
    config.parameters["model_digest"].string_value = "0" * 64
    with pytest.raises(MalformedModel, match="measured on a model with a different digest"):
        read_served_model(config, "1")


def test_a_threshold_is_a_number() -> None:
    config = ensembles(REPOSITORY)["faces"]
    calibration = json.loads(config.parameters["calibration"].string_value)
    config.parameters["calibration"].string_value = json.dumps({**calibration, "threshold": float("nan")})
    with pytest.raises(MalformedModel, match="threshold must be finite"):
        read_served_model(config, "1")
