"""Style mixing over a real service: one shape, many appearances.

The demo's generator was trained with layer 7 as the border between geometry and appearance.
"""

import base64
import io
from itertools import combinations

import grpc
import grpc.aio
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.support.wire import LOOSE_QUERY as LOOSE
from tests.support.wire import RAW, info_of, problem

pytestmark = pytest.mark.triton


CROSSOVER = 7
NUM_WS = 12
NUM_CLASSES = 16
ANY = {"max_js": 1e9}
SAMPLE = "/v1/models/faces/samples/7"
BATCH = "/v1/models/faces/samples:batchGet"
Stub = pb_grpc.SampleServiceStub
Array = npt.NDArray[np.uint8]


def mixed(**options: object) -> pb.SampleOptions:
    return pb.SampleOptions(
        **{"max_js": 1e9, "crossover": CROSSOVER} | options,  # type: ignore[arg-type]
        image_encoding=pb.ENCODING_RAW,
        label_encoding=pb.ENCODING_RAW,
    )


async def get(stub: Stub, seed: int, options: pb.SampleOptions) -> pb.Sample:
    return (await stub.GetSample(pb.GetSampleRequest(model="faces", seed=seed, options=options))).sample


async def group(stub: Stub, seed: int, style_seeds: list[int]) -> list[pb.Sample]:
    request = pb.BatchGetSamplesRequest(
        model="faces", seeds=[seed] * len(style_seeds), style_seeds=style_seeds, options=mixed()
    )
    return [outcome.sample for outcome in (await stub.BatchGetSamples(request)).outcomes]


def pixels(data: pb.Pixels) -> Array:
    return np.frombuffer(data.data, np.uint8).reshape(data.height, data.width, data.channels)


def difference(one: pb.Sample, other: pb.Sample) -> float:
    """Mean absolute difference of two images, in levels of 255."""
    return float(np.abs(pixels(one.image).astype(int) - pixels(other.image)).mean())


async def test_one_shape_in_many_appearances(stub: Stub) -> None:
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    differences, groups = [], []
    for seed in range(12):
        members = await group(stub, seed, [1000, 1001, 1002, 1003])
        assert [(member.seed, member.style_seed) for member in members] == [(seed, 1000 + k) for k in range(4)]
        (group_id,) = {member.group_id for member in members}
        groups.append(group_id)
        for one, other in combinations(members, 2):
            np.add.at(confusion, (pixels(one.label).ravel(), pixels(other.label).ravel()), 1)
            differences.append(difference(one, other))
    intersection = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    present = union > 0
    assert float((intersection[present] / union[present]).mean()) >= 0.8
    assert min(differences) > 20  # levels of 255
    assert len(set(groups)) == 12


async def test_a_seed_in_its_own_style_is_the_unmixed_sample(stub: Stub) -> None:
    plain = await get(stub, 7, RAW)
    assert not plain.HasField("style_seed") and not plain.HasField("crossover") and plain.group_id == ""
    for crossover in (1, CROSSOVER, NUM_WS - 1):
        own = await get(stub, 7, mixed(style_seed=7, crossover=crossover))
        assert (own.style_seed, own.crossover) == (7, crossover) and len(own.group_id) == 16
        assert own.image == plain.image and own.label == plain.label


async def test_the_crossovers_extremes(stub: Stub) -> None:
    """The last layer only colours the finished picture; after the first one hardly anything of the shape is left."""
    shape, style = await get(stub, 7, RAW), await get(stub, 3, RAW)
    last = await get(stub, 7, mixed(style_seed=3, crossover=NUM_WS - 1))
    assert last.label == shape.label and last.image != shape.image
    first = await get(stub, 7, mixed(style_seed=3, crossover=1))
    assert difference(first, style) < difference(first, shape)
    assert first.image != style.image


async def test_both_wires_and_a_batch_say_the_same(stub: Stub, http: httpx.Client) -> None:
    over_grpc = await get(stub, 7, mixed(style_seed=3))
    assert over_grpc in await group(stub, 7, [1, 3, 2])
    query = ANY | {"style_seed": 3, "crossover": CROSSOVER}
    over_rest = http.get(SAMPLE, params=query | {"encoding": "raw"}).json()
    for part in ("image", "label"):
        assert base64.b64decode(over_rest[part]["data"]) == getattr(over_grpc, part).data
    assert (over_rest["style_seed"], over_rest["crossover"]) == (3, CROSSOVER)
    assert over_rest["group_id"] == over_grpc.group_id and over_rest["calibration_id"] == ""
    body = ANY | {"seeds": [7, 7], "style_seeds": [1, 3], "crossover": CROSSOVER, "encoding": "raw"}
    assert http.post(BATCH, json=body).json()["outcomes"][1] == over_rest
    whole = ANY | {"seeds": [7], "style_seed": 3, "crossover": CROSSOVER, "encoding": "raw"}
    assert http.post(BATCH, json=whole).json()["outcomes"] == [over_rest]
    assert http.get(SAMPLE, params=LOOSE).json()["style_seed"] is None


