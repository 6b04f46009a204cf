"""Labeled samples as a PyTorch dataset that is split over ranks and workers and can resume at any batch.

Rules of this file:
- In the order "seeds", worker w of W on rank r takes shard r * W + w, that is, the seeds congruent to it modulo the
  number of all workers. Each seed is in exactly one shard. `global_order.py` has the order "global".
- The only part of a worker's state that changes is its cursor, `next_seed` or `batches`. The rest describes the run.
  With it, a state from a run with other settings is refused instead of mixed in.
- Nothing connects before a worker iterates, so a dataset can be forked, pickled and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from labelmint_client.client import Client
from labelmint_client.global_order import GlobalOrder, Reader, merge_global_states
from labelmint_client.items import check_parts, image_and_label
from labelmint_client.map_style import LabeledSamples
from labelmint_client.messages import SEED_END, Sample, SampleOptions
from labelmint_client.ranks import Place, check_batch_size, is_dispatched, parts_of, place_of

__all__ = ["LabeledSampleDataset", "LabeledSamples", "image_and_label", "merge_states"]

Item = TypeVar("Item")


class LabeledSampleDataset(IterableDataset[Item]):
    """The accepted samples of the seeds from start_seed up to, not including, end_seed.

    endpoints, and `settings`: the arguments of `Client`.
    options, window, model_version: the arguments of `Client.stream_samples`.
    transform: turns a `Sample` into an item. The default is `image_and_label`.
    rank, world_size: those of this process. The default comes from torch.distributed when iteration begins, else from
    the variables RANK and WORLD_SIZE. If a loader prepared by Accelerate reads the dataset, Accelerate divides it.
    fixed: each pass has the same seeds, even if a library calls `set_epoch`. Use it for validation.
    resume: the result of `merge_states` for the states of another run, whose samples are then skipped.

    order: "seeds", ascending, each worker its shard; or "global", the same global batches for any number of workers.

    Order "seeds": without end_seed the dataset is one endless pass. With it, each pass is the same fixed set, as
    validation needs it. For training, `set_epoch` gives each pass new seeds.

    Order "global": each pass has all accepted seeds of the range, which the gateway lists from its index (`list_seeds`;
    without an index, iteration raises NotIndexed). It is cut into global batches, which do not depend on the numbers of
    ranks and workers, nor on where a run was interrupted: what Mosaic Streaming calls elastic determinism. As there, a
    run may resume on another number of GPUs in the middle of an epoch, and each sample comes once. Other than there,
    the shuffle needs no canonical number of nodes, and no sample is repeated to fill up a batch.

    global_batch_size: the samples of a batch of all ranks together. The ranks must divide it. Give the DataLoader
    batch_size=global_batch_size // ranks; another one is refused.
    shuffle_seed: 0 to 2^64 - 1; the order of the seeds then depends on it and on `set_epoch`. None: ascending.
    drop_last: leave out the last global batch of a pass if it is not full. Otherwise the ranks divide what it has,
    and may get one sample more or less. Do not leave this to the DataLoader's drop_last: only some ranks would drop it.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        model: str,
        *,
        start_seed: int = 0,
        end_seed: int = SEED_END,
        options: SampleOptions | None = None,
        window: int = 0,
        model_version: str = "",
        transform: Callable[[Sample], Item] = image_and_label,  # type: ignore[assignment]
        rank: int | None = None,
        world_size: int | None = None,
        fixed: bool = False,
        resume: Mapping[str, Any] | None = None,
        order: Literal["seeds", "global"] = "seeds",
        global_batch_size: int | None = None,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        **settings: Any,
    ) -> None:
        if not 0 <= start_seed < end_seed <= SEED_END:
            raise ValueError(f"start_seed {start_seed}, end_seed {end_seed}: they are 0 to {SEED_END}, in this order")
        options = options or SampleOptions()
        check_parts(transform, options)
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size belong together; give both")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}: give 0 to world_size - 1")
        if order not in ("seeds", "global"):
            raise ValueError(f"order {order!r}: give seeds or global")
        if (order == "global") != (global_batch_size is not None):
            raise ValueError('order="global" and global_batch_size belong together; give both')
        if order == "seeds" and (shuffle_seed is not None or drop_last):
            raise ValueError('shuffle_seed and drop_last belong to order="global"')
        self._endpoints = endpoints
        self._settings = settings
        self._model = model
        self._range = start_seed, end_seed
        self._options = options
        self._window = window
        self._transform = transform
        self._given: Place | None = None if rank is None or world_size is None else (rank, world_size)
        # The place that the starting process passes to a worker that is not forked, and among how many processes
        # Accelerate divides what it yields; or the reason why there is no place.
        self._told: tuple[Place, int] | str | None = None
        self._fixed = fixed
        # In shared memory, so that persistent workers see the epoch that the training process sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._global: GlobalOrder | None = None
        if resume is not None:
            _check_order(resume, order)
        if global_batch_size is not None:
            self._global = GlobalOrder(
                global_batch_size=global_batch_size,
                shuffle_seed=shuffle_seed,
                drop_last=drop_last,
                start_seed=start_seed,
                end_seed=end_seed,
                options=options,
                model_version=model_version,
                resume=resume,
            )
            self._epoch.fill_(self._global.first_epoch)
        self._in_batch = False  # order "global": whether the last sample was in the middle of a batch
        self._begin: dict[str, Any] = {
            "model_version": "",
            "model_digest": "",
            "done": [],
            "epoch": 0,
            **(resume or {}),
        }
        if resume:
            _check_content(self._begin, options)
        self._begin["model_version"] = model_version or self._begin["model_version"]
        self._loaded: Mapping[str, Any] | None = None
        self._state: dict[str, Any] = {}

    def set_epoch(self, epoch: int) -> None:
        """Give each pass from the next one on the seeds, or with order "global" the shuffle, of this epoch.

        Order "seeds": the range is shifted by `epoch` times its length. Raises ValueError if it would then end beyond
        the last seed. Keep validation seeds below start_seed.
        """
        start, end = self._range
        if self._fixed:
            return
        if self._global is not None:
            if epoch < 0:
                raise ValueError(f"epoch {epoch} is negative")
        elif epoch < 0 or end + epoch * (end - start) > SEED_END:
            raise ValueError(
                f"epoch {epoch} of seeds {start} to {end} is beyond the last seed; give a smaller end_seed"
            )
        self._epoch.fill_(epoch)

    def __getstate__(self) -> dict[str, Any]:
        try:
            return {**self.__dict__, "_told": (self._place(in_worker=True), parts_of(self))}
        except ValueError as error:
            return {**self.__dict__, "_told": str(error)}

    def __iter__(self) -> Iterator[Item]:
        epoch = int(self._epoch)
        if self._global is not None:
            return self._begin_global(self._global, epoch)
        start, end = (seed + epoch * (self._range[1] - self._range[0]) for seed in self._range)
        state = {**self._begin, **self._shard(), "epoch": epoch, **_content_of(self._options)}
        if self._begin["epoch"] != epoch:
            state["done"] = []
        state["next_seed"] = max([start, *(min(layer) for layer in state["done"])])
        # A loaded state applies to one pass only: the one in which it was saved.
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] >= epoch:
            state |= loaded
            state |= {"epoch": epoch, **_content_of(self._options)}
        else:
            loaded = None
        self._state = state
        return self._walk(state, loaded, end)

    def _begin_global(self, order: GlobalOrder, epoch: int) -> Iterator[Item]:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] < epoch:
            loaded = None
        self._state = order.begin(self._reader(), epoch=epoch, loaded=loaded)
        self._in_batch = False
        return self._walk_global(order, self._state, loaded)

    def _shard(self) -> dict[str, int]:
        rank, ranks, worker, workers = self._reader()
        return {"shard_index": rank * workers + worker, "shard_count": ranks * workers}

    def _reader(self) -> Reader:
        worker = get_worker_info()
        workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if worker is None or self._told is None:
            rank, world_size = self._place(in_worker=worker is not None)
        elif isinstance(self._told, str):
            raise ValueError(self._told)
        else:
            (rank, world_size), _ = self._told
        return Reader(rank, world_size, index, workers)

    def _parts(self) -> int:
        if get_worker_info() is not None and isinstance(self._told, tuple):
            return self._told[1]
        return parts_of(self)

    def _place(self, *, in_worker: bool) -> Place:
        ordered = self._global is not None
        return place_of(self, self._given, in_worker=in_worker, ends=self._range[1] < SEED_END, ordered=ordered)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process in its pass, as a small dict of numbers, strings and lists.

        Raises ValueError if one process of Accelerate reads for all: the state would be ahead of the delivered samples.
        Also with order "global" in the middle of a batch, because a state counts whole batches.
        """
        if is_dispatched(self):
            raise ValueError(
                "Accelerate prefetches the batches that it dispatches, so a run that is resumed with this state "
                "would lose samples: give DataLoaderConfiguration(dispatch_batches=False), or leave out "
                "use_stateful_dataloader"
            )
        if self._in_batch:
            raise ValueError('a state of order="global" counts whole batches: ask for it after a whole one')
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass resume where the state was taken. The numbers of ranks and workers must be the same.

        With order "global", the number of ranks may be another one.
        """
        _check_order(state, "seeds" if self._global is None else "global")
        self._loaded = state
        self._state = dict(state)

    def _walk(self, state: dict[str, Any], loaded: Mapping[str, Any] | None, end_seed: int) -> Iterator[Item]:
        done: list[list[int]] = state["done"]
        # The shard is determined only now. Accelerate's stateful loaders call `iter` when they are prepared: that is
        # before one can see that they divide the samples, and also in processes that never read.
        state |= self._shard()
        if loaded is not None:
            _check_fits(loaded, state)
            _check_content(loaded, self._options)
        start_seed = min(state["next_seed"], end_seed)
        with (
            Client(self._endpoints, **self._settings) as client,
            client.stream_samples(
                self._model,
                start_seed,
                end_seed=end_seed,
                shard_index=state["shard_index"],
                shard_count=state["shard_count"],
                model_version=state["model_version"],
                model_digest=state["model_digest"],
                options=self._options,
                window=self._window,
            ) as stream,
        ):
            state["model_version"], state["model_digest"] = stream.model.version, stream.model.digest
            for sample in stream:
                state["next_seed"] = stream.next_seed
                if not any(sample.seed < layer[sample.seed % len(layer)] for layer in done):
                    yield self._transform(sample)
            state["next_seed"] = end_seed

    def _walk_global(
        self, order: GlobalOrder, state: dict[str, Any], loaded: Mapping[str, Any] | None
    ) -> Iterator[Item]:
        reader = self._reader()  # only now, as in `_walk`
        state |= {"worker": reader.worker, "workers": reader.workers}
        order.check(state, loaded)
        check_batch_size(order.slice_size(reader.ranks), self._parts())
        with Client(self._endpoints, **self._settings) as client:
            for sample, last in order.samples(client, self._model, state=state, reader=reader, window=self._window):
                self._in_batch = not last
                yield self._transform(sample)


