"""What the benchmark asks of a rival, through the environment.

Rules of this file:
- No rival has a setting that the others lack, and none decides one for itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

WAIT_SECONDS = 0.01  # what a batcher waits for more requests once it has one

# Memory of large tensors is kept for the next ones. By default glibc gives it back each time and its pages are faulted
# in anew: a good part of what eager torch takes on a CPU. One arena, as only the main one may grow to any size.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30), "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Settings:
    """How a rival works, and where it listens on this machine."""

    interpreter: str  # reference or factored
    workers: int  # copies of the model that work at once
    threads: int  # torch's threads in each
    batch: int  # most requests in one
    port: int

    @classmethod
    def of_environment(cls) -> Settings:
        numbers = {name: int(os.environ[f"RIVAL_{name.upper()}"]) for name in ("workers", "threads", "batch", "port")}
        return cls(os.environ["RIVAL_INTERPRETER"], **numbers)

    def environment(self) -> dict[str, str]:
        told = {f"RIVAL_{name.upper()}": str(value) for name, value in vars(self).items()}
        # torch reads these before any code of ours can set its threads, and for threads that others start.
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return told | threads | ALLOCATOR
