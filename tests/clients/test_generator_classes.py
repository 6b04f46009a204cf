"""A class per request in the clients: options and descriptions, streams, the state of a dataset, and pulls."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import grpc
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from labelmint_client import AsyncClient, Client, LabelmintError, Rejection, Sample, SampleOptions, calls
from labelmint_client.huggingface import labeled_samples
from labelmint_client.messages import checked
from labelmint_client.pull import PullError, PullOptions, pull, verify
from labelmint_client.torch import LabeledSampleDataset, merge_states
from labelmint_client.v1 import sample_service_pb2 as pb
from tests.clients.conftest import gateways_before
from tests.conftest import Service
from tests.support.conditional import CAT, DOG, FOX, NAMES, SEEDS, Kinds, kinds
from tests.support.files import contents

pytestmark = [pytest.mark.triton, pytest.mark.torch]


DOGS = SampleOptions(class_index=DOG)


@pytest_asyncio.fixture(scope="module")
async def model(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> AsyncIterator[Kinds]:
    async with kinds(tmp_path_factory.mktemp("kinds"), tiny_repository) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(model: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with gateways_before(model.triton, tmp_path_factory) as start:
        yield start()


@pytest.fixture
def client(gateway: Service) -> Iterator[Client]:
    with Client(gateway.grpc) as connected:
        yield connected


def accepted(model: Kinds, index: int) -> list[int]:
    return [seed for seed in range(SEEDS) if model.scores[index][seed] <= model.thresholds[index]]


async def test_both_clients_ask_for_a_class(gateway: Service, model: Kinds) -> None:
    want = accepted(model, DOG)
    with Client(gateway.grpc) as client:
        described = client.get_model("kinds")
        assert (described.generator_classes, described.calibrated_classes) == (NAMES, (CAT, DOG))
        assert described.calibration is None
        assert client.get_model("tiny").generator_classes == client.get_model("tiny").calibrated_classes == ()
        of_dogs = client.get_model("kinds", class_index=DOG).calibration
        assert of_dogs is not None and (of_dogs.id, of_dogs.threshold) == (
            model.calibrations[DOG],
            model.thresholds[DOG],
        )
        with client.stream_samples("kinds", end_seed=SEEDS, options=DOGS) as stream:
            assert stream.model.calibration == of_dogs
            blocking = [(sample.seed, sample.js_score, sample.class_index) for sample in stream]
        sample = client.get_sample("kinds", want[0], DOGS)
        outcomes = client.batch_get_samples("kinds", range(SEEDS), DOGS)
        with pytest.raises(LabelmintError, match="class_index: missing; model 'kinds' has 3 generator classes"):
            client.get_sample("kinds", 0, SampleOptions(max_js=1e9))
        with pytest.raises(LabelmintError, match=r"class 2 \(fox\) of model 'kinds' is not calibrated"):
            next(client.stream_samples("kinds", options=SampleOptions(class_index=FOX)))
        assert client.get_sample("tiny", 0, SampleOptions(max_js=1e9)).class_index is None
    assert blocking == [(seed, model.scores[DOG][seed], DOG) for seed in want]
    assert (sample.class_index, sample.calibration_id) == (DOG, model.calibrations[DOG])
    assert [type(outcome) for outcome in outcomes] == [Sample if seed in want else Rejection for seed in range(SEEDS)]
    async with (
        AsyncClient(gateway.grpc) as client,
        await client.stream_samples("kinds", end_seed=SEEDS, options=DOGS) as stream,
    ):
        assert stream.model.calibration == of_dogs
        assert [(sample.seed, sample.js_score, sample.class_index) async for sample in stream] == blocking


def test_a_gateway_that_knows_no_classes_is_noticed() -> None:
    """A gateway of an earlier version leaves out the echo."""
    older = "older than this client and does not know the option class_index"
    sample = pb.Sample(seed=0, model_digest="d" * 64)
    with pytest.raises(LabelmintError, match=older) as caught:
        checked(sample, SampleOptions(class_index=0).message("segmentation"))
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED and not caught.value.retryable
    answer = pb.GetModelResponse(model=pb.Model(name="tiny", task="segmentation"))
    with pytest.raises(LabelmintError, match=older):
        calls.get_model("tiny", "", 0).read(answer)
    assert calls.get_model("tiny", "", None).read(answer).name == "tiny"
    sample.class_index = 0
    assert checked(sample, SampleOptions(class_index=0).message("segmentation")) is sample


def test_a_state_of_another_class_is_refused(gateway: Service, model: Kinds) -> None:
    def dataset(class_index: int | None, resume: object = None) -> LabeledSampleDataset[int]:
        return LabeledSampleDataset(
            gateway.grpc,
            "kinds",
            end_seed=SEEDS,
            options=SampleOptions(class_index=class_index),
            transform=lambda sample: sample.seed,
            resume=resume,  # type: ignore[arg-type]
        )

    begun = dataset(DOG)
    seeds = iter(begun)
    first = [next(seeds) for _ in range(4)]
    state = begun.state_dict()
    resumed = dataset(DOG)
    resumed.load_state_dict(state)
    assert first + list(resumed) == first + list(dataset(DOG, merge_states([state]))) == accepted(model, DOG)
    other = dataset(CAT)
    other.load_state_dict(state)
    for refused in (lambda: list(other), lambda: dataset(CAT, merge_states([state]))):
        with pytest.raises(
            ValueError, match="the state has the class_index 1, this run has 0: give the same class_index"
        ):
            refused()
    with pytest.raises(ValueError, match="from different runs or epochs"):
        merge_states([{**state, "shard_count": 2}, {**state, "shard_count": 2, "shard_index": 1, "class_index": CAT}])
    # A state of a version without classes has none.
    old = {key: value for key, value in state.items() if key != "class_index"}
    with pytest.raises(ValueError, match="the state has the class_index None, this run has 1"):
        dataset(DOG, merge_states([old]))


def test_a_data_set_of_hugging_face_has_the_class(gateway: Service, model: Kinds) -> None:
    rows = labeled_samples(gateway.grpc, "kinds", end_seed=SEEDS, options=DOGS)
    assert isinstance(rows, datasets.IterableDataset)
    want = [(seed, model.scores[DOG][seed]) for seed in accepted(model, DOG)]
    assert [(row["seed"], row["js_score"]) for row in rows] == want


@pytest.mark.parametrize("name", ["webdataset", "parquet", "folder"])
def test_a_pull_is_of_one_class(name: str, client: Client, model: Kinds, tmp_path: Path) -> None:
    want = accepted(model, DOG)[:6]
    options = PullOptions("kinds", 6, name, samples_per_shard=4, sample=DOGS)
    pull(client, options, tmp_path / "whole")
    pull(client, replace(options, count=2), tmp_path / "grown")
    manifest = pull(client, options, tmp_path / "grown")
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")
    assert manifest["request"]["sample"]["class_index"] == DOG
    assert manifest["model"]["generator_classes"] == list(NAMES)
    assert manifest["model"]["calibration"] == {"id": model.calibrations[DOG], "threshold": model.thresholds[DOG]}
    lines = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["class_index"]) for line in lines] == [(seed, DOG) for seed in want]
    assert verify(tmp_path / "whole", client).problems == []
    for index in (CAT, None):
        changed = replace(options, count=8, sample=SampleOptions(class_index=index))
        with pytest.raises(PullError, match=f"holds a pull with class_index 1, not {index}"):
            pull(client, changed, tmp_path / "whole")
    if name == "parquet":
        table = pq.read_table(tmp_path / "whole" / "data")  # type: ignore[no-untyped-call]
        assert table.column("class_index").to_pylist() == [DOG] * 6
        loaded = datasets.load_dataset(
            "parquet", data_dir=str(tmp_path / "whole" / "data"), cache_dir=str(tmp_path / "c")
        )
        assert loaded["train"].features["class_index"].names == list(NAMES)


def test_verify_compares_samples_of_the_class(client: Client, tmp_path: Path) -> None:
    """A manifest that was changed to another class no longer describes the samples."""
    pull(client, PullOptions("kinds", 3, sample=DOGS), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["request"]["sample"]["class_index"] = CAT
    path.write_text(json.dumps(manifest))
    problems = verify(tmp_path / "out", client).problems
    assert len(problems) == 3 and all("class_index 1, served 0" in problem for problem in problems)


def test_the_command_pulls_a_class(gateway: Service, model: Kinds, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "labelmint_client", "pull", "--endpoint", gateway.grpc, "--model", "kinds"]
    command += ["--count", "3", str(tmp_path / "out")]

    def done(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)

    missing = done()
    assert missing.returncode == 2 and "class_index: missing" in missing.stderr and missing.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert done("--class-index", str(DOG)).returncode == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["request"]["sample"]["class_index"] == DOG
    other = done("--class-index", str(CAT))
    assert other.returncode == 2 and "class_index 1, not 0" in other.stderr
