"""The order "global": the same global batches whatever the ranks, workers and interruptions.

Rules of this file:
- A global batch is the seeds that the ranks get at one step, one after the other. The reference is NumPy alone.
- `light` has the classes a and b and 64x64 pixels. The gateway has an index of its seeds below 256.
- Ranks are told to the dataset, so that one process can read for each in turn; two real ones are in `rank.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import random
import re
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
    ModelVersionGone,
    NotIndexed,
    Sample,
    SampleOptions,
)
from labelmint_client.ahead import calls_of, samples_ahead
from labelmint_client.global_order import shuffled
from labelmint_client.torch import LabeledSampleDataset, merge_states
from tests.clients.conftest import StartGateway, gateways_before
from tests.conftest import ROOT, Service
from tests.support.inference import running
from tests.support.ranks import run
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
REFUSALS = ("so that they are not the global batches", "has batch_size=12, and each process takes 6 samples")


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
    scores, areas = zip(
        *((each.js_score, each.content["a"]) for each in samples if isinstance(each, Sample)), strict=True
    )
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


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 3), (4, 1)])
def test_without_a_shuffle_the_seeds_ascend(seeds: MakeDataset, accepted: list[int], ranks: int, workers: int) -> None:
    """A plain DataLoader."""
    of_ranks = [
        loader_of(seeds(rank=rank, world_size=ranks, shuffle_seed=None), ranks, workers, DataLoader)
        for rank in range(ranks)
    ]
    got = joined(of_ranks)
    assert got == reference(accepted, shuffle_seed=None) and list(itertools.chain(*got)) == accepted


def test_the_shuffle_is_what_is_documented(accepted: list[int]) -> None:
    """Numbers that no version may change: a run that is resumed elsewhere needs the same order."""
    some = np.arange(1000, 1010, dtype=np.uint32)
    assert shuffled(some, 5, 7).tolist() == [1003, 1000, 1009, 1005, 1007, 1004, 1001, 1006, 1002, 1008]
    assert shuffled(some, 7, 5).tolist() != shuffled(some, 5, 7).tolist() != shuffled(some, 5, 8).tolist()
    assert sorted(shuffled(some, 2**64 - 1, 0)) == some.tolist()


@pytest.mark.parametrize("workers", [0, 3])
def test_epochs_are_shuffled_anew(seeds: MakeDataset, accepted: list[int], workers: int) -> None:
    dataset = seeds()
    loader = loader_of(dataset, 1, workers, persistent_workers=workers > 0)
    for epoch in (0, 1, 1, 5):
        dataset.set_epoch(epoch)
        assert joined([loader]) == reference(accepted, epoch)
    dataset.set_epoch(2)
    got = joined([loader], 3)
    state = loader.state_dict()
    resumed = seeds()
    again = loader_of(resumed, 1, workers)
    again.load_state_dict(state)
    with pytest.raises(ValueError, match=r"call set_epoch\(2\)"):
        list(again)
    resumed.set_epoch(2)
    again.load_state_dict(state)
    assert got + joined([again]) == reference(accepted, 2)
    # The pass that was resumed is over: the next one is whole.
    resumed.set_epoch(3)
    assert joined([again]) == reference(accepted, 3)
    # `resume` begins with the epoch of the state.
    merged = seeds(resume=merge_states([state]))
    assert joined([loader_of(merged, 1, workers)]) == reference(accepted, 2)[3:]
    merged.set_epoch(3)
    assert joined([loader_of(merged, 1, workers)]) == reference(accepted, 3)
    merged.set_epoch(1)
    with pytest.raises(ValueError, match=r"call set_epoch\(2\)"):
        list(merged)
    fixed = seeds(fixed=True)
    fixed.set_epoch(4)
    assert joined([loader_of(fixed, 1, 0)]) == reference(accepted)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_state_goes_on_with_other_ranks_as_it_is(seeds: MakeDataset, accepted: list[int], workers: int) -> None:
    first = loaders(seeds, 2, workers)
    got = joined(first, 4)
    rest = loaders(seeds, 4, workers)
    for loader in rest:
        loader.load_state_dict(first[0].state_dict())
    assert got + joined(rest) == reference(accepted)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_only_what_is_left_over_is_dropped(seeds: MakeDataset, accepted: list[int], workers: int) -> None:
    *whole, last = reference(accepted)
    assert 4 <= len(last) < GLOBAL, "the range must leave a part of a batch, and no rank without a sample"
    assert joined(loaders(seeds, 2, workers, drop_last=True)) == whole
    assert joined([loader_of(seeds(), 1, workers, DataLoader, drop_last=True)]) == whole
    sizes = [len(list(loader)[-1]) for loader in loaders(seeds, 4, workers)]
    assert sum(sizes) == len(last) and max(sizes) - min(sizes) <= 1


KILLED = """
import json, operator, pickle, sys
from pathlib import Path
from labelmint_client import SampleOptions
from labelmint_client.torch import LabeledSampleDataset, merge_states
from torchdata.stateful_dataloader import StatefulDataLoader

