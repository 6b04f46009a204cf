"""A class per request, over both protocols: identity, gates, refusals, caches, and classes that share a batch."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest
import pytest_asyncio

from labelmint.gateway.rest.caching import revision
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import start_service
from tests.support.conditional import CAT, DOG, FOX, NAMES, SEEDS, Kinds, kinds
from tests.support.gateways import Gateway, inferences
from tests.support.served import CATS, CONDITIONAL, MODEL
from tests.support.wire import info_of, problem

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SAMPLES = "/v1/models/kinds/samples"
ALL = {"max_js": 1e9}
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest_asyncio.fixture(scope="module")
async def model(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> AsyncIterator[Kinds]:
    async with kinds(tmp_path_factory.mktemp("kinds"), tiny_repository, held=True) as running:
        yield running


Start = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture(scope="module")
def start(model: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Start:
    @asynccontextmanager
    async def started(*arguments: str) -> AsyncIterator[Gateway]:
        directory = tmp_path_factory.mktemp("gateway")
        arguments = ("--triton-url", model.triton.grpc_url, *arguments)
        service = await asyncio.to_thread(start_service, directory / "serve.log", *arguments, repository=directory)
        async with (
            grpc.aio.insecure_channel(service.grpc) as channel,
            httpx.AsyncClient(base_url=service.http, timeout=60.0) as http,
        ):
            yield Gateway(service, pb_grpc.SampleServiceStub(channel), http)
        assert await asyncio.to_thread(service.stop) == 0, service.log.read_text()

    return started


@pytest_asyncio.fixture(scope="module")
async def gateway(start: Start) -> AsyncIterator[Gateway]:
    """It remembers its samples."""
    async with start("--cache-bytes", "20000000") as running:
        yield running


def raw(class_index: int | None, **more: Any) -> pb.SampleOptions:
    """Options that accept everything, unless `more` has another gate."""
    pixels = {"image_encoding": pb.ENCODING_RAW, "label_encoding": pb.ENCODING_RAW}
    return pb.SampleOptions(class_index=class_index, **{**pixels, **(more or ALL)})


async def get(gateway: Gateway, seed: int, options: pb.SampleOptions, model: str = "kinds") -> pb.Sample:
    return (await gateway.stub.GetSample(pb.GetSampleRequest(model=model, seed=seed, options=options))).sample


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_the_class_is_part_of_what_a_sample_is(gateway: Gateway, model: Kinds) -> None:
    for seed in (3, 5):
        samples = [await get(gateway, seed, raw(index)) for index in range(len(NAMES))]
        assert [sample.class_index for sample in samples] == [CAT, DOG, FOX]
        assert [sample.js_score for sample in samples] == [model.scores[index][seed] for index in range(len(NAMES))]
        for one, other in itertools.combinations(samples, 2):
            assert one.image.data != other.image.data and one.js_score != other.js_score
        for index, sample in enumerate(samples):  # again, and over the other protocol
            assert await get(gateway, seed, raw(index)) == sample
            told = (await gateway.http.get(f"{SAMPLES}/{seed}", params={**ALL, "class_index": index})).json()
            assert (told["class_index"], told["js_score"]) == (index, sample.js_score)


async def test_every_form_tells_the_class(gateway: Gateway) -> None:
    query = {**ALL, "class_index": DOG}
    archive = np.load(io.BytesIO((await gateway.http.get(f"{SAMPLES}/3.npz", params=query)).content))
    assert archive["class_index"] == DOG
    image = np.frombuffer((await get(gateway, 3, raw(DOG))).image.data, np.uint8)
    assert (archive["image"].ravel() == image).all()
    body = {"seeds": [3, 4], **query}
    batch = (await gateway.http.post("/v1/models/kinds/samples:batchGet", json=body)).json()
    assert [outcome["class_index"] for outcome in batch["outcomes"]] == [DOG, DOG]
    tar = (await gateway.http.get(f"{SAMPLES}.tar", params={**query, "count": 3})).content
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        texts = [members.extractfile(name) for name in members.getnames() if name.endswith(".json")]
        told = [json.load(text) for text in texts if text is not None]
    assert [(each["seed"], each["class_index"]) for each in told] == [(0, DOG), (1, DOG), (2, DOG)]
    overlays = {
        (await gateway.http.get(f"{SAMPLES}/3/overlay.png", params={**ALL, "class_index": i})).content for i in range(3)
    }
    assert len(overlays) == 3
    plain = (await gateway.http.get("/v1/models/tiny/samples/3", params=ALL)).json()
    assert "class_index" not in plain


async def test_mixed_samples_of_one_class_are_a_group(gateway: Gateway) -> None:
    mixed = {**ALL, "crossover": 2}
    groups = [
        (await get(gateway, 3, raw(index, **mixed, style_seed=style))).group_id
        for index in (CAT, DOG)
        for style in (1, 2)
    ]
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[0] != groups[2]


async def test_caches_keep_the_classes_apart(gateway: Gateway, model: Kinds) -> None:
    url, tags = f"{SAMPLES}/17/image.png", {}
    before = (await inferences(model.triton, "kinds_generator"))[0]
    for index in (CAT, DOG, FOX):
        answer = await gateway.http.get(url, params={**ALL, "class_index": index})
        assert answer.status_code == 200
        tags[answer.headers["etag"]] = answer.content
    assert len(tags) == 3 == len(set(tags.values()))
    assert (await inferences(model.triton, "kinds_generator"))[0] == before + 3
    # From the gateway's memory, and by the ETag of the same class only.
    (cat, first), *others = tags.items()
    kept = await gateway.http.get(url, params={**ALL, "class_index": CAT})
    assert (kept.headers["etag"], kept.content) == (cat, first)
    held = await gateway.http.get(url, params={**ALL, "class_index": CAT}, headers={"If-None-Match": cat})
    assert held.status_code == 304
    for tag, _ in others:
        again = await gateway.http.get(url, params={**ALL, "class_index": CAT}, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (200, first)
    assert (await inferences(model.triton, "kinds_generator"))[0] == before + 3


async def test_classes_share_a_batch_and_do_not_change_each_other(gateway: Gateway, model: Kinds, start: Start) -> None:
    """`held` is a copy of `kinds` that waits a second for a full batch, behind a gateway that remembers nothing."""
    asked = [(seed, seed % 3) for seed in range(15)] + [(0, DOG)]
    alone = [await get(gateway, seed, raw(index)) for seed, index in asked]
    before = await inferences(model.triton, "held_generator")  # Triton has warmed the model up
    async with start() as forgetful:
        together = await asyncio.gather(*(get(forgetful, seed, raw(index), "held") for seed, index in asked))
    after = await inferences(model.triton, "held_generator")
    samples, executions = (now - then for now, then in zip(after, before, strict=True))
    assert samples == len(asked) and executions <= len(asked) / 3, "classes did not share batches"
    for one, other in zip(alone, together, strict=True):
        other.model = one.model
        assert other == one


async def test_each_class_has_a_gate_of_its_own(gateway: Gateway, model: Kinds) -> None:
    assert model.thresholds[CAT] != model.thresholds[DOG]
    for index in (CAT, DOG):
        want = [score <= model.thresholds[index] for score in model.scores[index]]
        request = pb.BatchGetSamplesRequest(
            model="kinds", seeds=range(SEEDS), options=pb.SampleOptions(class_index=index)
        )
        outcomes = (await gateway.stub.BatchGetSamples(request)).outcomes
        assert [outcome.HasField("sample") for outcome in outcomes] == want and len(set(want)) == 2
        for outcome in outcomes:
            judged = outcome.sample if outcome.HasField("sample") else outcome.rejection
            assert (judged.threshold, judged.calibration_id) == (model.thresholds[index], model.calibrations[index])
        options = pb.SampleOptions(class_index=index, omit_image=True)
        walk = gateway.stub.StreamSamples(pb.StreamSamplesRequest(model="kinds", count=sum(want), options=options))
        found = [message.sample async for message in walk if message.HasField("sample")]
        assert [sample.seed for sample in found] == [seed for seed in range(SEEDS) if want[seed]]
        assert {sample.class_index for sample in found} == {index}
        metadata = problem(
            await gateway.http.get(f"{SAMPLES}/{want.index(False)}", params={"class_index": index}),
            422,
            "SAMPLE_REJECTED",
        )
        assert metadata["calibration_id"] == model.calibrations[index]


async def test_a_class_that_was_not_calibrated_needs_max_js(gateway: Gateway) -> None:
    for options in (raw(FOX, truncation_psi=1.0), raw(FOX, max_quantile=0.5)):
        error = await refusal(get(gateway, 3, options))
        assert (error.code(), info_of(error).reason) == (INVALID, "UNCALIBRATED")
        assert dict(info_of(error).metadata) == {"field": "max_js"}
        assert "class 2 (fox) of model 'kinds' is not calibrated" in str(error.details())
        assert "run `labelmint calibrate kinds --class-index 2" in str(error.details())
    assert (await get(gateway, 3, raw(FOX))).accepted
    answer = await gateway.http.get(f"{SAMPLES}/3", params={"class_index": FOX})
    assert problem(answer, 400, "UNCALIBRATED") == {"field": "max_js"}


@pytest.mark.parametrize(
    ("name", "class_index", "said"),
    [
        (
            "kinds",
            None,
            "class_index: missing; model 'kinds' has 3 generator classes, give 0 (cat) to 2 (fox) (see GetModel)",
        ),
        ("kinds", 3, "class_index: 3 is out of range; model 'kinds' has 3 generator classes, give 0 (cat) to 2 (fox)"),
        ("tiny", 0, "class_index: model 'tiny' has no generator classes; leave it unset"),
    ],
)
async def test_a_wrong_class_is_refused_before_anything_is_drawn(
    gateway: Gateway, name: str, class_index: int | None, said: str
) -> None:
    options, query = raw(class_index), {**ALL, **({} if class_index is None else {"class_index": class_index})}
    calls = [
        gateway.stub.GetSample(pb.GetSampleRequest(model=name, seed=3, options=options)),
        gateway.stub.BatchGetSamples(pb.BatchGetSamplesRequest(model=name, seeds=[3], options=options)),
        gateway.stub.StreamSamples(pb.StreamSamplesRequest(model=name, count=1, options=options)).read(),
    ]
    for call in calls:
        error = await refusal(call)
        assert (error.code(), info_of(error).reason) == (INVALID, "INVALID_REQUEST")
        assert info_of(error).metadata["field"] == "class_index" and str(error.details()).startswith(said)
    path = f"/v1/models/{name}/samples"
    answers = [await gateway.http.get(path + form, params=query) for form in ("/3", "/3/image.png", "/3.npz", ".tar")]
    answers.append(await gateway.http.post(f"{path}:batchGet", json={"seeds": [3], **query}))
    for answer in answers:
        assert problem(answer, 400, "INVALID_REQUEST") == {"field": "class_index"}
        assert answer.json()["detail"].startswith(said)


async def test_a_description_has_the_classes_and_the_calibration_of_the_one_asked_for(
    gateway: Gateway, model: Kinds
) -> None:
    for index in (None, CAT, DOG, FOX):
        asked = pb.GetModelRequest(model="kinds", class_index=index)
        described = (await gateway.stub.GetModel(asked)).model
        assert (tuple(described.generator_classes), list(described.calibrated_classes)) == (NAMES, [CAT, DOG])
        params = {} if index is None else {"class_index": index}
        told = (await gateway.http.get("/v1/models/kinds", params=params)).json()
        assert (tuple(told["generator_classes"]), told["calibrated_classes"]) == (NAMES, [CAT, DOG])
        if index in (CAT, DOG):
            assert described.calibration.id == told["calibration"]["id"] == model.calibrations[index]
            assert described.calibration.threshold == model.thresholds[index]
        else:
            assert not described.HasField("calibration") and told["calibration"] is None
    for name, index in (("kinds", 3), ("tiny", 0)):
        error = await refusal(gateway.stub.GetModel(pb.GetModelRequest(model=name, class_index=index)))
        assert (error.code(), dict(info_of(error).metadata)) == (INVALID, {"field": "class_index"})
        answer = await gateway.http.get(f"/v1/models/{name}", params={"class_index": index})
        assert problem(answer, 400, "INVALID_REQUEST") == {"field": "class_index"}
    plain = (await gateway.http.get("/v1/models/tiny")).json()
    assert plain["generator_classes"] == plain["calibrated_classes"] == []


async def test_the_quantile_of_a_score_is_that_in_its_own_class(gateway: Gateway, model: Kinds) -> None:
    name, labels = "labelmint_js_score_calibration_quantile_ratio", 'model="kinds",version="1"'

    async def counted() -> tuple[float, float]:
        below = await gateway.metric(f'{name}_bucket{{le="0.9",{labels}}}')
        return below, await gateway.metric(f"{name}_count{{{labels}}}")

    for index in (CAT, DOG, FOX):
        before = await counted()
        request = pb.BatchGetSamplesRequest(model="kinds", seeds=range(SEEDS), options=raw(index))
        await gateway.stub.BatchGetSamples(request)
        below, judged = ((now - then) for now, then in zip(await counted(), before, strict=True))
        accepted = sum(score <= model.thresholds[index] for score in model.scores[index]) if index != FOX else 0
        assert (below, judged) == (accepted, 0 if index == FOX else SEEDS)  # the gate is at the quantile 0.9


def test_a_revision_changes_with_the_classes_and_their_calibrations() -> None:
    assert revision(MODEL) == "887dbcfa7560b57f", "a model without classes keeps the revision of earlier versions"
    recalibrated = replace(CATS, threshold=CATS.threshold + 1.0)
    models = (
        CONDITIONAL,
        replace(CONDITIONAL, generator_classes=("cat", "dog", "wolf")),
        replace(CONDITIONAL, class_calibrations=(CATS, None, None)),
        replace(CONDITIONAL, class_calibrations=(recalibrated, *CONDITIONAL.class_calibrations[1:])),
    )
    assert len({revision(model) for model in models}) == len(models)
