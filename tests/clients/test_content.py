"""Content conditions in the clients: both of them, through restarts, in pulls and in the state of a dataset.

Rules of this file:
- `light` has the classes a and b and 64x64 pixels; its areas vary. The reference is plain Python on unfiltered samples.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from labelmint.triton.server import TritonServer
from labelmint_client import (
    AsyncClient,
    Client,
    ContentMissing,
    ContentNotFound,
    Filtered,
    LabelmintError,
    Rejection,
    Sample,
    SampleOptions,
    SampleRejected,
    calls,
)
from labelmint_client.messages import checked, model_of
from labelmint_client.policy import Walk
from labelmint_client.pull import Progress, PullError, PullOptions, pull, verify
from labelmint_client.torch import LabeledSampleDataset, merge_states
from labelmint_client.v1 import sample_service_pb2 as pb
from tests.clients.conftest import StartGateway, gateways_before
from tests.conftest import ROOT, Service
from tests.support.files import contents, forge

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SEEDS = 256
ALL = SampleOptions(max_js=1e9)


@pytest.fixture(scope="module")
def start_gateway(light_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    with gateways_before(light_triton, tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def gateway(start_gateway: StartGateway) -> Service:
    return start_gateway()


@pytest.fixture
def client(gateway: Service) -> Iterator[Client]:
    with Client(gateway.grpc) as connected:
        yield connected


def area_of(sample: Sample) -> float:
    assert sample.label is not None
    return sample.label.ravel().tolist().count(0) / sample.label.size


@pytest.fixture(scope="module")
def everything(gateway: Service) -> list[Sample]:
    with Client(gateway.grpc) as client:
        return list(client.stream_samples("light", count=SEEDS, options=replace(ALL, include_js_map=True)))


@pytest.fixture(scope="module")
def wanted(everything: list[Sample]) -> SampleOptions:
    """A gate that three quarters of the samples pass, and the area that divides those best."""
    gate = float(np.quantile([sample.js_score for sample in everything], 0.75))
    areas = [area_of(sample) for sample in everything if sample.js_score <= gate]
    best = max(areas, key=lambda low: min(sum(area < low for area in areas), sum(area >= low for area in areas)))
    return SampleOptions(max_js=gate, where=(f"a:{best!r}..",))


def outcome_of(sample: Sample, options: SampleOptions) -> str:
    assert options.max_js is not None
    low = float(options.where[0].removeprefix("a:").removesuffix(".."))
    if sample.js_score > options.max_js:
        return "rejected"
    return "accepted" if area_of(sample) >= low else "filtered"


async def test_both_clients_filter_alike(gateway: Service, everything: list[Sample], wanted: SampleOptions) -> None:
    outcomes = [outcome_of(sample, wanted) for sample in everything]
    want = [seed for seed, outcome in enumerate(outcomes) if outcome == "accepted"]
    assert len(want) > 10 and outcomes.count("filtered") > 10 and outcomes.count("rejected") > 10
    with Client(gateway.grpc) as client, client.stream_samples("light", count=len(want), options=wanted) as stream:
        found = [(sample.seed, dict(sample.content)) for sample in stream]
        blocking = (found, stream.next_seed, stream.filtered_count, stream.rejected_count)
    async with AsyncClient(gateway.grpc) as client:
        async with await client.stream_samples("light", count=len(want), options=wanted) as stream:
            found = [(sample.seed, dict(sample.content)) async for sample in stream]
            asynchronous = (found, stream.next_seed, stream.filtered_count, stream.rejected_count)
        batch = await client.batch_get_samples("light", range(64), wanted)
        for kind, error in (("filtered", ContentMissing), ("rejected", SampleRejected)):
            with pytest.raises(error) as caught:
                await client.get_sample("light", outcomes.index(kind), wanted)
            assert caught.value.seed == outcomes.index(kind)
            if isinstance(caught.value, ContentMissing):
                assert caught.value.content == {"a": area_of(everything[caught.value.seed])}
    last = want[-1] + 1
    told = [(seed, {"a": area_of(everything[seed])}) for seed in want]
    assert blocking == (told, last, outcomes[:last].count("filtered"), outcomes[:last].count("rejected"))
    assert asynchronous == blocking
    kinds = {"accepted": Sample, "filtered": Filtered, "rejected": Rejection}
    assert [type(outcome) for outcome in batch] == [kinds[outcome] for outcome in outcomes[:64]]
    assert all(
        found.content == {"a": area_of(everything[found.seed])} for found in batch if isinstance(found, Filtered)
    )


def test_a_filtered_stream_survives_a_gateway_that_is_killed(
    start_gateway: StartGateway,
    everything: list[Sample],
    wanted: SampleOptions,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each sample comes once, and each seed is counted once, though the gateway dies in the middle."""
    outcomes = [outcome_of(sample, wanted) for sample in everything]
    want = [seed for seed, outcome in enumerate(outcomes) if outcome == "accepted"]
    service = start_gateway()
    options = replace(wanted, include_js_map=True)  # larger messages, so that fewer of them are in buffers
    found: list[int] = []
    with Client(service.grpc) as client, client.stream_samples("light", count=len(want), options=options) as stream:
        for index, sample in enumerate(stream):
            found.append(sample.seed)
            assert stream.filtered_count == outcomes[: sample.seed + 1].count("filtered")
            assert stream.rejected_count == outcomes[: sample.seed + 1].count("rejected")
            if index == 3:
                service.stop(signal.SIGKILL)
                start_gateway("--grpc-port", service.grpc.rpartition(":")[2])
    assert found == want
    assert any("resumes at seed" in record.message for record in caplog.records), "the stream was cut"


