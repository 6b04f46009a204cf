"""The map-style dataset: every accepted sample of an index under its position, whatever reads it.

Rules of this file:
- The reference is a list of the samples of all indexed seeds, judged by plain Python.
- Workers come from a fork server or are spawned. Forks are tested in a process of their own, as in `test_torch.py`.
"""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import operator
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler, random_split
from torchdata.stateful_dataloader import StatefulDataLoader

from labelmint_client import (
    Client,
    LabelmintError,
    ModelNotFound,
    ModelVersionGone,
    NotIndexed,
    Sample,
    SampleOptions,
)
from labelmint_client.torch import LabeledSampleDataset, LabeledSamples, image_and_label
from tests.clients.conftest import INDEXED, StartGateway
from tests.conftest import Service

pytestmark = [pytest.mark.triton, pytest.mark.torch]

Samples = LabeledSamples[Any]
multiprocessing.set_forkserver_preload(["labelmint_client.torch", "torchdata.stateful_dataloader"])

seed_of = operator.attrgetter("seed")


@pytest.fixture
def seeds(indexed: Service, light_options: SampleOptions) -> Callable[..., Samples]:
    """A dataset whose items are seeds: those of the accepted samples."""
    return partial(LabeledSamples, indexed.grpc, "light", options=light_options, transform=seed_of)


