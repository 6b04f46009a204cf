"""Content conditions and ignored pixels over both protocols, compared with a filter of the unfiltered walk.

Rules of this file:
- `light` has the classes a and b and 64x64 pixels. The reference is one stream of all its samples, and plain Python.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import random
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc.aio
import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.support.gateways import Gateway, StartGateway
from tests.support.wire import LOOSE, info_of, problem

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SEEDS = 96
ALL = pb.SampleOptions(max_js=1e9, image_encoding=pb.ENCODING_RAW, label_encoding=pb.ENCODING_RAW, include_js_map=True)
SAMPLES = "/v1/models/light/samples"


@dataclass(frozen=True)
class Drawn:
    """The conditions and the gate of a request, in every form, and what they let through."""

    area: tuple[float, float] | None  # of class a
    other: float | None  # most of class b
    max_js: float
    include_rejected: bool

    @property
    def where(self) -> list[str]:
        area = [] if self.area is None else [f"a:{self.area[0]!r}..{self.area[1]!r}"]
        return area + ([] if self.other is None else [f"b:..{self.other!r}"])

    @property
    def query(self) -> dict[str, Any]:
        return {"where": self.where, "max_js": self.max_js, "include_rejected": self.include_rejected}

    def message(self, **more: Any) -> pb.SampleOptions:
        where = [] if self.area is None else [pb.Condition(name="a", min_area=self.area[0], max_area=self.area[1])]
        where += [] if self.other is None else [pb.Condition(name="b", max_area=self.other)]
        return pb.SampleOptions(where=where, max_js=self.max_js, include_rejected=self.include_rejected, **more)

    def outcome(self, sample: pb.Sample) -> str:
        shares = shares_of(sample)
        fits = self.area is None or self.area[0] <= shares["a"] <= self.area[1]
        fits = fits and (self.other is None or shares["b"] <= self.other)
        if sample.js_score > self.max_js:
            return ("kept" if fits else "lost") if self.include_rejected else "rejected"
        return "accepted" if fits else "filtered"


def stream(gateway: Gateway, **arguments: Any) -> Any:
    return gateway.stub.StreamSamples(pb.StreamSamplesRequest(model="light", **arguments))


def measured(message: pb.Sample | pb.Filtered) -> list[tuple[str, float]]:
    return [(each.name, each.value) for each in message.content]


def label_of(sample: pb.Sample) -> np.ndarray[Any, Any]:
    return np.frombuffer(sample.label.data, np.uint8).reshape(64, 64)


def shares_of(sample: pb.Sample) -> dict[str, float]:
    values = label_of(sample).ravel().tolist()
    return {"a": values.count(0) / 4096, "b": values.count(1) / 4096}


@pytest_asyncio.fixture(scope="module")
async def everything(gateway: Gateway) -> list[pb.Sample]:
    messages = [m.sample async for m in stream(gateway, count=SEEDS, options=ALL) if m.HasField("sample")]
    assert len({shares_of(sample)["a"] for sample in messages}) > SEEDS / 2, "the areas differ"
    return messages


@pytest.fixture(scope="module")
def drawn(everything: list[pb.Sample]) -> list[Drawn]:
    """Random conditions and gates around what occurs, bounds that are met exactly among them."""
    draw = random.Random(0)
    areas, scores = [shares_of(sample)["a"] for sample in everything], [sample.js_score for sample in everything]
    found = []
    for _ in range(16):
        low, high = sorted(draw.sample(areas, 2))
        area = draw.choice([None, (low, high), (low, 1.0), (0.0, high)])
        other = draw.choice([None, 1 - draw.choice(areas)])
        if area is None and other is None:
            area = (low, high)
        if area is None or other is None or area[1] + other >= 1.0:  # else no image can be like that
            found.append(Drawn(area, other, draw.choice([1e9, draw.choice(scores)]), draw.random() < 0.3))
    assert len(found) >= 10 and any(each.include_rejected for each in found)
    return found


async def test_a_walk_is_the_filter_of_the_unfiltered_walk(
    gateway: Gateway, everything: list[pb.Sample], drawn: list[Drawn]
) -> None:
    for options in drawn:
        outcomes = {sample.seed: options.outcome(sample) for sample in everything}
        want = [seed for seed, outcome in outcomes.items() if outcome in ("accepted", "kept")]
        if not want:
            continue
        asked = options.message(omit_image=True, label_encoding=pb.ENCODING_RAW)
        messages = [m async for m in stream(gateway, count=len(want), options=asked, window=7)]
        got = [message.sample.seed for message in messages if message.HasField("sample")]
        assert got == want, options
        for message in messages:
            passed = [outcome for seed, outcome in outcomes.items() if seed < message.next_seed]
            assert message.filtered_count == passed.count("filtered"), options
            assert message.rejected_count == sum(passed.count(each) for each in ("rejected", "kept", "lost")), options
            if message.HasField("sample"):
                original = everything[message.sample.seed]
                assert message.sample.label == original.label
                shares = shares_of(original)
                names = (["a"] if options.area else []) + (["b"] if options.other is not None else [])
                assert measured(message.sample) == [(name, shares[name]) for name in names]


async def test_an_archive_has_the_samples_of_the_stream(
    gateway: Gateway, everything: list[pb.Sample], drawn: list[Drawn]
) -> None:
    for options in drawn[:6]:
        want = [sample.seed for sample in everything if options.outcome(sample) in ("accepted", "kept")]
        if not want:
            continue
        answer = await gateway.http.get(f"{SAMPLES}.tar", params={**options.query, "count": len(want)})
        assert answer.status_code == 200, answer.text
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            told = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]  # type: ignore[arg-type]
        assert [each["seed"] for each in told] == want
        for each in told:
            shares = shares_of(everything[each["seed"]])
            assert each["content"] == {name: shares[name] for name in each["content"]} != {}


async def test_single_samples_and_batches_agree_over_both_protocols(
    gateway: Gateway, everything: list[pb.Sample], drawn: list[Drawn]
) -> None:
    seen = set()
    for options, seed in itertools.product(drawn[:8], range(0, 24, 2)):
        outcome = options.outcome(everything[seed])
        seen.add(outcome)
        shares = {text.split(":")[0]: shares_of(everything[seed])[text[0]] for text in options.where}
        rest = await gateway.http.get(f"{SAMPLES}/{seed}", params=options.query)
        request = pb.GetSampleRequest(model="light", seed=seed, options=options.message())
        if outcome in ("accepted", "kept"):
            sample = (await gateway.stub.GetSample(request)).sample
            assert dict(measured(sample)) == rest.json()["content"] == shares
            continue
        reason = "SAMPLE_REJECTED" if outcome == "rejected" else "CONTENT_MISSING"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.GetSample(request)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        info = info_of(caught.value)
        assert info.reason == reason and dict(info.metadata) == problem(rest, 422, reason)
        assert rest.json()["detail"] == caught.value.details()
        if reason == "CONTENT_MISSING":
            assert json.loads(info.metadata["content"]) == shares and info.metadata["seed"] == str(seed)
    assert seen >= {"accepted", "filtered", "rejected"}
    for options in drawn[:8]:
        batch = pb.BatchGetSamplesRequest(model="light", seeds=range(24), options=options.message())
        outcomes = (await gateway.stub.BatchGetSamples(batch)).outcomes
        body = {**options.query, "seeds": list(range(24))}
        (listed,) = (await gateway.http.post(f"{SAMPLES}:batchGet", json=body)).json().values()
        for sample, outcome, entry in zip(everything, outcomes, listed, strict=False):
            wanted = options.outcome(sample)
            kind = {"rejected": "rejection", "filtered": "filtered", "lost": "filtered"}.get(wanted, "sample")
            assert outcome.WhichOneof("outcome") == kind
            found = getattr(outcome, kind)
            assert found.seed == entry["seed"] == sample.seed
            assert ("image" in entry, entry.get("filtered", False)) == (kind == "sample", kind == "filtered")
            if kind == "filtered":
                assert dict(measured(found)) == entry["content"]


async def test_a_filtered_walk_cut_after_each_message_delivers_each_seed_once(
    gateway: Gateway, everything: list[pb.Sample]
) -> None:
    low = float(np.median([shares_of(sample)["a"] for sample in everything]))
    options = pb.SampleOptions(max_js=1e9, omit_image=True, where=[pb.Condition(name="a", min_area=low)])
    want = [sample.seed for sample in everything if shares_of(sample)["a"] >= low][:12]
    got, next_seed, filtered = [], 0, 0
    while len(got) < len(want):
        call = stream(gateway, start_seed=next_seed, window=3, options=options)
        message = await call.read()
        call.cancel()
        next_seed, filtered = message.next_seed, filtered + message.filtered_count
        got += [message.sample.seed] if message.HasField("sample") else []
    assert got == want and filtered == want[-1] + 1 - len(want)


async def test_shards_of_a_filtered_walk_are_disjoint_and_whole(gateway: Gateway, everything: list[pb.Sample]) -> None:
    low = float(np.median([shares_of(sample)["a"] for sample in everything]))
    options = pb.SampleOptions(max_js=1e9, omit_image=True, where=[pb.Condition(name="a", min_area=low)])
    want = {sample.seed for sample in everything if shares_of(sample)["a"] >= low}
    found: list[int] = []
    for shard in range(3):
        mine = [seed for seed in sorted(want) if seed % 3 == shard]
        call = stream(gateway, count=len(mine), shard_index=shard, shard_count=3, options=options)
        found += [message.sample.seed async for message in call if message.HasField("sample")]
    assert sorted(found) == sorted(want)


async def test_a_heartbeat_counts_what_was_filtered_and_the_gate_comes_first(
    gateway: Gateway, everything: list[pb.Sample]
) -> None:
    nothing = [pb.Condition(name="a", min_area=1.0), pb.Condition(name="b", max_area=0.0)]
    gate = float(np.median([sample.js_score for sample in everything]))
    call = stream(gateway, options=pb.SampleOptions(max_js=gate, where=nothing))
    beat = await call.read()
    call.cancel()
    assert not beat.HasField("sample") and beat.rejected_count + beat.filtered_count == beat.next_seed > 0
    known = min(beat.next_seed, SEEDS)
    if beat.next_seed <= SEEDS:
        assert beat.rejected_count == sum(sample.js_score > gate for sample in everything[:known])
    assert beat.rejected_count > 0 and beat.filtered_count > 0


async def test_the_last_filtered_seeds_are_told(gateway: Gateway) -> None:
    options = pb.SampleOptions(max_js=1e9, where=[pb.Condition(name="a", min_area=1.0)])
    messages = [message async for message in stream(gateway, start_seed=2**32 - 3, options=options)]
    last = messages[-1]
    assert not last.HasField("sample")
    assert (last.next_seed, last.rejected_count, last.filtered_count) == (2**32, 0, 3)


@pytest_asyncio.fixture(scope="module")
async def impatient(start_gateway: StartGateway) -> AsyncIterator[Gateway]:
    async with start_gateway("--max-empty-seeds", "30", "--cache-bytes", "10000000") as running:
        yield running


async def test_a_condition_that_nothing_satisfies_ends_the_walk(impatient: Gateway) -> None:
    """It ends by an error that says where to go on; a walk with samples in between goes on for ever."""
    options = pb.SampleOptions(max_js=1e9, omit_image=True, where=[pb.Condition(name="a", min_area=1.0)])
    call = stream(impatient, start_seed=7, shard_index=1, shard_count=2, options=options)
    messages = []
    with pytest.raises(
        grpc.aio.AioRpcError, match=r"none of 30 seeds in a row gave a sample with where a:1\.\.;"
    ) as caught:
        async for message in call:
            messages.append(message)
    info = info_of(caught.value)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION and info.reason == "CONTENT_NOT_FOUND"
    assert dict(info.metadata) == {"seed_count": "30", "next_seed": str(7 + 2 * 29 + 1)}
    assert (messages[-1].next_seed, messages[-1].filtered_count) == (7 + 2 * 29 + 1, 30)
    answer = await impatient.http.get(f"{SAMPLES}.tar", params={"max_js": 1e9, "where": "a:1..", "start_seed": 5})
    assert problem(answer, 422, "CONTENT_NOT_FOUND") == {"seed_count": "30", "next_seed": "35"}
    assert answer.headers["cache-control"] == "no-store"
    # Without conditions, a walk that delivers nothing goes on as before.
    call = stream(impatient, options=pb.SampleOptions(max_js=0))
    beats = [await call.read() for _ in range(2)]
    call.cancel()
    assert beats[1].next_seed > 30


async def test_only_a_run_of_seeds_without_a_sample_counts(impatient: Gateway, everything: list[pb.Sample]) -> None:
    areas = [shares_of(sample)["a"] for sample in everything]

    def longest_run(low: float) -> int:
        misses = [list(run) for hit, run in itertools.groupby(areas, lambda area: area >= low) if not hit]
        return max((len(run) for run in misses), default=0)

    low = max(area for area in areas if longest_run(area) < 30)
    want = [seed for seed, area in enumerate(areas) if area >= low]
    assert want[-1] + 1 - len(want) > 30, "more than 30 seeds are filtered altogether"
    options = pb.SampleOptions(max_js=1e9, omit_image=True, where=[pb.Condition(name="a", min_area=low)])
    messages = stream(impatient, count=len(want), options=options)
    assert [message.sample.seed async for message in messages if message.HasField("sample")] == want


async def test_an_archive_that_finds_no_more_is_cut_inside_a_member(
    impatient: Gateway, everything: list[pb.Sample]
) -> None:
    """Nobody takes it for a complete one; it goes on at the last `next_seed`."""
    area = shares_of(everything[3])["a"]
    where = f"a:{area!r}..{area!r}"
    params = {"max_js": 1e9, "where": where, "start_seed": 3, "count": 90}
    received = b""
    with pytest.raises(httpx.RemoteProtocolError):
        async with impatient.http.stream("GET", f"{SAMPLES}.tar", params=params) as answer:
            assert answer.status_code == 200
            async for part in answer.aiter_raw():
                received += part
    with pytest.raises(tarfile.ReadError), tarfile.open(fileobj=io.BytesIO(received)) as archive:
        for member in archive.getmembers():
            archive.extractfile(member).read()  # type: ignore[union-attr]


async def test_metrics_count_the_outcome(impatient: Gateway, everything: list[pb.Sample], drawn: list[Drawn]) -> None:
    def name(outcome: str) -> str:
        return f'labelmint_samples_total{{model="light",outcome="{outcome}",version="1"}}'

    for options in drawn[:4]:
        before = {each: await impatient.metric(name(each)) for each in ("accepted", "rejected", "filtered")}
        batch = pb.BatchGetSamplesRequest(model="light", seeds=range(24), options=options.message())
        await impatient.stub.BatchGetSamples(batch)
        outcomes = [options.outcome(sample) for sample in everything[:24]]
        wanted = {"accepted": outcomes.count("accepted"), "filtered": outcomes.count("filtered")}
        wanted["rejected"] = 24 - sum(wanted.values())
        assert {each: await impatient.metric(name(each)) - before[each] for each in before} == wanted


async def test_a_cached_sample_is_filtered_by_the_conditions_of_each_request(
    impatient: Gateway, everything: list[pb.Sample]
) -> None:
    area = shares_of(everything[0])["a"]
    for bounds, status in ((f"a:{area!r}..", 200), (f"a:..{area / 2!r}", 422), ("a:0..1", 200)):
        answer = await impatient.http.get(f"{SAMPLES}/0", params={"max_js": 1e9, "where": bounds})
        assert answer.status_code == status
    omitted = pb.SampleOptions(max_js=1e9, omit_label=True, where=[pb.Condition(name="a", min_area=0)])
    sample = (await impatient.stub.GetSample(pb.GetSampleRequest(model="light", seed=0, options=omitted))).sample
    assert not sample.HasField("label") and dict(measured(sample)) == {"a": area}
    both = [pb.Condition(name="b", min_area=0), pb.Condition(name="a", min_area=0)]
    request = pb.GetSampleRequest(model="light", seed=0, options=pb.SampleOptions(max_js=1e9, where=both))
    assert measured((await impatient.stub.GetSample(request)).sample) == [("b", 1 - area), ("a", area)]


async def test_conditions_and_ignored_pixels_are_part_of_what_identifies_a_response(gateway: Gateway) -> None:
    queries = ["", "where=a:0..", "where=a:0..0.9", "where=a:0..&where=b:0..", "ignore_js_quantile=0.5"]
    etags = {}
    for query in queries:
        for path in (f"{SAMPLES}/3", f"{SAMPLES}/3/label.png", f"{SAMPLES}/3.npz", f"{SAMPLES}.tar"):
            url = f"{path}?max_js=1e9{'&count=1' if path.endswith('tar') else ''}{'&' + query if query else ''}"
            answer = await gateway.http.get(url)
            etags[url] = answer.headers["etag"] if answer.status_code == 200 else f"none {url}"
            if answer.status_code == 200:
                again = await gateway.http.get(url, headers={"if-none-match": etags[url]})
                assert again.status_code == 304
    assert len(set(etags.values())) == len(queries) * 4
    revision = (await gateway.http.get("/v1/models/light")).json()["revision"]
    params = {"max_js": 1e9, "where": "a:1..", "revision": revision}
    missing = await gateway.http.get(f"{SAMPLES}/3", params=params)
    assert problem(missing, 422, "CONTENT_MISSING") and "immutable" in missing.headers["cache-control"]


@pytest.mark.parametrize(
    ("message", "text", "field", "told"),
    [
        (pb.Condition(name="hat", min_area=0.5), "hat:0.5..", "where", "has no such name; its classes: a, b"),
        (pb.Condition(name="a", min_area=2), "a:2..", "where", "a:2..: is out of range"),
        (pb.Condition(name="a", min_area=0.5, max_area=0.1), "a:0.5..0.1", "where", "the minimum is above the maximum"),
        (pb.Condition(name="a"), None, "where", "has no bound"),
        (pb.Condition(name="a", max_area=math.nan), None, "where", "out of range"),
        (None, "a>0.5", "where", "'a>0.5' is not a condition; write NAME:MIN..MAX"),
        (
            pb.Condition(name="a", min_area=0.5, max_confidence=0.5),
            None,
            "where",
            "'a' has max_confidence, and model 'light' has task 'segmentation'; give min_area or max_area",
        ),
    ],
)
async def test_a_wrong_condition_is_one_error_everywhere(
    gateway: Gateway, message: pb.Condition | None, text: str | None, field: str, told: str
) -> None:
    details = set()
    if message is not None:
        options = pb.SampleOptions(max_js=1e9, where=[message])
        for call in (
            gateway.stub.GetSample(pb.GetSampleRequest(model="light", options=options)),
            gateway.stub.BatchGetSamples(pb.BatchGetSamplesRequest(model="light", seeds=[1], options=options)),
            stream(gateway, options=options).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            info = info_of(caught.value)
            assert info.reason == "INVALID_REQUEST" and info.metadata["field"] == field
            details.add(caught.value.details())
    if text is not None:
        for path in (f"{SAMPLES}/1", f"{SAMPLES}/1/image.png", f"{SAMPLES}.tar"):
            answer = await gateway.http.get(f"{path}?max_js=1e9&where={quote(text)}")
            assert problem(answer, 400, "INVALID_REQUEST") == {"field": field}
            details.add(answer.json()["detail"])
        body = {"seeds": [1], "max_js": 1e9, "where": [text]}
        answer = await gateway.http.post(f"{SAMPLES}:batchGet", json=body)
        assert problem(answer, 400, "INVALID_REQUEST") == {"field": field}
        details.add(answer.json()["detail"])
    assert len(details) == 1 and told in details.pop()


def ignoring(sample: pb.Sample, quantile: float) -> np.ndarray[Any, Any]:
    """The label with 255 above the quantile of the image's own JS map, by sorting."""
    js_map = np.frombuffer(sample.js_map, "<f4").reshape(64, 64)
    limit = sorted(js_map.ravel().tolist())[math.ceil(quantile * (js_map.size - 1))]
    return np.where(js_map > limit, 255, label_of(sample)).astype(np.uint8)


