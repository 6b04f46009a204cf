"""Labeled samples as a map-style PyTorch dataset: it has a length, and each of its samples has an index.

Rules of this file:
- The process that makes a dataset lists its seeds, once. Parts, copies and workers have the list and never ask again.
- A connection belongs to one process and opens at its first sample, so a dataset can be forked, pickled and copied.
- A dataset never changes, and stays with the weights that it was made with, because others give other samples.
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from labelmint_client.ahead import MAX_BATCH, Calls, samples_ahead
from labelmint_client.client import Client
from labelmint_client.items import check_parts, image_and_label
from labelmint_client.messages import SEED_END, Model, Sample, SampleOptions
from labelmint_client.policy import check_digest

Item = TypeVar("Item")
Seeds = npt.NDArray[np.uint32]

# A batch is one call if the gateway takes it. While the answer of one is decoded, the samples of another are generated.
_CALLS = Calls(2, MAX_BATCH)


class LabeledSamples(Dataset[Item]):
    """The accepted samples of the seeds from start_seed up to, not including, end_seed, each under an index.

    endpoints, and `settings`: the arguments of `Client`. `deadline_seconds` is for a call, which has up to 64 samples.
    end_seed: 0 means the end of the gateway's index.
    options, model_version: the arguments of `Client.stream_samples`.
    transform: turns a `Sample` into an item. The default is `image_and_label`.

    The gateway needs an index of these seeds. When it is made, the dataset asks the gateway for the list of its seeds;
    raises NotIndexed if there is none. The samples are asked for as they are read: a sample raises ModelVersionGone if
    the model has other weights by then, and LabelmintError if the gateway no longer delivers it.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        model: str,
        *,
        start_seed: int = 0,
        end_seed: int = 0,
        options: SampleOptions | None = None,
        model_version: str = "",
        transform: Callable[[Sample], Item] = image_and_label,  # type: ignore[assignment]
        **settings: Any,
    ) -> None:
        if not 0 <= start_seed < (end_seed or SEED_END) <= SEED_END:
            raise ValueError(
                f"start_seed {start_seed}, end_seed {end_seed}: they are 0 to {SEED_END}, in this order; an end_seed "
                "of 0 is the end of the index"
            )
        options = options or SampleOptions()
        check_parts(transform, options)
        connect = partial(Client, endpoints, **settings)
        with connect() as client:
            self._source = _Source(connect, client.get_model(model, model_version), options)
            self._seeds = self._source.listed(client, start_seed, end_seed, options)
        self._transform = transform

    @property
    def seeds(self) -> Seeds:
        """The seeds of the samples, uint32 [len], in the order of the indices. The array is for reading."""
        seeds = self._seeds.view()
        seeds.flags.writeable = False
        return seeds

    def seed_of(self, index: SupportsIndex) -> int:
        """Return the seed of a sample. Raises IndexError."""
        return int(self._seeds[self._position(index)])

    def __len__(self) -> int:
        return len(self._seeds)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Item: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | npt.NDArray[Any]) -> LabeledSamples[Item]: ...

    def __getitem__(self, index: Any) -> Item | LabeledSamples[Item]:
        """Return the item of an index, from the last one if it is negative; of a slice or several indices, a dataset.

        The dataset of several indices has those samples in that order. To make it, no gateway is asked for anything.
        """
        if hasattr(index, "__index__") and not np.ndim(index):
            return self.__getitems__([index])[0]
        part = copy.copy(self)
        part._seeds = self._seeds[index if isinstance(index, slice) else self._positions(index)]
        return part

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Item]:
        """Return the items of several indices, in their order. A DataLoader asks for a batch in this way.

        The samples come in one call, or in a call for each 64 of them; two calls are under way at a time.
        """
        seeds = [self.seed_of(index) for index in indices]
        return [self._transform(sample) for sample in self._source.samples(seeds)]

    def class_balanced_weights(self, min_area: float | None = None) -> torch.Tensor:
        """Return weights for `WeightedRandomSampler`, float64 [len], that balance the classes.

        min_area: a class is present in a sample if its share of the image's pixels is at least this, above 0 and at
        most 1. None: one pixel.

        The weight of a sample is the sum, over the classes present in it, of 1 / (number of this dataset's samples that
        have the class). To draw with these weights is to draw a class, each with the same probability, and then one of
        the samples that have it: class-aware sampling (Shen, Lin and Huang 2016, https://arxiv.org/abs/1512.05830), for
        samples of several classes as in Wu et al. 2020 (https://arxiv.org/abs/2007.09654). Of C classes, even the
        rarest one is in at least 1/C of the samples that are drawn. Classes that no sample has do not count. A sample
        without any class has the weight 0.

        The gateway lists the seeds of each class. Raises ValueError for a model without classes, or if no sample has
        one.
        """
        names, resolution = self._source.model.class_names, self._source.model.resolution
        if not names:
            raise ValueError(f"model {self._source.model.name!r} has keypoints and no classes, so there are no weights")
        if min_area is not None and not 0 < min_area <= 1:
            raise ValueError(f"min_area is {min_area}; give a share of the image's pixels, above 0 and at most 1")
        area = 1 / resolution**2 if min_area is None else float(min_area)
        weights = np.zeros(len(self))
        for present in self._source.satisfying([f"{name}:{area!r}.." for name in names], self._seeds):
            weights += present / max(1, np.count_nonzero(present))
        if not weights.any():
            raise ValueError(f"no sample has a class of {area!r} of its pixels: give a smaller min_area")
        return torch.from_numpy(weights)

    def _position(self, index: SupportsIndex) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} is out of range: there are {len(self)} samples")
        return position

    def _positions(self, indices: Any) -> npt.NDArray[Any]:
        found = np.asarray(indices)
        if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
            raise TypeError(f"indices are whole numbers, a slice or a sequence of whole numbers, not {indices!r:.80}")
        if (outside := found[(found < -len(self)) | (found >= len(self))]).size:
            self._position(outside[0])
        return found.astype(np.int64)