@pytest.fixture
def accepted(light_accepted: list[Sample]) -> list[int]:
    return [sample.seed for sample in light_accepted]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call for a batch or a list that this process makes, after the model."""
    made: list[Any] = []

    def spy(name: str) -> None:
        real = getattr(Client, name)

        def call(self: Client, model: str, *arguments: Any, **named: Any) -> Any:
            made.append(arguments[0] if name == "batch_get_samples" else "list")
            return real(self, model, *arguments, **named)

        monkeypatch.setattr(Client, name, call)

    spy("batch_get_samples")
    spy("list_seeds")
    return made


def flat(batches: Any) -> list[int]:
    return [seed for batch in batches for seed in batch.tolist()]


def test_its_items_are_those_of_the_walk(
    indexed: Service, light_options: SampleOptions, light_accepted: list[Sample], seeds: Callable[..., Samples]
) -> None:
    assert [seed_of(sample) for sample in light_accepted] == seeds().seeds.tolist()
    assert seeds().seeds.dtype == np.uint32 and len(seeds()) == len(light_accepted)
    whole: Samples = LabeledSamples(indexed.grpc, "light", options=light_options)
    walked: LabeledSampleDataset[Any] = LabeledSampleDataset(
        indexed.grpc, "light", end_seed=INDEXED.stop, options=light_options
    )
    batches = zip(DataLoader(whole, 16), DataLoader(walked, 16), strict=True)
    for number, ((images, labels), (walked_images, walked_labels)) in enumerate(batches):
        assert images.is_contiguous() and labels.dtype == torch.int64
        assert torch.equal(images, walked_images) and torch.equal(labels, walked_labels)
        sample = light_accepted[16 * number]
        assert np.array_equal(images[0].permute(1, 2, 0).numpy(), sample.image)  # type: ignore[arg-type]
        assert np.array_equal(labels[0].numpy(), sample.label)  # type: ignore[arg-type]
    part = seeds(start_seed=50, end_seed=200)
    assert part.seeds.tolist() == [sample.seed for sample in light_accepted if 50 <= sample.seed < 200]


def test_conditions_hold(seeds: Callable[..., Samples], light_accepted: list[Sample], light_options: Any) -> None:
    areas = {sample.seed: float((sample.label == 1).mean()) for sample in light_accepted}
    middle = float(np.median(list(areas.values())))
    some = seeds(options=replace(light_options, where=(f"b:{middle!r}..",)))
    assert some.seeds.tolist() == [seed for seed, area in areas.items() if area >= middle]
    assert some[-1] == some.seed_of(-1) and 0 < len(some) < len(light_accepted)


def test_an_image_is_not_copied_before_its_batch(light_samples: list[Sample]) -> None:
    sample = light_samples[0]
    assert sample.image is not None and not sample.image.flags.writeable
    image, _ = image_and_label(sample)
    assert np.shares_memory(image.numpy(), sample.image)


def test_an_image_outlives_its_sample(indexed: Service) -> None:
    """Its tensor holds the memory of the received bytes."""
    dataset: Samples = LabeledSamples(indexed.grpc, "light", options=SampleOptions(max_js=1e9))
    images = [dataset[index][0] for index in range(8)]
    others = [bytearray(64 * 64 * 3) for _ in range(100)]  # would take freed memory
    with Client(indexed.grpc) as client:
        samples = client.batch_get_samples("light", range(8), SampleOptions(max_js=1e9))
    for image, sample in zip(images, samples, strict=True):
        assert isinstance(sample, Sample) and np.array_equal(image.permute(1, 2, 0).numpy(), sample.image)  # type: ignore[arg-type]
    assert len(others) == 100


def test_indices(seeds: Callable[..., Samples], accepted: list[int]) -> None:
    dataset, count = seeds(), len(accepted)
    for index in (0, 3, -1, -count, np.int64(5), np.uint8(7), torch.tensor(2), count - 1):
        assert dataset[index] == accepted[int(index)] == dataset.seed_of(index)
    for index in (count, -count - 1, np.int64(2**40)):
        with pytest.raises(IndexError, match=f"index {index} is out of range: there are {count} samples"):
            dataset[index]
        with pytest.raises(IndexError, match="out of range"):
            dataset[[0, index]]
        with pytest.raises(IndexError):
            dataset.__getitems__([0, index])
    for wrong in (1.0, "1", None, [0.5], [True, False], [[1, 2]], {1: 2}):
        with pytest.raises(TypeError, match="whole numbers"):
            dataset[wrong]  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="read-only"):
        dataset.seeds[0] = 1
    assert dataset.__getitems__([]) == []


def test_parts_are_datasets_and_ask_for_nothing(
    seeds: Callable[..., Samples], accepted: list[int], calls: list[Any]
) -> None:
    dataset = seeds()
    parts = (
        (dataset[10:20], accepted[10:20]),
        (dataset[::-7], accepted[::-7]),
        (dataset[200:], []),
        (dataset[[5, -1, 5]], [accepted[5], accepted[-1], accepted[5]]),
        (dataset[np.array([4, 2], np.uint32)], [accepted[4], accepted[2]]),
        (dataset[torch.tensor([1, 0])], [accepted[1], accepted[0]]),  # type: ignore[index]
        (dataset[range(3)], accepted[:3]),
        (dataset[[]], []),
        (dataset[20:60][::2][[3]], accepted[20:60][::2][3:4]),
    )
    for part, wanted in parts:
        assert isinstance(part, LabeledSamples) and part.seeds.tolist() == wanted and len(part) == len(wanted)
    assert calls == ["list"]
    part, wanted = parts[3]
    assert part.__getitems__([0, 1, 2]) == wanted
    assert len(dataset) == len(accepted), "a part leaves the whole as it is"
    halves = random_split(dataset, [0.5, 0.5], torch.Generator().manual_seed(0))
    assert sorted(flat([*DataLoader(halves[0], 16), *DataLoader(halves[1], 16)])) == accepted


def test_a_batch_is_one_call(seeds: Callable[..., Samples], accepted: list[int], calls: list[Any]) -> None:
    dataset = seeds()
    for batch_size, expected in ((8, [8] * 3), (64, [64]), (100, [64, 36])):
        calls.clear()
        batch = flat(DataLoader(dataset[:batch_size] if batch_size > 8 else dataset[:24], batch_size))
        assert batch == accepted[: len(batch)]
        assert sorted(map(len, calls), reverse=True) == expected
    calls.clear()
    repeated = [3, 3, 0]
    assert dataset.__getitems__(repeated) == [accepted[index] for index in repeated]
    assert len(calls) == 1


def test_two_calls_are_under_way(
    seeds: Callable[..., Samples], accepted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer comes before a second call was sent; there are never three."""
    real, lock, under_way, most = Client.batch_get_samples, threading.Lock(), 0, 0
    second = threading.Event()

    def call(self: Client, *arguments: Any, **named: Any) -> Any:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            if under_way == 2:
                second.set()
        assert second.wait(10)
        try:
            return real(self, *arguments, **named)
        finally:
            with lock:
                under_way -= 1

    monkeypatch.setattr(Client, "batch_get_samples", call)
    many = list(range(len(accepted))) * 3
    assert seeds().__getitems__(many) == [accepted[index] for index in many]
    assert most == 2


def rpcs(service: Service, name: str) -> int:
    """How many calls of a method the gateway has answered."""
    text = httpx.get(f"{service.http}/metrics").text
    lines = [line for line in text.splitlines() if f"/{name}" in line and "_count{" in line]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines)