def _check_order(state: Mapping[str, Any], order: str) -> None:
    """Raises ValueError if the state is of another order than the dataset."""
    if (found := state.get("order", "seeds")) != order:
        raise ValueError(f"the state is of order={found!r}, the dataset has order={order!r}: give the same one")


def merge_states(states: Iterable[Any]) -> dict[str, Any]:
    """Merge the states of all ranks into the dataset's `resume`, for a run with another number of ranks or workers.

    states: one per rank, from the dataset or from the StatefulDataLoader around it. The result is small: one cursor per
    old worker. With order "global", the state of one rank is enough, and the result is one cursor.
    Raises ValueError if a worker's state is missing or the states come from different runs.
    """
    found = [state for each in states for state in _worker_states(each)]
    if not found:
        raise ValueError("found no state of a LabeledSampleDataset in the given states")
    if any(state.get("order") == "global" for state in found):
        return merge_global_states(found)
    found.sort(key=lambda state: state["shard_index"])
    # The version that saved it may have known neither conditions nor classes.
    found = [{**_content_of(SampleOptions()), **state} for state in found]
    run = {key: found[0][key] for key in ("shard_count", "epoch", "done", *_content_of(SampleOptions()))}
    if any({key: state[key] for key in run} != run for state in found):
        raise ValueError("the states come from different runs or epochs: give states that were saved together")
    digests = {state["model_digest"] for state in found} - {""}  # empty before a worker's first sample
    if len(digests) > 1:
        raise ValueError(f"the states come from models with different digests: {', '.join(sorted(digests))}")
    shards = [state["shard_index"] for state in found]
    if shards != list(range(run["shard_count"])):
        raise ValueError(f"the run had workers 0 to {run['shard_count'] - 1}, and states of {shards}: give each once")
    layers = [*run["done"], [state["next_seed"] for state in found]]
    reached = max(min(layer) for layer in layers)  # below it everything is done
    return {
        "done": [layer for layer in layers if max(layer) > reached] or [[reached]],
        "epoch": run["epoch"],
        "where": run["where"],
        "class_index": run["class_index"],
        "model_version": max(state["model_version"] for state in found),
        "model_digest": max(digests, default=""),
    }


