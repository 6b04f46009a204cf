"""Opens a checkpoint of another project and returns its content as inert values, with the digest of its bytes.

Rules of this file:
- Magic bytes identify the container format. The code does not try one reader after another.
- The file is memory-mapped, not loaded, so tensors that are never read cost no memory.
- Any problem with the bytes raises one UnusableFile that names the file.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path

from labelmint.checkpoints.torch_file import TORCH, is_legacy, nested_storage, read_legacy, read_zip
from labelmint.core.errors import UnusableFile
from labelmint.untrusted.content import Malformed
from labelmint.untrusted.pickle_machine import Budget, PickleReader, check_tree
from labelmint.untrusted.zip_directory import MAGIC

# A training state at 1024x1024 with both optimizers is about 1 GB.
MAX_FILE_BYTES = 8 << 30
_UNPACK = "unpack it first, then import what comes out"
_DOWNLOAD = "not the checkpoint; download the file itself"
# Files that users often have instead of a checkpoint: position, magic bytes, message.
_OTHER_KINDS = (
    (0, b"\x1f\x8b", f"is compressed with gzip; {_UNPACK}"),
    (0, b"BZh", f"is compressed with bzip2; {_UNPACK}"),
    (0, b"\xfd7zXZ\0", f"is compressed with xz; {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"is compressed with zstd; {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"is a 7z archive; {_UNPACK}"),
    (0, b"Rar!", f"is a RAR archive; {_UNPACK}"),
    (257, b"ustar", f"is a tar archive; {_UNPACK}"),
    (0, b"<!DOCTYPE", f"is a web page, {_DOWNLOAD}"),
    (0, b"<!doctype", f"is a web page, {_DOWNLOAD}"),
    (0, b"<html", f"is a web page, {_DOWNLOAD}"),
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the checkpoint; run `git lfs pull` in its repository"),
    (8, b"{", "is a safetensors file; `import` reads pickles and files of torch.save (labelmint's own need no import)"),
    (0, b"\x89HDF", "is an HDF5 file (Keras); `import` reads pickles and files of torch.save"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content: `value` consists of text, numbers, containers and the inert values of this package."""

    path: Path
    sha256: str
    value: object


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a pickle or a file of `torch.save` without running any code in it. Raises UnusableFile."""
    if not path.is_file():
        raise UnusableFile(path, "is not a file" if path.exists() else "does not exist")
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise UnusableFile(path, f"has {size} bytes; checkpoints have between 1 and {MAX_FILE_BYTES}")
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        value = _read(data)
        check_tree(value)
    except Malformed as problem:
        raise UnusableFile(path, str(problem)) from None
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), value)


def _read(data: memoryview) -> object:
    budget = Budget(nested_bytes=len(data))
    start = bytes(data[:4])
    if start.startswith(MAGIC):
        return read_zip(data, budget)
    if is_legacy(data):
        return read_legacy(data, budget)
    if start[:1] != b"\x80":
        kinds = (said for at, magic, said in _OTHER_KINDS if data[at : at + len(magic)] == magic)
        raise Malformed(next(kinds, "is neither a pickle nor a file of torch.save"))
    stand_ins = TORCH | {"torch.storage._load_from_bytes": nested_storage(budget)}
    reader = PickleReader(data, stand_ins, budget)
    value = reader.read()
    if reader.position != len(data):
        raise Malformed("has bytes after its pickle")
    return value