@pytest.mark.parametrize(("context", "workers"), [(None, 0), ("forkserver", 2), ("spawn", 1)])
def test_a_shuffled_pass_has_every_sample_once_and_lists_nothing_again(
    indexed: Service, seeds: Callable[..., Samples], accepted: list[int], context: str | None, workers: int
) -> None:
    before = rpcs(indexed, "ListSeeds")
    loader: Any = DataLoader(
        seeds(),
        16,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=context == "spawn",
        generator=torch.Generator().manual_seed(0),
    )
    passes = [flat(loader) for _ in range(2)]
    assert [sorted(each) for each in passes] == [accepted] * 2
    assert passes[0] != passes[1] and passes[0] != accepted
    assert rpcs(indexed, "ListSeeds") == before + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_pass_goes_on_where_it_was_interrupted(
    seeds: Callable[..., Samples], accepted: list[int], workers: int
) -> None:
    def loader() -> Any:
        context = "forkserver" if workers else None
        generator = torch.Generator().manual_seed(0)
        return StatefulDataLoader(
            seeds(), 16, shuffle=True, num_workers=workers, multiprocessing_context=context, generator=generator
        )

    whole, interrupted, resumed = flat(loader()), loader(), loader()
    first = flat(itertools.islice(interrupted, 3))
    resumed.load_state_dict(pickle.loads(pickle.dumps(interrupted.state_dict())))
    assert first + flat(resumed) == whole and sorted(whole) == accepted


FORKING = """
import json, operator, sys
from labelmint_client import Client, SampleOptions
from labelmint_client.torch import LabeledSamples
from torch.utils.data import DataLoader

endpoint, max_js = sys.argv[1], float(sys.argv[2])
options = SampleOptions(max_js=max_js)
dataset = LabeledSamples(endpoint, "light", options=options, transform=operator.attrgetter("seed"))
passes = []
for each in range(3):  # in the second pass, this process has a connection of the dataset's own
    loader = DataLoader(dataset, 8, shuffle=True, num_workers=2, multiprocessing_context="fork")
    passes.append(sorted(seed for batch in loader for seed in batch.tolist()))
    passes[-1].append(dataset[each])
print(json.dumps(passes))
"""


def test_a_trainer_that_reads_may_fork(indexed: Service, light_options: SampleOptions, accepted: list[int]) -> None:
    command = [sys.executable, "-c", FORKING, indexed.grpc, repr(light_options.max_js)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[*accepted, accepted[each]] for each in range(3)]


def test_copies_are_the_same_dataset(seeds: Callable[..., Samples], accepted: list[int], calls: list[Any]) -> None:
    dataset = seeds()[::2]
    assert dataset[1] == accepted[2]  # it is connected
    for made in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset), copy.copy(dataset)):
        assert made.seeds.tolist() == accepted[::2] and made[-1] == dataset[-1]
    assert calls.count("list") == 1


def test_a_gateway_may_end(start_light: StartGateway, light_index: Path, accepted: list[int], seeds: Any) -> None:
    """The call that it cut, and the next one, succeed when it is back."""
    gateway = start_light("--index", str(light_index))
    port = gateway.grpc.rsplit(":", 1)[1]
    with Client(gateway.grpc):
        dataset: Samples = LabeledSamples(gateway.grpc, "light", options=seeds.keywords["options"], transform=seed_of)
    assert dataset[0] == accepted[0]
    assert gateway.stop() == 0
    restarted = threading.Thread(target=lambda: start_light("--index", str(light_index), "--grpc-port", port))
    restarted.start()
    assert dataset.__getitems__(range(80)) == accepted[:80]
    restarted.join()


def test_without_an_index(start_light: StartGateway, light_options: SampleOptions) -> None:
    gateway = start_light()
    with pytest.raises(NotIndexed, match="labelmint index"):
        LabeledSamples(gateway.grpc, "light", options=light_options)


def test_what_is_not_indexed_or_cannot_be_is_refused_at_once(seeds: Callable[..., Samples]) -> None:
    with pytest.raises(NotIndexed) as caught:
        seeds(end_seed=INDEXED.stop + 1)
    assert caught.value.indexed == [(0, INDEXED.stop)]
    with pytest.raises(ModelNotFound):
        seeds(model_version="7")
    for arguments, problem in (
        ({"start_seed": 5, "end_seed": 5}, "in this order"),
        ({"start_seed": -1}, "0 to 4294967296"),
        ({"end_seed": 2**32 + 1}, "an end_seed of 0 is the end of the index"),
        ({"options": SampleOptions(omit_label=True), "transform": image_and_label}, "give a transform"),
    ):
        with pytest.raises(ValueError, match=problem):
            seeds(**arguments)