async def test_every_route_of_a_sample_mixes(stub: Stub, http: httpx.Client) -> None:
    sample = await get(stub, 7, mixed(style_seed=3))
    query = ANY | {"style_seed": 3, "crossover": CROSSOVER}
    for part in ("image", "label"):
        picture = np.asarray(Image.open(io.BytesIO(http.get(f"{SAMPLE}/{part}.png", params=query).content)))
        assert picture.tobytes() == getattr(sample, part).data
    with np.load(io.BytesIO(http.get(f"{SAMPLE}.npz", params=query).content), allow_pickle=False) as arrays:
        assert arrays["image"].tobytes() == sample.image.data
        assert arrays["style_seed"] == 3 and str(arrays["group_id"]) == sample.group_id
    for part in ("overlay", "uncertainty"):
        plain, other = (http.get(f"{SAMPLE}/{part}.png", params=p).content for p in (ANY, query))
        assert other.startswith(b"\x89PNG") and other != plain


async def test_a_stream_of_many_shapes_in_one_appearance(stub: Stub) -> None:
    request = pb.StreamSamplesRequest(model="faces", start_seed=20, count=5, options=mixed(style_seed=3))
    samples = [m.sample async for m in stub.StreamSamples(request) if m.HasField("sample")]
    assert [sample.seed for sample in samples] == list(range(20, 25))
    assert {sample.style_seed for sample in samples} == {3} and len({sample.group_id for sample in samples}) == 5
    assert samples[2] == await get(stub, 22, mixed(style_seed=3))


async def test_a_model_tells_its_layers(stub: Stub, http: httpx.Client) -> None:
    model = (await stub.GetModel(pb.GetModelRequest(model="faces"))).model
    assert model.num_ws == http.get("/v1/models/faces").json()["num_ws"] == NUM_WS


BAD: list[tuple[dict[str, object], str, str]] = [
    (ANY | {"style_seed": 3}, "INVALID_REQUEST", "crossover"),
    (ANY | {"crossover": 7}, "INVALID_REQUEST", "style_seed"),
    (ANY | {"style_seed": 3, "crossover": 0}, "INVALID_REQUEST", "crossover"),
    (ANY | {"style_seed": 3, "crossover": NUM_WS}, "INVALID_REQUEST", "crossover"),
    (ANY | {"style_seed": 2**32, "crossover": 7}, "INVALID_REQUEST", "style_seed"),
    ({"style_seed": 3, "crossover": 7}, "UNCALIBRATED", "crossover"),
    ({"style_seed": 3, "crossover": 7, "max_quantile": 1.0}, "UNCALIBRATED", "crossover"),
]
BAD_BATCHES: list[tuple[dict[str, object], list[int], str]] = [
    (ANY, [1, 2], "crossover"),
    (ANY | {"crossover": 7}, [1], "style_seeds"),
    (ANY | {"crossover": 7, "style_seed": 1}, [1, 2], "style_seed"),
    (ANY | {"crossover": NUM_WS}, [1, 2], "crossover"),
]


@pytest.mark.parametrize(("options", "reason", "field"), BAD)
async def test_bad_mixings(stub: Stub, http: httpx.Client, options: dict[str, object], reason: str, field: str) -> None:
    message = pb.SampleOptions(**options)  # type: ignore[arg-type]
    calls = (
        stub.GetSample(pb.GetSampleRequest(model="faces", seed=7, options=message)),
        stub.BatchGetSamples(pb.BatchGetSamplesRequest(model="faces", seeds=[7], options=message)),
        stub.StreamSamples(pb.StreamSamplesRequest(model="faces", count=1, options=message)).read(),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        info = info_of(caught.value)
        assert (info.reason, info.metadata["field"]) == (reason, field)  # a stream adds next_seed
    for answer in (
        http.get(SAMPLE, params=options),  # type: ignore[arg-type]
        http.get(f"{SAMPLE}/overlay.png", params=options),  # type: ignore[arg-type]
        http.post(BATCH, json=options | {"seeds": [7]}),
    ):
        assert problem(answer, 400, reason) == {"field": field}


@pytest.mark.parametrize(("options", "style_seeds", "field"), BAD_BATCHES)
async def test_bad_batches(
    stub: Stub, http: httpx.Client, options: dict[str, object], style_seeds: list[int], field: str
) -> None:
    message = pb.SampleOptions(**options)  # type: ignore[arg-type]
    request = pb.BatchGetSamplesRequest(model="faces", seeds=[7, 7], style_seeds=style_seeds, options=message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.BatchGetSamples(request)
    assert dict(info_of(caught.value).metadata) == {"field": field}
    answer = http.post(BATCH, json=options | {"seeds": [7, 7], "style_seeds": style_seeds})
    assert problem(answer, 400, "INVALID_REQUEST") == {"field": field}


async def test_the_refusal_tells_which_gate_may_be_given(http: httpx.Client) -> None:
    query = {"style_seed": 3, "crossover": CROSSOVER}
    threshold = http.get("/v1/models/faces").json()["calibration"]["threshold"]
    assert f"the calibrated threshold, {threshold:g}" in http.get(SAMPLE, params=query).json()["detail"]
    answer = http.get(SAMPLE, params=query | {"max_js": threshold, "include_rejected": True})
    assert answer.status_code == 200 and answer.json()["threshold"] == threshold
