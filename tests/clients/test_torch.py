"""The PyTorch dataset: every accepted seed once, whatever the workers, ranks, epochs and interruptions.

Workers come from a fork server: this process may have used grpc.aio, which does not survive a fork. What a trainer
does, forking with a client of its own, is tested in a process of its own.
"""

import itertools
import json
import multiprocessing
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from labelmint_client import Client, ModelVersionGone, SampleOptions
from labelmint_client.torch import LabeledSampleDataset, merge_states
from tests.conftest import Service

pytestmark = [pytest.mark.triton, pytest.mark.torch]


MakeDataset = Callable[..., LabeledSampleDataset[Any]]


WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["labelmint_client.torch", "torchdata.stateful_dataloader"])


def loader_of(
    dataset: Any, batch_size: int, workers: int = 0, kind: Any = StatefulDataLoader, persistent: bool = False
) -> Any:
    context = WORKERS if workers else None
    return kind(
        dataset, batch_size, num_workers=workers, multiprocessing_context=context, persistent_workers=persistent
    )


@pytest.fixture
def seeds(gateway: Service, options: SampleOptions) -> MakeDataset:
    """A dataset whose items are seeds: those of the accepted samples below 256."""
    return partial(
        LabeledSampleDataset, gateway.grpc, "tiny", end_seed=256, options=options, transform=operator.attrgetter("seed")
    )


def flat(batches: Any) -> list[int]:
    return [seed for batch in batches for seed in batch.tolist()]


def test_items_are_what_a_trainer_takes(gateway: Service, client: Client) -> None:
    options = SampleOptions(max_js=1e9)
    dataset = LabeledSampleDataset(gateway.grpc, "tiny", end_seed=4, options=options)
    images, labels = next(iter(DataLoader(dataset, batch_size=4)))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (4, 3, 16, 16))
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (4, 16, 16))
    sample = client.get_sample("tiny", 3, options)
    assert sample.image is not None and np.array_equal(images[3].permute(1, 2, 0).numpy(), sample.image)
    assert sample.label is not None and np.array_equal(labels[3].numpy(), sample.label)
    torch.nn.functional.cross_entropy(torch.zeros(4, 2, 16, 16), labels)


def test_items_of_a_model_of_keypoints(service: Service) -> None:
    dataset = LabeledSampleDataset(service.grpc, "faces_keypoints", end_seed=4, options=SampleOptions(max_quantile=1))
    image, keypoints = next(iter(dataset))
    with Client(service.grpc) as client:
        names = client.get_model("faces_keypoints").keypoint_names
    assert tuple(image.shape) == (3, 128, 128)
    assert keypoints.dtype == torch.float32 and tuple(keypoints.shape) == (len(names), 3)


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (4, 1), (0, 3), (2, 2)])
def test_each_seed_comes_once(seeds: MakeDataset, accepted: list[int], workers: int, ranks: int) -> None:
    got = []
    for rank in range(ranks):
        got.append(flat(loader_of(seeds(rank=rank, world_size=ranks), 5, workers, DataLoader)))
    assert sorted(itertools.chain(*got)) == accepted
    if (workers, ranks) == (0, 1):
        assert got == [accepted]