def test_other_weights_are_refused(seeds: Callable[..., Samples]) -> None:
    dataset = seeds()
    dataset._source.model = replace(dataset._source.model, digest="0" * 64)
    with pytest.raises(ModelVersionGone, match="this dataset began with 000000000000...; other weights"):
        dataset[0]
    with pytest.raises(ModelVersionGone, match="start a new dataset"):
        dataset.class_balanced_weights()


def test_a_seed_that_is_no_longer_delivered_is_one_clear_error(
    start_light: StartGateway, light_index: Path, tmp_path: Path, light_accepted: list[Sample], seeds: Any
) -> None:
    """The index is of other samples: all of its scores are 0, and class b is everywhere."""
    table = pq.read_table(light_index / "seeds.parquet")
    for name, value in (("score_sum", 0), ("pixels_b", 64 * 64)):
        place = table.column_names.index(name)
        column = np.full(len(table), value, table.column(name).to_numpy().dtype)
        table = table.set_column(place, name, [column])
    pq.write_table(table, tmp_path / "wrong.parquet")
    gateway = start_light("--index", str(tmp_path))
    options: SampleOptions = seeds.keywords["options"]
    rejected: Samples = LabeledSamples(gateway.grpc, "light", options=options, transform=seed_of)
    assert len(rejected) == len(INDEXED)
    accepted = {sample.seed for sample in light_accepted}
    wrong = next(seed for seed in INDEXED if seed not in accepted)
    for read in (
        lambda: rejected[wrong],
        lambda: rejected.__getitems__(range(200)),
        lambda: list(DataLoader(rejected)),
    ):
        with pytest.raises(
            LabelmintError, match=f"listed seed {wrong} of model 'light', and now it is rejected: its JS"
        ):
            read()
    filtered: Samples = LabeledSamples(
        gateway.grpc, "light", options=SampleOptions(max_js=1e9, where=("b:0.999..",)), transform=seed_of
    )
    with pytest.raises(LabelmintError, match="filtered: it does not satisfy b:0.999..*make the dataset anew"):
        filtered.__getitems__(range(64))


def test_weights_make_a_rare_class_frequent(
    seeds: Callable[..., Samples], light_accepted: list[Sample], calls: list[Any]
) -> None:
    areas = np.array([[(sample.label == index).mean() for index in range(2)] for sample in light_accepted])  # [N,2]
    rare = int(np.argmin(areas.mean(0)))
    area = float(np.sort(areas[:, rare])[-4])  # four samples have the rare class
    present = areas >= area
    assert present[:, rare].sum() == 4 and present[:, 1 - rare].mean() > 0.5
    dataset = seeds()
    calls.clear()
    weights = dataset.class_balanced_weights(area)
    assert calls == ["list"] * 2
    assert weights.dtype == torch.float64 and tuple(weights.shape) == (len(dataset),)
    assert np.allclose(weights.numpy(), (present / present.sum(0)).sum(1))
    sampler = WeightedRandomSampler(weights.tolist(), 200, generator=torch.Generator().manual_seed(0))
    drawn = flat(DataLoader(dataset, 64, sampler=sampler))
    has = {sample.seed for sample, here in zip(light_accepted, present[:, rare], strict=True) if here}
    assert sum(seed in has for seed in drawn) > 80, "of 200; without the weights it would be about 6"
    # Of a part, the numbers are its own.
    part = dataset[::-3]
    assert np.allclose(part.class_balanced_weights(area), (present[::-3] / present[::-3].sum(0).clip(1)).sum(1))


def test_one_pixel_is_present_and_conditions_of_the_dataset_hold(
    seeds: Callable[..., Samples], light_accepted: list[Sample], light_options: SampleOptions
) -> None:
    areas = np.array([[(sample.label == index).mean() for index in range(2)] for sample in light_accepted])
    kept = areas[:, 0] >= np.median(areas[:, 0])
    dataset = seeds(options=replace(light_options, where=(f"a:{float(np.median(areas[:, 0]))!r}..",)))
    present = areas[kept] > 0
    assert np.allclose(dataset.class_balanced_weights(), (present / present.sum(0).clip(1)).sum(1))


def test_weights_that_cannot_be_are_refused(seeds: Callable[..., Samples], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = seeds()
    for area in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="give a share of the image's pixels"):
            dataset.class_balanced_weights(area)
    with pytest.raises(ValueError, match="no sample has a class of 0.999999"):
        dataset[:8].class_balanced_weights(0.999999)
    with pytest.raises(ValueError, match="no sample has a class"):
        dataset[:0].class_balanced_weights()
    dataset._source.model = replace(dataset._source.model, class_names=())
    with pytest.raises(ValueError, match="has keypoints and no classes"):
        dataset.class_balanced_weights()
