"""Computes how much of /dev/shm the model processes of the child Triton need, and checks that it is free.

Rules of this file:
- Triton 2.51 ends with a segmentation fault when a model process finds no room in /dev/shm, even much later under load.
  So the check runs before Triton starts, and for the largest need: a full batch of each model.
- A model process holds one batch of inputs and outputs at a time. It frees no shared memory before it ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

from labelmint.core.errors import InsufficientResources
from labelmint.triton.model_config import read_config

SHARED_MEMORY = Path("/dev/shm")
_PROCESS_BYTES = 1 << 20  # the initial size in Triton's Python backend


def check_room(repository: Path, ensembles: Iterable[str], prefix: str) -> None:
    """Raises InsufficientResources unless full batches of all steps of these ensembles fit into /dev/shm.

    Files in /dev/shm whose names begin with `prefix` already belong to these models; "" if there are none.
    """
    steps = {
        step.model_name
        for ensemble in ensembles
        for step in read_config(repository / ensemble / "config.pbtxt").ensemble_scheduling.step
    }
    needed = sum(bytes_of(read_config(repository / step / "config.pbtxt")) for step in steps)
    try:
        held = sum(path.stat().st_blocks * 512 for path in SHARED_MEMORY.glob(f"{prefix}*")) if prefix else 0
        filesystem = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        raise InsufficientResources(
            f"{SHARED_MEMORY}, through which Triton passes tensors, is unusable: {error}"
        ) from error
    free = filesystem.f_bavail * filesystem.f_frsize + held
    if needed > free:
        raise InsufficientResources(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left for the models, which need up to "
            f"{needed / 2**20:.0f} MiB of it: enlarge it (Docker: --shm-size) or serve fewer models"
        )


def bytes_of(config: pb.ModelConfig) -> int:
    """Return the largest need of all processes of a step: a full batch of inputs and outputs each."""
    sample: int = sum(
        math.prod(abs(size) for size in tensor.dims)
        * np.dtype(triton_to_np_dtype(pb.DataType.Name(tensor.data_type).removeprefix("TYPE_"))).itemsize
        for tensor in (*config.input, *config.output)
    )
    processes: int = sum(max(1, group.count) for group in config.instance_group) or 1
    batch: int = max(1, config.max_batch_size)
    return processes * (_PROCESS_BYTES + batch * sample)