async def test_ignored_pixels_are_255_in_every_form(gateway: Gateway, everything: list[pb.Sample]) -> None:
    for quantile in (0.0, 0.37, 0.9, 1.0):
        raw = pb.SampleOptions(max_js=1e9, label_encoding=pb.ENCODING_RAW, ignore_js_quantile=quantile)
        messages = stream(gateway, count=6, options=raw)
        streamed = [message.sample async for message in messages if message.HasField("sample")]
        params = {"max_js": 1e9, "ignore_js_quantile": quantile, "count": 6}
        answer = await gateway.http.get(f"{SAMPLES}.tar", params=params)
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            parts = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        tarred = [np.load(io.BytesIO(data)) for name, data in parts.items() if name.endswith("label.npy")]
        told = [json.loads(data)["ignore_js_quantile"] for name, data in parts.items() if name.endswith("json")]
        assert told == [quantile] * 6
        for sample, member in zip(streamed, tarred, strict=True):
            original, query = everything[sample.seed], {"max_js": 1e9, "ignore_js_quantile": quantile}
            want = ignoring(original, quantile)
            assert (want == 255).any() == (quantile < 1.0)
            assert np.array_equal(label_of(sample), want) and np.array_equal(member, want)
            assert not sample.js_map and sample.ignore_js_quantile == quantile
            raw_json = (await gateway.http.get(f"{SAMPLES}/{sample.seed}", params={**query, "encoding": "raw"})).json()
            assert base64.b64decode(raw_json["label"]["data"]) == want.tobytes()
            assert raw_json["ignore_js_quantile"] == quantile and raw_json["js_map"] == ""
            png = await gateway.http.get(f"{SAMPLES}/{sample.seed}/label.png", params=query)
            picture = Image.open(io.BytesIO(png.content))
            assert picture.mode == "P" and np.array_equal(np.asarray(picture), want)
            if quantile == 1.0:  # nothing is ignored: the bytes of a label without the option
                plain = await gateway.http.get(f"{SAMPLES}/{sample.seed}/label.png", params={"max_js": 1e9})
                assert plain.content == png.content
            else:
                assert picture.getpalette()[255 * 3 :] == [224, 224, 192]  # type: ignore[index]
            with np.load(
                io.BytesIO((await gateway.http.get(f"{SAMPLES}/{sample.seed}.npz", params=query)).content)
            ) as npz:
                assert np.array_equal(npz["label"], want) and np.array_equal(
                    npz["image"].ravel(), list(original.image.data)
                )
            overlay = await gateway.http.get(f"{SAMPLES}/{sample.seed}/overlay.png", params=query)
            assert overlay.status_code == 200
    both = pb.SampleOptions(
        max_js=1e9, label_encoding=pb.ENCODING_RAW, ignore_js_quantile=0.5, include_js_map=True,
        where=[pb.Condition(name="a", min_area=0)],
    )  # fmt: skip
    sample = (await gateway.stub.GetSample(pb.GetSampleRequest(model="light", seed=4, options=both))).sample
    assert sample.js_map == everything[4].js_map and np.array_equal(label_of(sample), ignoring(everything[4], 0.5))
    assert dict(measured(sample)) == {"a": shares_of(everything[4])["a"]}, "measured before pixels are ignored"


