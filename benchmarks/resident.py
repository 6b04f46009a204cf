"""Reads the memory of a process and its descendants.

Rules of this file:
- Sizes are proportional set sizes, in bytes: a page that two processes share counts once.
- A process that ends while it is being read is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def resident(root: int) -> Iterator[tuple[int, list[str], int]]:
    """Yield process id, command line and bytes of `root` and of each of its descendants."""
    queue = [root]
    while queue:
        pid = queue.pop()
        directory = Path(f"/proc/{pid}")
        try:
            for task in (directory / "task").iterdir():
                queue += [int(child) for child in (task / "children").read_text().split()]
            command = (directory / "cmdline").read_text().split("\0")
            rollup = (directory / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield pid, command, 1024 * next((int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:"), 0)
