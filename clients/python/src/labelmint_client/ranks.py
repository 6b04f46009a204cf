"""Decides which share of a dataset a process reads: that of its rank, or all of it if Accelerate divides the samples.

Rules of this file:
- The rank is read when iteration begins, because launchers may start processes before they assign ranks.
- If it is unclear whether Accelerate divides the samples, the result is an error. Otherwise a job could silently train
  on half of the samples.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset

Place = tuple[int, int]  # rank, world_size
_BATCH = "possibly_batched_index"  # in `fetch` of torch.utils.data._utils.fetch


def place_of(dataset: Any, given: Place | None, *, in_worker: bool, ends: bool, ordered: bool = False) -> Place:
    """Return the rank and the number of ranks by which a dataset divides itself. Raises ValueError if they are unknown.

    given: the caller's rank and world_size; None if not given.
    in_worker: whether a DataLoader worker calls this function or is about to be started.
    ends: whether a pass over the dataset ends.
    ordered: whether batches of several ranks belong together.
    """
    loader = _loader_of_accelerate(dataset, given, in_worker)
    if loader is not None:
        if ordered and _dispatches(loader) and loader.num_workers > 1:
            raise ValueError(
                "Accelerate's first process reads for all processes, and joins batches of several workers, so that "
                "they are not the global batches: give the DataLoader at most one worker, or give Accelerate "
                "dispatch_batches=False"
            )
        if ends and _loses_samples(loader):
            raise ValueError(
                "Accelerate's first process reads for all processes, and loses samples where the last batches of "
                "several workers differ in length: give the DataLoader drop_last=True or at most one worker, or give "
                "Accelerate dispatch_batches=False"
            )
        if given is not None and given[1] > 1:
            raise ValueError(
                "Accelerate divides this loader among the processes already. rank and world_size would divide it again "
                "and lose samples: leave them out"
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
            f"WORLD_SIZE is {world_size} and RANK is not set, so the share of this process is unknown: initialize "
            "torch.distributed before reading the dataset, or give rank and world_size"
        )
    try:
        place = int(rank or 0), int(world_size)
    except ValueError:
        place = 0, 0
    if not 0 <= place[0] < place[1]:
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE is {world_size!r}: there is no such rank")
    return place


def _loader_of_accelerate(dataset: Any, given: Place | None, in_worker: bool) -> Any:
    """Return the loader that reads this dataset and that Accelerate has prepared (the Trainer does so too), or None.

    Accelerate knows such a loader while the loader is being read. The loader divides samples among the processes. The
    samples are read by all processes, or by the first one alone.
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
    # A prepared loader of an unknown dataset may read this one. A worker that starts before its loader is read cannot
    # see the loader; the workers of Accelerate's stateful loaders do so.
    unknown = any(isinstance(each, IterableDataset) and not isinstance(each, type(dataset)) for each in innermost)
    if given is None and (unknown or in_worker):
        raise ValueError(
            "cannot determine whether Accelerate divides this loader among the processes: give the dataset rank=0, "
            "world_size=1 if Accelerate prepared the loader, else rank=accelerator.process_index, "
            "world_size=accelerator.num_processes"
        )
    return None


def is_dispatched(dataset: Any) -> bool:
    """Whether one process of Accelerate reads this dataset for all processes, ahead of delivery."""
    return _dispatches(_loader_of_accelerate(dataset, (0, 1), in_worker=False))


def parts_of(dataset: Any) -> int:
    """Return among how many processes Accelerate divides the samples of this dataset, in batches of its loader."""
    loader = _loader_of_accelerate(dataset, (0, 1), in_worker=False)
    if loader is None or (_dispatches(loader) and loader.split_batches):
        return 1
    processes: int = sys.modules["accelerate.state"].PartialState().num_processes
    return processes


def check_batch_size(size: int, parts: int) -> None:
    """Raises ValueError if a DataLoader that asks for the next sample has another batch size than size / parts.

    A loader does not tell its dataset the batch size. What fetches its batches has one item for each sample of a batch
    in a local variable. If another version of torch has not, nothing is checked.
    """
    wanted, rest = divmod(size, parts)
    if rest:
        raise ValueError(f"global_batch_size {size} is not divisible by {parts} processes of Accelerate")
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code.co_name == "fetch" and _BATCH in frame.f_locals):
        frame = frame.f_back
    if frame is None:
        return
    batch = frame.f_locals[_BATCH]
    found = 1 if batch is None else len(batch)
    if found != wanted:
        raise ValueError(
            f"the DataLoader has batch_size={found}, and each process takes {wanted} samples of a global batch: give "
            f"it batch_size={wanted}"
        )


def _dispatches(loader: Any) -> bool:
    return type(loader).__name__ == "DataLoaderDispatcher"  # not `isinstance`: it sees the class of the wrapped loader


def _loses_samples(loader: Any) -> bool:
    """Whether Accelerate's loader joins batches that may differ in length, and drops what does not divide evenly."""
    return _dispatches(loader) and loader.num_workers > 1 and not loader._drop_last


def _innermost(loader: Any, dataset: Any) -> Any:
    """Follow the `dataset` attributes of loaders and wrappers, down to `dataset` or to the innermost object."""
    inner = loader
    while inner is not dataset and hasattr(inner, "dataset"):
        inner = inner.dataset
    return inner