def test_ranks_come_from_the_environment(
    seeds: MakeDataset, accepted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert list(seeds()) == [seed for seed in accepted if seed % 3 == 1]


FORKING = """
import itertools, json, operator, sys
from labelmint_client import Client, SampleOptions
from labelmint_client.torch import LabeledSampleDataset
from torch.utils.data import DataLoader

endpoint, max_js = sys.argv[1], float(sys.argv[2])
options = SampleOptions(max_js=max_js)
dataset = LabeledSampleDataset(endpoint, "tiny", end_seed=256, options=options, transform=operator.attrgetter("seed"))
with Client(endpoint) as client:
    stream = client.stream_samples("tiny", options=options)
    ahead, passes = [next(stream).seed], []
    for _ in range(3):
        loader = DataLoader(dataset, 4, num_workers=2, multiprocessing_context="fork")
        passes.append(sorted(seed for batch in loader for seed in batch.tolist()))
        ahead += [sample.seed for sample in itertools.islice(stream, 5)]
print(json.dumps([ahead, passes]))
"""


def test_a_trainer_that_has_a_client_may_fork(gateway: Service, options: SampleOptions, accepted: list[int]) -> None:
    """A stream is open before, between and after; the workers have their own."""
    command = [sys.executable, "-c", FORKING, gateway.grpc, repr(options.max_js)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [accepted[:16], [accepted] * 3]


def test_a_dataset_can_be_pickled(seeds: MakeDataset, accepted: list[int]) -> None:
    assert list(pickle.loads(pickle.dumps(seeds()))) == accepted


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_loader_goes_on_mid_epoch_twice_in_a_row(
    seeds: MakeDataset, accepted: list[int], workers: int, persistent: bool
) -> None:
    def loader(state: Any = None) -> Any:
        made = loader_of(seeds(), 7, workers, persistent=persistent)
        if state is not None:
            made.load_state_dict(pickle.loads(pickle.dumps(state)))
        return made

    whole = flat(loader())
    assert sorted(whole) == accepted
    got: list[int] = []
    state = None
    for batches in (3, 4):
        interrupted = loader(state)
        got += flat(itertools.islice(interrupted, batches))
        state = interrupted.state_dict()
    last = loader(state)
    got += flat(last)
    assert got == whole
    # The pass that was resumed is over: the next one is whole.
    assert flat(last) == whole
    # A state that is taken at the end of a pass leads to the next one.
    assert flat(loader(last.state_dict())) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_have_new_seeds(seeds: MakeDataset, accepted: list[int], workers: int) -> None:
    dataset = seeds(start_seed=0, end_seed=64)
    loader = loader_of(dataset, 4, workers, persistent=workers > 0)
    for epoch in (0, 1, 1, 3):
        dataset.set_epoch(epoch)
        assert sorted(flat(loader)) == [seed for seed in accepted if epoch * 64 <= seed < (epoch + 1) * 64]
    dataset.set_epoch(2)
    got = flat(itertools.islice(loader, 3))
    resumed = seeds(start_seed=0, end_seed=64)
    again = loader_of(resumed, 4, workers)
    again.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"call set_epoch\(2\)"):
        list(again)
    resumed.set_epoch(2)
    again.load_state_dict(loader.state_dict())
    assert sorted(got + flat(again)) == [seed for seed in accepted if 128 <= seed < 192]
    resumed.set_epoch(3)
    assert sorted(flat(again)) == [seed for seed in accepted if seed >= 192]


def ranks_of(seeds: MakeDataset, world_size: int, workers: int, resume: Any) -> Iterator[Any]:
    for rank in range(world_size):
        dataset = seeds(rank=rank, world_size=world_size, resume=resume)
        yield loader_of(dataset, 3, workers)


def test_ranks_and_workers_may_change(seeds: MakeDataset, accepted: list[int]) -> None:
    """Three runs of other shapes, interrupted where each rank is at another place; then one to the end."""
    got: list[int] = []
    resume = None
    for world_size, workers in ((2, 2), (3, 0), (1, 2)):
        states = []
        for rank, loader in enumerate(ranks_of(seeds, world_size, workers, resume)):
            got += flat(itertools.islice(loader, 2 + 3 * rank))
            states.append(loader.state_dict())
        resume = merge_states(states)
        assert len(pickle.dumps(resume)) < 500
    for loader in ranks_of(seeds, 2, 0, resume):
        got += flat(loader)
    assert sorted(got) == accepted


def test_a_run_that_was_split_anew_is_resumed_as_it_is(seeds: MakeDataset, accepted: list[int]) -> None:
    """The second run's own states carry what the first one did."""
    got: list[int] = []
    states = []
    for rank, loader in enumerate(ranks_of(seeds, 2, 0, None)):
        got += flat(itertools.islice(loader, 1 + 8 * rank))
        states.append(loader.state_dict())
    resume = merge_states(states)
    interrupted = loader_of(seeds(resume=resume), 3)
    got += flat(itertools.islice(interrupted, 2))
    resumed = loader_of(seeds(), 3)
    resumed.load_state_dict(interrupted.state_dict())
    assert sorted(got + flat(resumed)) == accepted


def test_states_that_do_not_fit_are_refused(seeds: MakeDataset) -> None:
    def state(seeds: LabeledSampleDataset[Any]) -> dict[str, Any]:
        iterator = iter(seeds)
        next(iterator)
        return seeds.state_dict()

    first, second = (state(seeds(rank=rank, world_size=2)) for rank in range(2))
    dataset = seeds()
    dataset.load_state_dict(first)
    with pytest.raises(ValueError, match="merge_states"):
        next(iter(dataset))
    with pytest.raises(ValueError, match=r"workers 0 to 1, and states of \[0\]"):
        merge_states([first])
    with pytest.raises(ValueError, match="give each once"):
        merge_states([first, second, second])
    with pytest.raises(ValueError, match="different runs"):
        merge_states([first, state(seeds())])
    with pytest.raises(ValueError, match="different digests"):
        merge_states([first, {**second, "model_digest": "0" * 64}])
    with pytest.raises(ValueError, match="no state"):
        merge_states([{}])
    with pytest.raises(ValueError, match="snapshot_every_n_steps=1"):
        merge_states([{"_steps_since_snapshot": 1, "state": first}])
    other = seeds(rank=0, world_size=2)
    other.load_state_dict({**first, "model_digest": "0" * 64})
    with pytest.raises(ModelVersionGone, match="now has digest"):
        next(iter(other))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"start_seed": 5, "end_seed": 5}, "in this order"),
        ({"end_seed": 2**32 + 1}, "0 to 4294967296"),
        ({"rank": 1}, "give both"),
        ({"options": SampleOptions(omit_label=True)}, "give a transform"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LabeledSampleDataset("localhost:1", "tiny", **arguments)


def test_a_dataset_without_end_has_one_epoch() -> None:
    with pytest.raises(ValueError, match="beyond the last seed"):
        LabeledSampleDataset("localhost:1", "tiny").set_epoch(1)
