"""Which share of a dataset a process reads: its rank's, or all of it where Accelerate divides what was read.

Rules of this file:
- The place is read when iteration begins: launchers start processes before they tell them their ranks.
- Where it cannot be seen who divides, the answer is an error: half of the samples look like all of them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset

Place = tuple[int, int]  # rank, world_size


def place_of(dataset: Any, given: Place | None, *, in_worker: bool, ends: bool) -> Place:
    """The rank and the number of ranks by which a dataset divides itself; raises ValueError where nobody can know.

    given: what the caller said, None where nothing.
    in_worker: whether a worker of a DataLoader asks, or is about to be started.
    ends: whether a pass has an end.
    """
    loader = _loader_of_accelerate(dataset, given, in_worker)
    if loader is not None:
        if ends and _loses_samples(loader):
            raise ValueError(
                "Accelerate's first process reads for all, and loses samples where the last batches of several workers "
                "differ in length: give the DataLoader drop_last=True, one worker at most, or Accelerate "
                "dispatch_batches=False"
            )
        if given is not None and given[1] > 1:
            raise ValueError(
                "Accelerate divides this loader among the processes already, and rank and world_size would divide it "
                "once more and lose samples: leave rank and world_size out"
            )
        return 0, 1
    if given is not None:
        return given
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _place_in_environment()


def _place_in_environment() -> Place:
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None and world_size != "1":
        raise ValueError(
            f"WORLD_SIZE is {world_size} and RANK is not set, so that the share of this process is unknown: initialize "
            "torch.distributed before the dataset is read, or give rank and world_size"
        )
    try:
        place = int(rank or 0), int(world_size)
    except ValueError:
        place = 0, 0
    if not 0 <= place[0] < place[1]:
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE {world_size!r}: there is no such rank")
    return place


def _loader_of_accelerate(dataset: Any, given: Place | None, in_worker: bool) -> Any:
    """The loader that Accelerate has prepared (the Hugging Face Trainer does) and that reads this dataset, else None.

    Such a loader is known to Accelerate while it is read, and divides among the processes what all of them, or the
    first one alone, have read.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.PartialState._shared_state:
        return None
    if accelerate.PartialState().num_processes == 1:
        return None
    loaders = [loader for loader in accelerate.GradientState().dataloader_references if loader is not None]
    innermost = [_innermost(loader, dataset) for loader in loaders]
    for loader, each in zip(loaders, innermost, strict=True):
        if each is dataset:
            return loader
    # A prepared loader of something unknown may read this dataset. A worker that is started before its loader is read,
    # as those of Accelerate's stateful loaders are, cannot see the loader.
    unknown = any(isinstance(each, IterableDataset) and not isinstance(each, type(dataset)) for each in innermost)
    if given is None and (unknown or in_worker):
        raise ValueError(
            "it cannot be seen whether Accelerate divides this loader among the processes: give the dataset rank=0, "
            "world_size=1 if the loader is prepared, else rank=accelerator.process_index, "
            "world_size=accelerator.num_processes"
        )
    return None


def is_dispatched(dataset: Any) -> bool:
    """Whether Accelerate reads this dataset in one process for all, ahead of what they have got."""
    return _dispatches(_loader_of_accelerate(dataset, (0, 1), in_worker=False))


def _dispatches(loader: Any) -> bool:
    return type(loader).__name__ == "DataLoaderDispatcher"  # `isinstance` is told the class of the loader within


def _loses_samples(loader: Any) -> bool:
    """Whether Accelerate's loader puts together batches that may differ in length, and cuts what does not divide."""
    return _dispatches(loader) and loader.num_workers > 1 and not loader._drop_last


def _innermost(loader: Any, dataset: Any) -> Any:
    """The dataset, or what a loader reads below all wrappers that name theirs `dataset`."""
    inner = loader
    while inner is not dataset and hasattr(inner, "dataset"):
        inner = inner.dataset
    return inner