endpoint, max_js, where, checkpoint, workers = sys.argv[1:]
checkpoint = Path(checkpoint)
dataset = LabeledSampleDataset(
    endpoint, "light", end_seed=256, options=SampleOptions(max_js=float(max_js), where=(where,)), order="global",
    global_batch_size=12, shuffle_seed=7, transform=operator.attrgetter("seed"),
    resume=merge_states([pickle.loads(checkpoint.read_bytes())]) if checkpoint.exists() else None,
)
loader = StatefulDataLoader(dataset, 12, num_workers=int(workers))
for batch in loader:
    checkpoint.with_suffix(".new").write_bytes(pickle.dumps(loader.state_dict()))
    checkpoint.with_suffix(".new").replace(checkpoint)
    print(json.dumps(batch.tolist()), flush=True)
    sys.stdin.readline()
"""


def test_a_run_that_is_killed_goes_on(
    indexed: Service, options: SampleOptions, accepted: list[int], tmp_path: Path
) -> None:
    """Each run but the last is killed while it waits, with other batches already fetched by its workers."""
    got: Batches = []
    for workers, steps in ((2, 3), (0, 2), (1, END)):
        arguments = [indexed.grpc, repr(options.max_js), options.where[0], str(tmp_path / "state"), str(workers)]
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            for line in itertools.islice(process.stdout, steps):
                got.append(json.loads(line))
                if steps == END or len(got) not in (3, 5):
                    process.stdin.write("\n")
                    process.stdin.flush()
            process.send_signal(signal.SIGKILL)
    assert got == reference(accepted)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "batch_size"), [(DataLoader, None), (DataLoader, 24), (StatefulDataLoader, 5), (StatefulDataLoader, 24)]
)
def test_a_loader_of_another_batch_size_is_refused(
    seeds: MakeDataset, kind: Any, batch_size: int | None, workers: int
) -> None:
    context = WORKERS if workers else None
    loader = kind(seeds(), batch_size, num_workers=workers, multiprocessing_context=context)
    with pytest.raises(ValueError, match=f"has batch_size={batch_size or 1}, and .* give it batch_size=12"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"global_batch_size": None}, "belong together"),
        ({"order": "seeds"}, "belong together"),
        ({"order": "seeds", "global_batch_size": None}, "shuffle_seed and drop_last belong"),
        ({"order": "random"}, "give seeds or global"),
        ({"global_batch_size": 0}, "give 1 or more"),
        ({"shuffle_seed": 2**64}, "0 to 2\\^64 - 1"),
        ({"end_seed": 2**32}, "needs end_seed"),
    ],
)
def test_what_cannot_be_is_refused_at_once(seeds: MakeDataset, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        seeds(**arguments)


def test_what_does_not_divide_is_refused(seeds: MakeDataset, accepted: list[int]) -> None:
    with pytest.raises(ValueError, match="12 is not divisible by 5 ranks"):
        next(iter(seeds(rank=0, world_size=5)))
    with pytest.raises(ValueError, match="and no global batch of 1000"):
        next(iter(seeds(global_batch_size=1000, drop_last=True)))
    size = next(size for size in range(4, len(accepted), 4) if 0 < len(accepted) % size < 4)
    with pytest.raises(ValueError, match=r"last global batch has \d samples for 4 ranks.*drop_last=True"):
        next(iter(seeds(global_batch_size=size, rank=0, world_size=4)))
    with pytest.raises(ValueError, match="negative"):
        seeds().set_epoch(-1)


def test_states_that_do_not_fit_are_refused(seeds: MakeDataset, indexed: Service, options: SampleOptions) -> None:
    def state(steps: int = 1, **arguments: Any) -> dict[str, Any]:
        dataset = seeds(**arguments)
        for _ in zip(range(steps * GLOBAL), dataset, strict=False):
            pass
        return dataset.state_dict()

    whole = state()
    with pytest.raises(ValueError, match="counts whole batches"):
        dataset = seeds()
        next(iter(dataset))
        dataset.state_dict()
    merged = merge_states([whole])
    for name, value in (("global_batch_size", 24), ("shuffle_seed", None), ("start_seed", 1), ("end_seed", 255)):
        with pytest.raises(ValueError, match=f"the state has {name} .*, this run has {value}"):
            seeds(**{name: value}, resume=merged)
        other = seeds(**{name: value})
        other.load_state_dict(whole)
        with pytest.raises(ValueError, match=f"the state has {name} .*, this run has {value}"):
            next(iter(other))
    with pytest.raises(ValueError, match="the state has where"):
        seeds(options=SampleOptions(max_js=options.max_js, omit_image=True), resume=merged)
    with pytest.raises(ValueError, match="order='seeds', the dataset has order='global'"):
        seeds().load_state_dict({"next_seed": 0})
    with pytest.raises(ValueError, match="order='global', the dataset has order='seeds'"):
        seeds(order="seeds", global_batch_size=None, shuffle_seed=None, resume=merged)
    for changed, problem in (
        ({"epoch": 1}, "different runs"),
        ({"batches": 2}, "different numbers of batches"),
        ({"seeds_sha256": "0" * 64}, "different models or lists"),
        ({"order": "seeds", "next_seed": 0, "shard_index": 0}, "different runs"),
    ):
        with pytest.raises(ValueError, match=problem):
            merge_states([whole, {**whole, **changed}])
    with pytest.raises(ValueError, match=r"workers 0 to 1, and states of \[0\]"):
        merge_states([{**whole, "workers": 2}])
    with pytest.raises(ValueError, match="in turn"):
        merge_states([{**whole, "workers": 2, "batches": 0}, {**whole, "workers": 2, "worker": 1}])
    loaded = seeds()
    loaded.load_state_dict({**whole, "workers": 2})
    with pytest.raises(ValueError, match="merge_states"):
        next(iter(loaded))


def test_other_samples_are_refused(
    seeds: MakeDataset, indexed: Service, options: SampleOptions, accepted: list[int]
) -> None:
    """Another gate than that of the state, another model, and a seed that is listed and has no sample."""
    resume = {**merge_states([loader_state(seeds)])}
    with pytest.raises(ModelVersionGone, match="now has seeds_sha256"):
        looser = SampleOptions(max_js=1e9, where=options.where, omit_image=True, omit_label=True)
        next(iter(seeds(options=looser, resume=resume)))
    with pytest.raises(ModelVersionGone, match="now has model_digest"):
        next(iter(seeds(resume={**resume, "model_digest": "0" * 64})))
    rejected = min(set(range(END)) - set(accepted))
    with Client(indexed.grpc) as client:
        model = client.get_model("light")
        first = calls_of(0)
        with pytest.raises(LabelmintError, match=f"listed seed {rejected} .* now it is filtered"):
            list(samples_ahead(client, model, [*accepted[:3], rejected], options=options, calls=first))
        other = dataclasses.replace(model, digest="0" * 64)
        with pytest.raises(ModelVersionGone, match="now has digest"):
            next(samples_ahead(client, other, accepted, options=options, calls=first))


def loader_state(seeds: MakeDataset) -> dict[str, Any]:
    loader = loader_of(seeds(), 1, 0)
    next(iter(loader))
    return loader.state_dict()


LIBRARIES = ("torchrun", "accelerate", "accelerate_workers", "trainer", "lightning")


@pytest.mark.parametrize("library", LIBRARIES)
def test_two_processes_of_a_training_library_get_the_global_batches(
    indexed: Service, options: SampleOptions, accepted: list[int], tmp_path: Path, library: str
) -> None:
    """With the real library; a case that a library would divide otherwise is refused."""
    arguments = [indexed.grpc, repr(options.max_js), options.where[0]]
    first, second = run(library, arguments, tmp_path / "out", script=Path(__file__).with_name("global_rank.py"))
    wanted = [batch for batch in reference(accepted) if len(batch) == GLOBAL]
    wrong = {}
    for case, got in first.items():
        if case.startswith("refused"):
            fits = any(words in str(got) for words in REFUSALS)
        else:
            got = [one + other for one, other in zip(got, second[case], strict=True)]
            fits = got == wanted[: len(got)] and len(got) >= (3 if case.startswith("trained") else len(wanted))
        if not fits:
            wrong[case] = got
    assert first and not wrong, (wrong, wanted)


def test_a_gateway_without_an_index_is_refused(start_gateway: StartGateway, seeds: MakeDataset) -> None:
    without = start_gateway()
    dataset = LabeledSampleDataset(without.grpc, "light", end_seed=END, order="global", global_batch_size=GLOBAL,
                                   options=SampleOptions(max_js=1e9))  # fmt: skip
    with pytest.raises(NotIndexed, match="labelmint index"):
        next(iter(dataset))


@pytest.mark.parametrize("window", [1, 8, 100, 300])
def test_the_window_bounds_what_is_asked_for_ahead(
    indexed: Service, options: SampleOptions, accepted: list[int], window: int
) -> None:
    asked: list[int] = []

    def wanted() -> Iterator[int]:
        for seed in itertools.chain(accepted, accepted, accepted):
            asked.append(seed)
            yield seed

    with Client(indexed.grpc) as client:
        samples = samples_ahead(client, client.get_model("light"), wanted(), options=options, calls=calls_of(window))
        got = []
        for sample in samples:
            got.append(sample.seed)
            assert window // 2 - len(got) <= len(asked) - len(got) < window
            if len(got) > 40:
                break
        assert got == asked[: len(got)]
        samples.close()  # type: ignore[attr-defined]
    with Client(indexed.grpc) as client:
        assert [
            each.seed
            for each in samples_ahead(client, client.get_model("light"), accepted, options=options, calls=calls_of(0))
        ] == (accepted)


def test_a_pass_goes_on_when_the_gateway_ends(
    start_gateway: StartGateway, index: Path, seeds: MakeDataset, accepted: list[int]
) -> None:
    gateway = start_gateway("--index", str(index))
    dataset = LabeledSampleDataset(gateway.grpc, "light", **seeds.keywords)  # type: ignore[attr-defined]
    iterator = iter(loader_of(dataset, 1, 0, DataLoader))
    got = [next(iterator).tolist() for _ in range(3)]
    gateway.process.send_signal(signal.SIGKILL)
    gateway.process.wait(60)
    start_gateway("--index", str(index), "--grpc-port", gateway.grpc.rpartition(":")[2])
    assert got + [batch.tolist() for batch in iterator] == reference(accepted)


def test_the_program_of_the_document_goes_on_with_other_ranks(
    indexed: Service, options: SampleOptions, accepted: list[int], tmp_path: Path
) -> None:
    """As it stands but for the gateway, its model and the length; it is killed, and resumed by two ranks."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs/shuffling.md").read_text(), re.DOTALL)
    (program,) = (program for program in programs if 'order="global"' in program)
    for before, after in (
        ('    "localhost:50051",\n', f'    "{indexed.grpc}", options=SampleOptions(max_js={options.max_js!r}),\n'),
        ('    "faces",\n', '    model="light",\n'),
        ("start_seed=1000", "start_seed=0"),
        ("end_seed=100_000", f"end_seed={END}"),
        ("import torch\n", "import torch\nfrom labelmint_client import SampleOptions\n"),
    ):
        assert before in program
        program = program.replace(before, after)

    def started(rank: int, ranks: int) -> subprocess.Popen[str]:
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=tmp_path,
            env={**os.environ, **place},
            stdout=subprocess.PIPE,
            text=True,
        )

    with Client(indexed.grpc) as client:
        listed = client.list_seeds("light", 0, END, options=SampleOptions(max_js=options.max_js))
    with started(0, 1) as killed:
        assert killed.stdout is not None
        lines = list(itertools.islice(killed.stdout, len(listed) // 32 + 2))
        killed.kill()
        lines += [line for line in killed.stdout if line.endswith("\n")]
    assert lines[0] == "0 torch.Size([32, 3, 64, 64])\n" and lines[-1].startswith("1 ")
    # No gradients are exchanged here, so rank 0 could save its next state before rank 1 has read this one.
    with started(1, 2) as second:
        assert second.stdout is not None
        rest = [second.stdout.readline()]
        with started(0, 2) as first:
            rest += second.stdout
            assert first.stdout is not None and list(first.stdout) == rest
    assert (first.returncode, second.returncode) == (0, 0) and rest[-1] == "2 torch.Size([16, 3, 64, 64])\n"
    # The state may count a batch that was not printed before the process was killed.
    assert 3 * (len(listed) // 32) - len(lines) - len(rest) in (0, 1)
