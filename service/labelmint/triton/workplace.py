"""The temporary directory for a run of the child Triton, in which every path is safe for a shell.

Rules of this file:
- Triton's Python backend starts each model process through a shell and quotes nothing. A blank would split a path, and
  `$(...)` in one would be run. So Triton never gets a user's path; it gets symbolic links in this directory.
- The owner process keeps a lock on the directory while it lives, and the system releases the lock however it ends. A
  later start removes directories without an owner and the shared memory named after them, but only this user's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from labelmint.core.errors import InsufficientResources
from labelmint.triton.shared_memory import SHARED_MEMORY

PREFIX = "labelmint-triton-"
_OWNED = re.compile(PREFIX + "([a-z0-9_]{8})")  # the names that mkdtemp chooses
_LOCK = "owner.lock"
_USUAL = ("/tmp", "/var/tmp")
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")


class Workplace:
    """`path` is the directory. The names of the run's shared memory begin with `shared_memory`."""

    def __init__(self) -> None:
        """Create the directory. Raises InsufficientResources if no temporary directory is usable."""
        base = _base()
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self.shared_memory = _shared_memory_of(self.path)
        # The file is locked before it gets its name: if another process can lock the named file, the owner has ended.
        aside = self.path / f".{_LOCK}"
        self._lock = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.replace(aside, self.path / _LOCK)

    def link(self, name: str, target: Path) -> Path:
        """Link to `target`; return the path of the link, which is safe for a shell."""
        path = self.path / name
        path.symlink_to(target.absolute())
        return path

    def remove(self) -> None:
        """Remove the directory and its shared memory. No process may still use them."""
        _remove(self.path)
        os.close(self._lock)


def _base() -> Path:
    """Return the temporary directory, or a usual one if that forbids programs or its path is not shell-safe."""
    preferred = tempfile.gettempdir()
    for candidate in map(Path, (preferred, *_USUAL)):
        with contextlib.suppress(OSError):
            runs = not os.statvfs(candidate).f_flag & os.ST_NOEXEC
            if _PLAIN.fullmatch(str(candidate)) and runs and os.access(candidate, os.R_OK | os.W_OK | os.X_OK):
                return candidate
    raise InsufficientResources(
        "the gateway's own Triton needs a temporary directory that allows programs to run and whose path has only "
        f"letters, digits and `/._+@-`; {preferred!r} is not one, nor is {' or '.join(_USUAL)}: set TMPDIR"
    )


def _sweep(base: Path) -> None:
    """Remove the directories of killed owners. Those that cannot be removed stay, since they prevent no start."""
    for path in [entry for entry in base.iterdir() if _OWNED.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):  # it has an owner, or no lock yet
            _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    for region in SHARED_MEMORY.glob(f"{_shared_memory_of(path)}*"):
        with contextlib.suppress(OSError):
            region.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _shared_memory_of(path: Path) -> str:
    return f"labelmint_{path.name.removeprefix(PREFIX)}_"