def test_a_stream_without_a_match_ends_with_the_place_where_it_goes_on(start_gateway: StartGateway) -> None:
    service = start_gateway("--max-empty-seeds", "25")
    options = replace(ALL, where=("a:0.9999..0.99999",))  # less than a pixel from the whole image
    with Client(service.grpc) as client, client.stream_samples("light", 5, options=options) as stream:
        with pytest.raises(ContentNotFound, match="none of 25 seeds in a row") as caught:
            next(stream)
        assert caught.value.seed_count == 25 and not caught.value.retryable
        assert stream.next_seed == int(caught.value.metadata["next_seed"]) == 30 and stream.filtered_count == 25


def test_a_gateway_that_ignores_an_option_is_noticed() -> None:
    """A gateway of an earlier version leaves out the echo; its samples are not what the caller asked for."""
    model = model_of(pb.Model(name="tiny", version="1", digest="d" * 64, task="segmentation"))
    sample = pb.Sample(seed=0, model_digest="d" * 64)
    for options, name in (
        (SampleOptions(where=("a:0..",)), "where"),
        (SampleOptions(ignore_js_quantile=0.0), "ignore"),
    ):
        with pytest.raises(
            LabelmintError, match=f"older than this client and does not know the option {name}"
        ) as caught:
            checked(sample, options.message("segmentation"))
        assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED and not caught.value.retryable
        asked: dict[str, Any] = {"model_version": "", "task": "segmentation"}
        single = calls.get_sample("tiny", 0, options, **asked)
        with pytest.raises(LabelmintError, match="older than this client"):
            single.read(pb.GetSampleResponse(sample=sample))
        batch = calls.batch_get_samples("tiny", [0], options, style_seeds=(), **asked)
        with pytest.raises(LabelmintError, match="older than this client"):
            batch.read(pb.BatchGetSamplesResponse(outcomes=[pb.SampleOutcome(sample=sample)]))
        walk = Walk(
            model, 0, end_seed=9, count=0, shard_index=0, shard_count=1, options=options, window=0, model_digest=""
        )
        with pytest.raises(LabelmintError, match="older than this client"):
            walk.take(pb.StreamSamplesResponse(sample=sample, next_seed=1))
        assert walk.next_seed == 0
    assert checked(sample, ALL.message("segmentation")) is sample