class _Source:
    """Where the samples of a dataset come from: gateways, the weights and the options; with a client per process."""

    def __init__(self, connect: Callable[[], Client], model: Model, options: SampleOptions) -> None:
        self.model = model
        self._connect = connect
        self._options = options
        # By process. A forked process keeps its parent's client, which must not be closed there.
        self._clients: dict[int, Client] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}}

    def listed(self, client: Client, start_seed: int, end_seed: int, options: SampleOptions) -> Seeds:
        """Return the seeds of a range whose samples are delivered under these options."""
        listed = client.list_seeds(
            self.model.name, start_seed, end_seed, options=options, model_version=self.model.version
        )
        self._check(listed.model_digest)
        return listed.seeds

    def satisfying(self, conditions: Sequence[str], seeds: Seeds) -> Iterator[npt.NDArray[np.bool_]]:
        """Yield for each condition which of the dataset's seeds, uint32 [N], satisfy it: bool [N]."""
        if not len(seeds):
            return
        start_seed, end_seed = int(seeds.min()), int(seeds.max()) + 1
        with self._connect() as client:
            for condition in conditions:
                # The seeds satisfy the dataset's own conditions, and a request may name a class only once.
                options = replace(self._options, where=(condition,))
                yield np.isin(seeds, self.listed(client, start_seed, end_seed, options))

    def samples(self, seeds: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples of the seeds, in their order, while the next call is under way."""
        return samples_ahead(self._client(), self.model, seeds, options=self._options, calls=_CALLS)

    def _client(self) -> Client:
        if os.getpid() not in self._clients:
            self._clients[os.getpid()] = self._connect()
        return self._clients[os.getpid()]

    def _check(self, digest: str) -> None:
        check_digest(self.model, digest, self.model.digest, "dataset")
