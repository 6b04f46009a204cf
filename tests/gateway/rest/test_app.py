"""REST over a real service: what curl would see."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.metrics import IN_TRITON, metric
from tests.support.waiting import wait_for
from tests.support.wire import LOOSE_QUERY as LOOSE
from tests.support.wire import problem

pytestmark = pytest.mark.triton


SAMPLE = "/v1/models/faces/samples/7"


def test_a_pair_as_json(http: httpx.Client) -> None:
    answer = http.get(SAMPLE, params=LOOSE)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["model"] == "faces" and body["seed"] == 7
    image = Image.open(io.BytesIO(base64.b64decode(body["image"]["data"])))
    label = Image.open(io.BytesIO(base64.b64decode(body["label"]["data"])))
    assert image.size == label.size == (128, 128)
    assert (image.mode, label.mode) == ("RGB", "P")
    classes = http.get("/v1/models/faces").json()["classes"]
    assert int(np.asarray(label).max()) < len(classes) == 16


def test_raw_and_png_hold_the_same_pixels(http: httpx.Client) -> None:
    png = http.get(SAMPLE, params=LOOSE).json()
    raw = http.get(SAMPLE, params=LOOSE | {"encoding": "raw"}).json()
    for part in ("image", "label"):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png[part]["data"]))))
        assert base64.b64decode(raw[part]["data"]) == pixels.tobytes()


def test_pictures(http: httpx.Client) -> None:
    for name, mode in (("image", "RGB"), ("label", "P"), ("overlay", "RGB"), ("uncertainty", "RGB")):
        answer = http.get(f"{SAMPLE}/{name}.png", params=LOOSE)
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).mode == mode


def test_npz(http: httpx.Client) -> None:
    answer = http.get(f"{SAMPLE}.npz", params=LOOSE)
    assert answer.status_code == 200
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        assert arrays["image"].shape == (128, 128, 3) and arrays["label"].dtype == np.uint8
        assert float(arrays["js_map"].sum()) == pytest.approx(float(arrays["js_score"]), rel=1e-4)
        assert float(arrays["js_map"].min()) >= 0.0


def test_the_js_map_in_json(http: httpx.Client) -> None:
    assert http.get(SAMPLE, params=LOOSE).json()["js_map"] == ""
    body = http.get(SAMPLE, params=LOOSE | {"include_js_map": True}).json()
    with np.load(io.BytesIO(http.get(f"{SAMPLE}.npz", params=LOOSE).content), allow_pickle=False) as arrays:
        assert base64.b64decode(body["js_map"]) == arrays["js_map"].astype("<f4").tobytes()
    batch = http.post(f"{SAMPLE.rpartition('/')[0]}:batchGet", json=LOOSE | {"seeds": [7], "include_js_map": True})
    assert batch.json()["outcomes"] == [body]


def test_models(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()["models"]
    assert [model["name"] for model in models] == sorted(model["name"] for model in models)
    model = http.get("/v1/models/faces").json()
    assert model in models
    assert model["pipeline"] == "fused" and len(model["digest"]) == 64
    calibration = model["calibration"]
    assert len(calibration["quantiles"]) == 101 and calibration["seed_count"] >= 1000
    assert calibration["threshold"] == calibration["quantiles"][90]


def test_the_gate(http: httpx.Client) -> None:
    """A gate a hair above and a hair below a sample's own score."""
    score = http.get(SAMPLE, params=LOOSE).json()["js_score"]
    above = http.get(SAMPLE, params={"max_js": score})
    assert above.status_code == 200 and above.json()["accepted"] is True and above.json()["calibration_id"] == ""
    below = http.get(SAMPLE, params={"max_js": score * 0.999})
    details = problem(below, 422, "SAMPLE_REJECTED")
    assert float(details["js_score"]) == score and details["seed"] == "7"
    asked_for = http.get(SAMPLE, params={"max_js": score * 0.999, "include_rejected": True})
    assert asked_for.status_code == 200 and asked_for.json()["accepted"] is False


def test_another_truncation_needs_a_gate_of_its_own(http: httpx.Client) -> None:
    assert problem(http.get(SAMPLE, params={"truncation_psi": 0.5}), 400, "UNCALIBRATED") == {"field": "truncation_psi"}
    answer = http.get(SAMPLE, params={"truncation_psi": 0.5, "max_js": 1e9})
    assert answer.status_code == 200 and answer.json()["truncation_psi"] == 0.5


