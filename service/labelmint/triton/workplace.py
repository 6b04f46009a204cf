"""The directory of a run of our own Triton, in which it finds everything under names that a shell reads as they are.

Rules of this file:
- Triton's Python backend starts each model process through a shell and quotes nothing: a blank in a path cuts it, and
  `$(...)` in one is run. So no path of the user's reaches Triton; symbolic links of ours lead there.
- The owner holds a lock on the directory as long as it lives, however it ends. Who starts later removes what has no
  owner any more, with the shared memory that is named after it; of this user's only.
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
_OWNED = re.compile(PREFIX + "([a-z0-9_]{8})")  # as mkdtemp names them
_LOCK = "owner.lock"
_USUAL = ("/tmp", "/var/tmp")
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")


class Workplace:
    """`path` is the directory; the names of its shared memory begin with `shared_memory`."""

    def __init__(self) -> None:
        """Raises InsufficientResources where no temporary directory can be used."""
        base = _base()
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self.shared_memory = _shared_memory_of(self.path)
        # Locked before it has its name: a lock that can be taken has no owner.
        aside = self.path / f".{_LOCK}"
        self._lock = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.replace(aside, self.path / _LOCK)

    def link(self, name: str, target: Path) -> Path:
        """The path, of plain characters, at which `target` is found."""
        path = self.path / name
        path.symlink_to(target.absolute())
        return path

    def remove(self) -> None:
        """With its shared memory; no process may be left that uses them."""
        _remove(self.path)
        os.close(self._lock)


def _base() -> Path:
    """The temporary directory or, where programs may not run in it or its path is not plain, a usual one."""
    preferred = tempfile.gettempdir()
    for candidate in map(Path, (preferred, *_USUAL)):
        with contextlib.suppress(OSError):
            runs = not os.statvfs(candidate).f_flag & os.ST_NOEXEC
            if _PLAIN.fullmatch(str(candidate)) and runs and os.access(candidate, os.R_OK | os.W_OK | os.X_OK):
                return candidate
    raise InsufficientResources(
        "our own Triton needs a temporary directory in which programs may run, with a path of letters, digits and "
        f"`/._+@-` alone; {preferred!r} is not one, nor is {' or '.join(_USUAL)}: set TMPDIR"
    )


def _sweep(base: Path) -> None:
    """Remove what killed owners left. What cannot be removed stays: it keeps nobody from starting."""
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
