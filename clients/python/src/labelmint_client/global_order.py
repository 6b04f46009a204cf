"""The global order of a pass: which samples are in each global batch, which of them a process reads, and its state.

Rules of this file:
- A global batch depends on the seeds that the gateway lists, on global_batch_size, shuffle_seed and the epoch, and on
  nothing else. Rank r of R takes the r-th of R contiguous slices of every global batch. The workers of its DataLoader
  take its slices in turn, and a DataLoader asks its workers in turn, so it delivers the slices in order.
- A state counts global batches. It says nothing of ranks, so that any number of them can go on.
- The shuffle uses raw numbers of Philox alone. Of these NumPy promises that no version changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from labelmint_client.ahead import samples_ahead
from labelmint_client.client import Client
from labelmint_client.errors import ModelVersionGone
from labelmint_client.messages import SEED_END, Model, Sample, SampleOptions

Seeds = npt.NDArray[np.uint32]
State = dict[str, Any]

_SETTINGS = ("global_batch_size", "shuffle_seed", "start_seed", "end_seed", "where")
# What a later run takes over from a state: the first two for the epoch of the state, the others for all.
_POSITION = ("first_batch", "batches")
_PINNED = ("model_version", "model_digest", "seeds_sha256")


class Reader(NamedTuple):
    """Who reads: worker of `workers` of the DataLoader in a process that is rank of `ranks`."""

    rank: int
    ranks: int
    worker: int
    workers: int


def shuffled(seeds: Seeds, shuffle_seed: int, epoch: int) -> Seeds:
    """Return uint32 [N], the seeds in the order of an epoch.

    Seed i gets the i-th 64-bit number of Philox4x64-10 with the key (shuffle_seed, epoch) and the counter 0. The seeds
    are sorted by their numbers.
    """
    numbers = np.random.Philox(key=np.array([shuffle_seed, epoch], np.uint64)).random_raw(len(seeds))
    return seeds[np.argsort(numbers, kind="stable")]


class GlobalOrder:
    """The settings of a global order, and what follows from them. `LabeledSampleDataset` documents the arguments."""

    def __init__(
        self,
        *,
        global_batch_size: int,
        shuffle_seed: int | None,
        drop_last: bool,
        start_seed: int,
        end_seed: int,
        options: SampleOptions,
        model_version: str,
        resume: Mapping[str, Any] | None,
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(
                f"global_batch_size {global_batch_size}: give 1 or more, the samples of a batch of all ranks"
            )
        if shuffle_seed is not None and not 0 <= shuffle_seed < 2**64:
            raise ValueError(f"shuffle_seed {shuffle_seed}: give 0 to 2^64 - 1")
        if end_seed == SEED_END:
            raise ValueError('order="global" needs end_seed: a pass has the accepted seeds of a range that is indexed')
        self._batch_size = global_batch_size
        self._shuffle_seed = shuffle_seed
        self._drop_last = drop_last
        self._range = start_seed, end_seed
        self._options = options
        self._model_version = model_version
        self._resume = resume
        values = (global_batch_size, shuffle_seed, start_seed, end_seed, list(options.where))
        self._settings = dict(zip(_SETTINGS, values, strict=True))
        if resume is not None:
            self._check_settings(resume)

    @property
    def first_epoch(self) -> int:
        """The epoch that a run begins with: that of the state that it resumes."""
        return 0 if self._resume is None else self._resume["epoch"]

    def begin(self, reader: Reader, *, epoch: int, loaded: Mapping[str, Any] | None) -> State:
        """Return the state at the beginning of a pass, or where the loaded or resumed state of its epoch was taken.

        `check` says whether that state fits.
        """
        state: State = {
            "order": "global",
            **self._settings,
            **dict.fromkeys(_PINNED, ""),
            "epoch": epoch,
            "first_batch": 0,  # the global batch that this run begins with
            "batches": 0,  # how many this worker has done since
            "worker": reader.worker,
            "workers": reader.workers,
        }
        for source in (self._resume, loaded):
            if source is not None:
                state |= {key: source[key] for key in (*_PINNED, *(_POSITION if source["epoch"] == epoch else ()))}
        state["model_version"] = self._model_version or state["model_version"]
        return state

    def check(self, state: State, loaded: Mapping[str, Any] | None) -> None:
        """Raises ValueError if the loaded or resumed state is of a later epoch, or does not fit this run."""
        for source in (self._resume, loaded):
            if source is not None and source["epoch"] > state["epoch"]:
                raise ValueError(
                    f"the state is of epoch {source['epoch']}, this pass is of epoch {state['epoch']}: "
                    f"call set_epoch({source['epoch']}) first"
                )
        if loaded is None:
            return
        self._check_settings(loaded)
        if [loaded[key] for key in ("worker", "workers")] != [state[key] for key in ("worker", "workers")]:
            raise ValueError(
                f"the state is of worker {loaded['worker']} of {loaded['workers']}, this is worker {state['worker']} "
                f"of {state['workers']}: give the state of the loader to merge_states, and the result to the dataset "
                "as `resume`"
            )

    def slice_size(self, ranks: int) -> int:
        """Return how many samples of a global batch are for each rank. Raises ValueError if they differ."""
        if self._batch_size % ranks:
            raise ValueError(f"global_batch_size {self._batch_size} is not divisible by {ranks} ranks")
        return self._batch_size // ranks

    def samples(
        self, client: Client, model: str, *, state: State, reader: Reader, window: int
    ) -> Iterator[tuple[Sample, bool]]:
        """Yield the samples of one worker and whether each is the last of its slice. Updates the state."""
        described, seeds = self._listed(client, model, state)
        slices = self._slices(seeds, state, reader)
        sizes, wanted = [len(each) for each in slices], (int(seed) for each in slices for seed in each)
        samples = samples_ahead(client, described, wanted, options=self._options, window=window)
        for size in sizes:
            for left in reversed(range(size)):
                sample = next(samples)
                if left == 0:
                    state["batches"] += 1
                yield sample, left == 0

    def _listed(self, client: Client, model: str, state: State) -> tuple[Model, Seeds]:
        """Return the model and all accepted seeds of the range. Raises ModelVersionGone if the state has others."""
        start, end = self._range
        described = client.get_model(model, state["model_version"])
        listed = client.list_seeds(model, start, end, options=self._options, model_version=described.version)
        found = {
            "model_version": described.version,
            "model_digest": listed.model_digest,
            "seeds_sha256": hashlib.sha256(listed.seeds.astype("<u4").tobytes()).hexdigest(),
        }
        for key in ("model_digest", "seeds_sha256"):
            if state[key] not in ("", found[key]):
                raise ModelVersionGone(
                    f"version {described.version} of model {model!r} now has {key} {found[key][:12]}..., the state has "
                    f"{state[key][:12]}...: other weights, gates or options give other batches; begin anew",
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "MODEL_VERSION_GONE",
                    {"model": model, "model_version": described.version, "model_digest": state["model_digest"]},
                )
        state |= found
        return described, listed.seeds

    def _slices(self, seeds: Seeds, state: State, reader: Reader) -> list[Seeds]:
        """Return the slices that one worker has yet to read, each uint32 [slice_size] but for the last of the pass."""
        size = self.slice_size(reader.ranks)
        whole, rest = divmod(len(seeds), self._batch_size)
        count = whole + (rest > 0 and not self._drop_last)
        if count == 0:
            raise ValueError(
                f"seeds {self._range[0]} to {self._range[1]} have {len(seeds)} accepted samples, and no global batch "
                f"of {self._batch_size}: give a larger range"
            )
        if count > whole and rest < reader.ranks:
            raise ValueError(
                f"the last global batch has {rest} samples for {reader.ranks} ranks, so some would get none and the "
                "others would wait for them: give the dataset drop_last=True, or another end_seed"
            )
        if self._shuffle_seed is not None:
            seeds = shuffled(seeds, self._shuffle_seed, state["epoch"])
        first = state["first_batch"] + reader.worker + state["batches"] * reader.workers
        slices = []
        for batch in range(first, count, reader.workers):
            begin = batch * self._batch_size
            samples = size * reader.ranks if batch < whole else rest
            low, high = (samples * rank // reader.ranks for rank in (reader.rank, reader.rank + 1))
            slices.append(seeds[begin + low : begin + high])
        return slices

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        for key, value in self._settings.items():
            if state[key] != value:
                raise ValueError(
                    f"the state has {key} {state[key]}, this run has {value}: give the same, or begin anew"
                )


def merge_global_states(states: Sequence[Mapping[str, Any]]) -> State:
    """Return the `resume` of a later run from the states of all workers of one rank or of several.

    Raises ValueError if a worker's state is missing, or if they were not saved at the same batch of the same run.
    """
    run: State = {key: states[0].get(key) for key in ("order", *_SETTINGS, "epoch", "first_batch", "workers")}
    if any({key: state.get(key) for key in run} != run for state in states):
        raise ValueError("the states come from different runs or epochs: give states that were saved together")
    pinned = {key: max(state[key] for state in states) for key in _PINNED}  # empty before a worker's first sample
    done: dict[int, int] = {}
    for state in states:
        if any(state[key] not in ("", value) for key, value in pinned.items()):
            raise ValueError("the states come from different models or lists of seeds: give states of one run")
        done.setdefault(state["worker"], state["batches"])
        if done[state["worker"]] != state["batches"]:
            raise ValueError("the ranks have done different numbers of batches: give states that were saved together")
    workers = run.pop("workers")
    if sorted(done) != list(range(workers)):
        raise ValueError(f"each rank had workers 0 to {workers - 1}, and states of {sorted(done)}: give each once")
    total = sum(done.values())
    if any(done[worker] != -(-(total - worker) // workers) for worker in done):
        raise ValueError(
            "the workers have not taken their batches in turn: save the state of a loader with in_order=True"
        )
    return {**run, **pinned, "first_batch": run["first_batch"] + total, "batches": 0}
