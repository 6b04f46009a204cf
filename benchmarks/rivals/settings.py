"""The settings of a rival, which the benchmark passes through the environment.

Rules of this file:
- All rivals have the same settings, and only the benchmark sets them, so that the comparison is fair.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

WAIT_SECONDS = 0.01  # how long a batcher with a request waits for more

# Keep the memory of large tensors for the next ones. By default glibc returns it each time, and the pages are faulted
# in again, which is a large part of eager torch's time on a CPU. One arena, because only the main arena can grow
# freely.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30), "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Settings:
    """The settings of a rival, and its port on this machine."""

    interpreter: str  # reference or factored
    workers: int  # copies of the model that work in parallel
    threads: int  # torch threads per worker
    batch: int  # largest batch
    port: int

    @classmethod
    def of_environment(cls) -> Settings:
        numbers = {name: int(os.environ[f"RIVAL_{name.upper()}"]) for name in ("workers", "threads", "batch", "port")}
        return cls(os.environ["RIVAL_INTERPRETER"], **numbers)

    def environment(self) -> dict[str, str]:
        told = {f"RIVAL_{name.upper()}": str(value) for name, value in vars(self).items()}
        # torch reads these before the rival's code can set its threads, and for threads that libraries start.
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return told | threads | ALLOCATOR