async def test_keypoints_have_confidences(stub: pb_grpc.SampleServiceStub, http: httpx.Client) -> None:
    model = "faces_keypoints"
    batch = pb.BatchGetSamplesRequest(model=model, seeds=range(12), options=LOOSE)
    samples = [outcome.sample for outcome in (await stub.BatchGetSamples(batch)).outcomes]
    name = samples[0].keypoints[0].name
    confidences = [sample.keypoints[0].confidence for sample in samples]
    low = sorted(confidences)[6]
    where = [pb.Condition(name=name, min_confidence=low)]
    options = pb.SampleOptions(max_quantile=1.0, include_rejected=True, omit_image=True, omit_label=True, where=where)
    batch = pb.BatchGetSamplesRequest(model=model, seeds=range(12), options=options)
    outcomes = (await stub.BatchGetSamples(batch)).outcomes
    assert [outcome.HasField("sample") for outcome in outcomes] == [confidence >= low for confidence in confidences]
    for outcome, confidence in zip(outcomes, confidences, strict=True):
        found = outcome.sample if outcome.HasField("sample") else outcome.filtered
        assert dict(measured(found)) == {name: confidence}
    body = {"seeds": list(range(12)), "max_quantile": 1, "include_rejected": True, "where": [f"{name}:{low!r}.."]}
    (listed,) = http.post(f"/v1/models/{model}/samples:batchGet", json=body).json().values()
    assert ["filtered" not in entry for entry in listed] == [confidence >= low for confidence in confidences]
    answer = http.get(f"/v1/models/{model}/samples/0", params={"max_quantile": 1, "ignore_js_quantile": 0.5})
    assert problem(answer, 400, "INVALID_REQUEST") == {"field": "ignore_js_quantile"}
    wrong = pb.SampleOptions(max_quantile=1.0, where=[pb.Condition(name=name, min_area=0.5)])
    with pytest.raises(grpc.aio.AioRpcError, match="give min_confidence or max_confidence"):
        await stub.GetSample(pb.GetSampleRequest(model=model, options=wrong))
