"""The processes of a running service."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import Service


def descendants(pid: int) -> set[int]:
    """All processes below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, frontier = set(), [pid]
    while frontier:
        for child in children.get(frontier.pop(), []):
            found.add(child)
            frontier.append(child)
    return found


def triton_pid(service: Service) -> int:
    names = {pid: (Path("/proc") / str(pid) / "comm").read_text().strip() for pid in descendants(service.process.pid)}
    (pid,) = [pid for pid, name in names.items() if name == "tritonserver"]
    return pid


def alive(pids: set[int]) -> set[int]:
    def living(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if living(pid)}


def regions(service: Service) -> set[Path]:
    """Return the shared memory of the service's Triton."""
    arguments = Path(f"/proc/{triton_pid(service)}/cmdline").read_text().split("\0")
    (prefix,) = [text.rpartition("=")[2] for text in arguments if "shm-region-prefix-name=" in text]
    return set(Path("/dev/shm").glob(f"{prefix}*"))


def refused_start(*arguments: str, under: Sequence[str] = ()) -> str:
    """Run a `serve` that must not start, `under` a command that becomes it; returns what it said."""
    command = [*under, sys.executable, "-m", "labelmint.cli", "serve", "--http-port", "0", "--grpc-port", "0"]
    command += arguments
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