def _check_fits(state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises ValueError if a loaded state comes from another epoch or division into shards than this run."""
    if state["epoch"] != run["epoch"]:
        raise ValueError(f"the state is of epoch {state['epoch']}: call set_epoch({state['epoch']}) before you load it")
    for key in ("shard_index", "shard_count"):
        if state[key] != run[key]:
            raise ValueError(
                f"the state has {key} {state[key]}, this run has {run[key]}: if the number of ranks or workers has "
                "changed, give the states of all ranks to merge_states, and the result to the dataset as `resume`"
            )


def _content_of(options: SampleOptions) -> dict[str, Any]:
    """Return the options that decide what the samples show. A state has them, because a resumed pass keeps to them."""
    return {"where": list(options.where), "class_index": options.class_index}


def _check_content(state: Mapping[str, Any], options: SampleOptions) -> None:
    """Raises ValueError if a state has other conditions or another class: a resumed pass would be a mixture."""
    before, now = state.get("where", []), options.where
    if before != list(now):
        raise ValueError(
            f"the state has the conditions {', '.join(before) or 'none'}, this run has {', '.join(now) or 'none'}: "
            "give the same `where`, or begin anew"
        )
    if state.get("class_index") != options.class_index:
        raise ValueError(
            f"the state has the class_index {state.get('class_index')}, this run has {options.class_index}: give the "
            "same class_index, or begin anew"
        )


def _worker_states(state: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the dataset's states from anywhere inside the state of a loader."""
    if isinstance(state, Mapping):
        if ("next_seed" in state and "shard_index" in state) or state.get("order") == "global":
            yield state
            return
        if state.get("_steps_since_snapshot"):
            raise ValueError("batches were delivered after the snapshot: use snapshot_every_n_steps=1")
        for value in state.values():
            yield from _worker_states(value)