def run(gateway: Service, out: Path, options: PullOptions, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.killed_pull", gateway.grpc, str(out)]
    command += [json.dumps(options.to_json()), str(kill_at)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["webdataset", "folder"])
def test_a_filtered_pull_that_is_killed_ends_with_the_same_bytes_and_counts(
    name: str, gateway: Service, client: Client, everything: list[Sample], wanted: SampleOptions, tmp_path: Path
) -> None:
    outcomes = [outcome_of(sample, wanted) for sample in everything]
    want = [seed for seed, outcome in enumerate(outcomes) if outcome == "accepted"][:8]
    options = PullOptions("light", 8, name, samples_per_shard=3, ignore_js_quantile=0.9, sample=wanted)  # type: ignore[arg-type]
    whole = run(gateway, tmp_path / "whole", options)
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(name)
    for kill_at in [draw.randint(1, int(whole.stdout) // 2) for _ in range(3)]:
        assert run(gateway, tmp_path / "often", options, kill_at).returncode == -signal.SIGKILL
    assert run(gateway, tmp_path / "often", options).returncode == 0
    # Extended in two steps, within a shard and across shards.
    reports: list[Progress] = []
    for count in (2, 7, 8):
        pull(client, replace(options, count=count), tmp_path / "grown", on_progress=reports.append)
    for report in reports:
        passed = outcomes[: report.seeds]
        assert (report.accepted, report.filtered) == (passed.count("accepted"), passed.count("filtered"))
    for other in ("often", "grown"):
        assert contents(tmp_path / other) == contents(tmp_path / "whole"), other
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    passed = outcomes[: want[-1] + 1]
    assert manifest["next_seed"] == want[-1] + 1 and manifest["request"]["sample"]["where"] == list(wanted.where)
    for outcome in ("accepted", "rejected", "filtered"):
        assert manifest[f"{outcome}_count"] == passed.count(outcome), outcome
    lines = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == want
    assert all(line["content"] == {"a": area_of(everything[line["seed"]])} for line in lines)
    assert verify(tmp_path / "whole", client).problems == []
    # What the manifest tells of the content is compared too, and a sample that the conditions would not let through.
    line, other = (json.dumps(lines[0]["content"]), json.dumps({"a": 0.123}))
    forge(tmp_path / "often", lambda text: text.replace(line, other, 1))
    (problem,) = verify(tmp_path / "often", client).problems
    assert problem == f"seed {want[0]}: content {{'a': 0.123}}, served {lines[0]['content']}"
    filtered = outcomes.index("filtered")
    forge(tmp_path / "often", lambda text: text.replace(f'"seed": {want[1]}', f'"seed": {filtered}', 1))
    assert verify(tmp_path / "often", client).problems[1].startswith(f"seed {filtered}: content ")
    for changed in (replace(wanted, where=("a:0..",)), replace(wanted, where=())):
        with pytest.raises(PullError, match="holds a pull with where"):
            pull(client, replace(options, sample=changed), tmp_path / "whole")


def test_the_command_pulls_by_content(gateway: Service, tmp_path: Path, wanted: SampleOptions) -> None:
    command = [sys.executable, "-m", "labelmint_client", "pull", "--endpoint", gateway.grpc, "--model", "light"]
    command += ["--count", "5", "--max-js", repr(wanted.max_js), str(tmp_path / "out")]
    environment = {**os.environ, "LABELMINT_PULL_OPTIONS": f"--where {wanted.where[0]}"}

    def done(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, env=environment)

    first = done("--where", "b:0..")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert first.returncode == 0 and manifest["request"]["sample"]["where"] == [wanted.where[0], "b:0.."]
    assert f", {manifest['filtered_count']} of them filtered" in first.stdout
    again = done()
    assert again.returncode == 2 and "holds a pull with where" in again.stderr and again.stderr.count("\n") == 1
    for wrong in ("a>0.5", "c:0.5..", "a:0.6..0.5"):
        refused = done("--where", wrong)
        assert refused.returncode == 2 and wrong in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


def test_a_state_of_another_filter_is_refused(gateway: Service, wanted: SampleOptions) -> None:
    def dataset(where: tuple[str, ...], resume: object = None) -> LabeledSampleDataset[int]:
        return LabeledSampleDataset(
            gateway.grpc,
            "light",
            end_seed=SEEDS,
            options=replace(wanted, where=where),
            transform=lambda sample: sample.seed,
            resume=resume,  # type: ignore[arg-type]
        )

    read: Callable[[LabeledSampleDataset[int]], list[int]] = list
    whole = read(dataset(wanted.where))
    begun = dataset(wanted.where)
    seeds = iter(begun)
    first = [next(seeds) for _ in range(4)]
    state = begun.state_dict()
    for resumed in (dataset(wanted.where), dataset(wanted.where, merge_states([state]))):
        if resumed._begin["done"] == []:
            resumed.load_state_dict(state)
        assert first + read(resumed) == whole
    for where in ((), ("a:0..",)):
        other = dataset(where)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match="the state has the conditions a:"):
            read(other)
        with pytest.raises(ValueError, match="the state has the conditions a:"):
            dataset(where, merge_states([state]))
    # A state of a version without conditions has none.
    plain = dataset(())
    next(iter(plain))
    old = {key: value for key, value in plain.state_dict().items() if key != "where"}
    assert dataset((), merge_states([old]))._begin["where"] == []
    with pytest.raises(ValueError, match="the state has the conditions none, this run has a:"):
        dataset(wanted.where, merge_states([old]))
