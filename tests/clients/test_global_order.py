"""The order "global": the same global batches whatever the ranks, workers and interruptions.

Rules of this file:
- A global batch is the seeds that the ranks get at one step, one after the other. The reference is NumPy alone.
- `light` has the classes a and b and 64x64 pixels. The gateway has an index of its seeds below 256.
- Ranks are told to the dataset, so that one process can read for each in turn; two real ones are in `rank.py`.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import operator
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from labelmint.seed_index.layout import Described
from labelmint.triton.server import TritonServer
from labelmint_client import (
    Client,
    LabelmintError,
    ListedSeeds,
    ModelVersionGone,
    NotIndexed,
    Rejection,
    Sample,
    SampleOptions,
)
from labelmint_client.ahead import samples_ahead
from labelmint_client.global_order import shuffled
from labelmint_client.torch import LabeledSampleDataset, merge_states
from tests.clients.conftest import StartGateway, gateways_before
from tests.conftest import ROOT, Service
from tests.support.inference import running
from tests.support.seed_index import real_columns, served, write

pytestmark = [pytest.mark.triton, pytest.mark.torch]


END = 256
GLOBAL = 12
SHUFFLE = 7
SHAPES = list(itertools.product((1, 2, 4), (0, 1, 3)))  # ranks, workers
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["labelmint_client.torch", "torchdata.stateful_dataloader"])

MakeDataset = Callable[..., LabeledSampleDataset[Any]]
Batches = list[list[int]]


@pytest_asyncio.fixture(scope="module")
async def light_triton(light_repository: Path) -> AsyncIterator[TritonServer]:
    async with running(light_repository, "light") as server:
        yield server


@pytest.fixture(scope="module")
def start_gateway(light_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    with gateways_before(light_triton, tmp_path_factory) as start:
        yield start


@pytest_asyncio.fixture(scope="module")
async def index(light_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = await served(light_triton.grpc_url, "light")
    columns = await real_columns(light_triton.grpc_url, model, range(END), 1.0)
    described = Described.of(model, truncation_psi=1.0, class_index=None)
    return write(tmp_path_factory.mktemp("index") / "0.parquet", described, columns).parent


@pytest.fixture(scope="module")
def indexed(start_gateway: StartGateway, index: Path) -> Service:
    return start_gateway("--index", str(index))


@pytest.fixture(scope="module")
def options(indexed: Service) -> SampleOptions:
    """A gate at the upper quartile of the scores, and a condition that leaves out a quarter."""
    with Client(indexed.grpc) as client:
        samples = client.batch_get_samples("light", range(64), SampleOptions(max_js=1e9, where=("a:0..",)))
    scores, areas = zip(*((each.js_score, each.content["a"]) for each in samples if isinstance(each, Sample)), strict=True)
    where = (f"a:{np.quantile(areas, 0.25):.4f}..",)
    return SampleOptions(max_js=float(np.quantile(scores, 0.75)), where=where, omit_image=True, omit_label=True)


@pytest.fixture(scope="module")
def accepted(indexed: Service, options: SampleOptions) -> list[int]:
    with Client(indexed.grpc) as client:
        return [
            outcome.seed
            for first in range(0, END, 64)
            for outcome in client.batch_get_samples("light", range(first, first + 64), options)
            if isinstance(outcome, Sample)
        ]


@pytest.fixture
def seeds(indexed: Service, options: SampleOptions) -> MakeDataset:
    """A dataset whose items are seeds."""
    return partial(
        LabeledSampleDataset,
        indexed.grpc,
        "light",
        end_seed=END,
        options=options,
        transform=operator.attrgetter("seed"),
        order="global",
        global_batch_size=GLOBAL,
        shuffle_seed=SHUFFLE,
    )


def reference(accepted: list[int], epoch: int = 0, shuffle_seed: int | None = SHUFFLE) -> Batches:
    """The global batches of a pass, the last one short."""
    order = np.arange(len(accepted))
    if shuffle_seed is not None:
        key = np.array([shuffle_seed, epoch], np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(accepted)), kind="stable")
    return [[accepted[place] for place in order[first : first + GLOBAL]] for first in range(0, len(order), GLOBAL)]


def loader_of(dataset: Any, ranks: int, workers: int, kind: Any = StatefulDataLoader, **arguments: Any) -> Any:
    context = WORKERS if workers else None
    return kind(dataset, GLOBAL // ranks, num_workers=workers, multiprocessing_context=context, **arguments)


def loaders(seeds: MakeDataset, ranks: int, workers: int, **arguments: Any) -> list[Any]:
    """One for each rank."""
    return [loader_of(seeds(rank=rank, world_size=ranks, **arguments), ranks, workers) for rank in range(ranks)]


def joined(of_ranks: list[Any], steps: int | None = None) -> Batches:
    """The global batches of these loaders, one for each rank."""
    steps_of_ranks = [[batch.tolist() for batch in itertools.islice(loader, steps)] for loader in of_ranks]
    return [list(itertools.chain(*each)) for each in itertools.zip_longest(*steps_of_ranks, fillvalue=[])]


@pytest.mark.parametrize(("ranks", "workers"), SHAPES)
def test_batches_are_the_same_when_ranks_and_workers_change_in_the_middle(
    seeds: MakeDataset, accepted: list[int], ranks: int, workers: int
) -> None:
    """Each shape begins, another one goes on from the states of all its ranks, and a third one from that of one."""
    wanted = reference(accepted)
    first = loaders(seeds, ranks, workers)
    got = joined(first, 4)
    resume = merge_states(pickle.loads(pickle.dumps([loader.state_dict() for loader in first])))
    assert len(pickle.dumps(resume)) < 500
    shapes = random.Random(ranks * 10 + workers).sample([shape for shape in SHAPES if shape != (ranks, workers)], 2)
    second = loaders(seeds, *shapes[0], resume=resume)
    got += joined(second, 5)
    got += joined(loaders(seeds, *shapes[1], resume=merge_states([second[-1].state_dict()])))
    assert got == wanted and sorted(itertools.chain(*got)) == accepted, shapes