def test_batch_keeps_the_order_and_tells_rejections(http: httpx.Client) -> None:
    scores = [http.get(f"/v1/models/faces/samples/{seed}", params=LOOSE).json()["js_score"] for seed in (3, 1, 2)]
    body = {"seeds": [3, 1, 2], "max_js": sorted(scores)[1]}
    outcomes = http.post("/v1/models/faces/samples:batchGet", json=body).json()["outcomes"]
    assert [outcome["seed"] for outcome in outcomes] == [3, 1, 2]
    assert [outcome["js_score"] for outcome in outcomes] == scores
    assert sorted(outcome["accepted"] for outcome in outcomes) == [False, True, True]
    assert all(("image" in outcome) == outcome["accepted"] for outcome in outcomes)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/models/faces/samples/seven", "seed"),
        ("/v1/models/faces/samples/-1", "seed"),
        ("/v1/models/faces/samples/4294967296", "seed"),
        ("/v1/models/faces/samples/7.5", "seed"),
        ("/v1/models/faces/samples/7.0", "seed"),
        ("/v1/models/faces/samples/-0", "seed"),
        ("/v1/models/faces/samples/+7.npz", "seed"),
        ("/v1/models/faces/samples/007", "seed"),
        ("/v1/models/faces/samples/%207", "seed"),
        ("/v1/models/faces/samples/1e3/image.png", "seed"),
        ("/v1/models/faces/samples/7?truncation_psi=high", "truncation_psi"),
        ("/v1/models/faces/samples/7?truncation_psi=3", "truncation_psi"),
        ("/v1/models/faces/samples/7?truncation_psi=nan", "truncation_psi"),
        ("/v1/models/faces/samples/7?psi=1", "psi"),
        ("/v1/models/faces/samples/7?max_js=-1", "max_js"),
        ("/v1/models/faces/samples/7?max_js=1&max_quantile=0.5", "max_js"),
        ("/v1/models/faces/samples/7?max_quantile=0", "max_quantile"),
        ("/v1/models/faces/samples/7?encoding=jpeg", "encoding"),
        ("/v1/models/faces/samples/7/image.png?encoding=raw", "encoding"),
    ],
)
def test_bad_input_names_its_field(http: httpx.Client, path: str, field: str) -> None:
    assert problem(http.get(path), 400, "INVALID_REQUEST") == {"field": field}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": list(range(65))}, "seeds"),
        ({"seeds": ["1"]}, "seeds.0"),
        ({"seeds": [2**32]}, "seeds.0"),
        ({}, "seeds"),
        ({"seeds": [1], "ecoding": "raw"}, "ecoding"),
    ],
)
def test_bad_batches_name_their_field(http: httpx.Client, body: object, field: str) -> None:
    answer = http.post("/v1/models/faces/samples:batchGet", json=body)
    assert problem(answer, 400, "INVALID_REQUEST") == {"field": field}


def test_a_body_that_is_no_json(http: httpx.Client) -> None:
    answer = http.post("/v1/models/faces/samples:batchGet", content=b"{", headers={"content-type": "application/json"})
    assert problem(answer, 400, "INVALID_REQUEST") == {"field": "body"}


def test_unknown_model_names_those_that_exist(http: httpx.Client) -> None:
    for path in ("/v1/models/cats", "/v1/models/cats/samples/7", "/v1/models/cats/samples/7/overlay.png"):
        answer = http.get(path)
        assert problem(answer, 404, "MODEL_NOT_FOUND") == {"model": "cats"}
        assert "served: faces" in answer.json()["detail"]


def test_unknown_path_and_method(http: httpx.Client) -> None:
    problem(http.get("/v2/models"), 404, "NO_SUCH_ROUTE")
    problem(http.delete("/v1/models/faces"), 405, "NO_SUCH_ROUTE")


def test_health_docs_and_openapi(http: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        assert http.get(path).text == "ok\n"
    assert http.get("/docs").status_code == 200
    paths = json.loads(http.get("/openapi.json").text)["paths"]
    assert "/v1/models/{model}/samples/{seed}/overlay.png" in paths


def test_metrics_count_what_happened(http: httpx.Client) -> None:
    accepted = 'labelmint_samples_total{model="faces",outcome="accepted",version="1"}'
    rejected = 'labelmint_samples_total{model="faces",outcome="rejected",version="1"}'
    scores = 'labelmint_js_score_nats_count{model="faces",version="1"}'
    answered = (
        'labelmint_requests_total{code="422",method="/v1/models/{model}/samples/{seed}",model="faces",transport="rest"}'
    )
    names = (accepted, rejected, scores, answered)
    before = [metric(http, name) for name in names]
    assert http.get(SAMPLE, params={"max_js": 1e9}).status_code == 200
    assert http.get(SAMPLE, params={"max_js": 0}).status_code == 422
    wait_for(lambda: metric(http, answered) == before[-1] + 1)  # it is counted after its last byte
    after = [metric(http, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 2, 1]
    wait_for(lambda: metric(http, IN_TRITON) == 0)


def test_a_flood_of_bad_names_does_not_grow_the_metrics(http: httpx.Client) -> None:
    http.get("/v1/models/nope/samples/1")
    before = len(http.get("/metrics").text.splitlines())
    for number in range(50):
        http.get(f"/v1/models/nope{number}/samples/1")
        http.get(f"/nowhere/{number}")
    assert len(http.get("/metrics").text.splitlines()) <= before + 20
