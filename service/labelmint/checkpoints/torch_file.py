"""Reads files of `torch.save`, in both of its formats, into inert tensors without torch.

Rules of this file:
- The zip format is read by `untrusted/zip_directory.py`; each entry is compared with its checksum.
- The legacy format is four pickles (magic number, protocol, system, the value), a list of storage keys, and the raw
  storages in the order of that list.
- Big-endian files are refused with an error that says so. bfloat16 becomes float32, which represents it exactly.

Source: PyTorch's documentation of its serialization format, and what `torch.save` of 1.6 to 2.x writes.
"""

from __future__ import annotations

import zlib

from labelmint.checkpoints.known_globals import NVLABS, PLAIN, Arguments
from labelmint.untrusted.content import Malformed, Memory, escaped
from labelmint.untrusted.pickle_machine import Budget, PickleReader, StandIn
from labelmint.untrusted.torch_tensors import REBUILD_TENSOR, STORAGES, Storage, Tensor, rebuild_tensor, storages_by
from labelmint.untrusted.zip_directory import ZipDirectory, read_directory

_LEGACY_NUMBER = 0x1950A86A20F9469CFC6C
# The pickled magic number. It follows the opcode for the protocol and, from protocol 4 on, the one for the frame.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_STARTS = (2, 11)
_LEGACY_PROTOCOL = 1001
# A training state of these networks has about a thousand storages, each with 100 bytes in the directory.
MAX_DIRECTORY_BYTES = 4 << 20


def is_legacy(data: memoryview) -> bool:
    return any(data[start : start + len(_LEGACY_MAGIC)] == _LEGACY_MAGIC for start in _LEGACY_STARTS)


def read_zip(data: memoryview, budget: Budget) -> object:
    """Return the value of the zip-format file in `data`."""
    directory = read_directory(Memory(data), MAX_DIRECTORY_BYTES)
    root = _root(directory)
    if root + "byteorder" in directory.entries and bytes(_read(directory, root + "byteorder")) != b"little":
        raise Malformed("was written on a big-endian machine; save it again on a little-endian one")
    storages: dict[str, Storage] = {}

    def persistent(key: str, storage: Storage) -> Storage:
        if key not in storages:
            storage.fill(_read(directory, f"{root}data/{key}"))
            storages[key] = storage
        return storages[key]

    pickle = _read(directory, root + "data.pkl")
    reader = PickleReader(pickle, TORCH, budget, persistent=storages_by(persistent))
    value = reader.read()
    if reader.position != len(pickle):
        raise Malformed("has bytes after its pickle")
    return value


def _root(directory: ZipDirectory) -> str:
    """The top folder of the archive, with a trailing slash."""
    roots = [name.removesuffix("data.pkl") for name in directory.entries if name.count("/") == 1]
    roots = [root for root in roots if root + "data.pkl" in directory.entries]
    if len(set(roots)) != 1:
        raise Malformed("is a zip file, but not one of torch.save: it has no data.pkl")
    return roots[0]


def _read(directory: ZipDirectory, name: str) -> memoryview:
    """An entry's bytes, after their checksum was checked."""
    if name not in directory.entries:
        raise Malformed(f"lacks the zip entry {escaped(name)}")
    entry = directory.entries[name]
    content = memoryview(directory.source.read(*directory.content(entry)))
    if zlib.crc32(content) != entry.checksum:
        raise Malformed(f"has a damaged zip entry {escaped(name)}: its checksum does not match")
    return content


def read_legacy(data: memoryview, budget: Budget) -> object:
    """Return the value of the legacy-format file in `data`."""
    reader = PickleReader(data, TORCH, budget)
    if reader.read() != _LEGACY_NUMBER:
        raise Malformed("does not begin with torch's magic number")
    protocol, system = reader.read(), reader.read()
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise Malformed("is not a torch file of protocol 1001")
    if system.get("little_endian") is not True:
        raise Malformed("was written on a big-endian machine; save it again on a little-endian one")
    storages: dict[str, Storage] = {}

    def persistent(key: str, storage: Storage) -> Storage:
        return storages.setdefault(key, storage)

    reader = PickleReader(data, TORCH, budget, persistent=storages_by(persistent), position=reader.position)
    value = reader.read()
    keys = reader.read()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise Malformed("lists other storages than its tensors need")
    for key in keys:
        size = reader.unsigned(8)
        if size != storages[key].size:
            raise Malformed(f"has a storage of {size} elements where {storages[key].size} are declared")
        storages[key].fill(reader.take(storages[key].size_bytes))
    if reader.position != len(data):
        raise Malformed("has bytes after its storages")
    return value


def nested_storage(budget: Budget) -> StandIn:
    """Stand-in for `torch.storage._load_from_bytes`: a plain pickle contains a tensor's storage as a legacy file."""

    def load(arguments: Arguments) -> Storage:
        blob = arguments[0] if len(arguments) == 1 else None
        if not isinstance(blob, (bytes, memoryview)):
            raise Malformed("has a nested tensor that is not bytes")
        budget.spend_nested(len(blob))
        value = read_legacy(memoryview(blob), budget)
        if not isinstance(value, Storage):
            raise Malformed("has a nested tensor that is not a storage")
        return value

    return StandIn("torch.storage._load_from_bytes", load)


def _parameter(arguments: Arguments) -> Tensor:
    if len(arguments) != 3 or not isinstance(arguments[0], Tensor):
        raise Malformed("has a parameter that is not a tensor")
    return arguments[0]


def _size(arguments: Arguments) -> Arguments:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple):
        raise Malformed("has a torch.Size that is not a tuple")
    return arguments[0]


# Includes NVLABS, because NVlabs' networks are also saved with `torch.save`.
TORCH = (
    PLAIN
    | NVLABS
    | {
        REBUILD_TENSOR: StandIn(REBUILD_TENSOR, rebuild_tensor),
        "torch._utils._rebuild_parameter": StandIn("torch._utils._rebuild_parameter", _parameter),
        "torch.Size": StandIn("torch.Size", _size),
        **STORAGES,
    }
)
