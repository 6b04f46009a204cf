"""Reads files of `torch.save`, in both of its formats, into inert tensors without torch.

Rules of this file:
- A tensor is a view, and nothing is copied before `array` is called. A tensor never has more elements than its storage,
  and a storage must have exactly the bytes that the file has for it.
- The zip format is read from its directory. Entries are uncompressed, have unique names, and together are no larger
  than the file. The standard library's reader is not used for two reasons: it makes some 500 bytes of objects from each
  46 bytes of a hostile directory, and a damaged field can raise any kind of exception.
- The legacy format is four pickles (magic number, protocol, system, the value), a list of storage keys, and the raw
  storages in the order of that list.
- Big-endian files are refused with an error that says so. bfloat16 becomes float32, which represents it exactly.

Source: PyTorch's documentation of its serialization format, and what `torch.save` of 1.6 to 2.x writes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.checkpoints.known_globals import NVLABS, PLAIN, Arguments
from labelmint.checkpoints.pickle_reader import Budget, Inert, Malformed, PickleReader, StandIn, shown

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_NUMBER = 0x1950A86A20F9469CFC6C
# The pickled magic number. It follows the opcode for the protocol and, from protocol 4 on, the one for the frame.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_STARTS = (2, 11)
_LEGACY_PROTOCOL = 1001
# A training state of these networks has about a thousand storages, each with 100 bytes in the directory.
MAX_DIRECTORY_BYTES = 4 << 20
# rosinality's convolution weights have five.
MAX_DIMENSIONS = 8

# The NumPy type of each storage type; bfloat16 is read as raw bits.
_STORAGE_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "<u1",
}


class Storage(Inert):
    """`size` elements of the type `kind` ("FloatStorage", ...). `data` is a view into the file, None until found."""

    def __init__(self, kind: str, size: int, data: memoryview | None = None) -> None:
        self.kind = kind
        self.size = size
        self.data = data

    @property
    def size_bytes(self) -> int:
        return self.size * np.dtype(_STORAGE_TYPES[self.kind]).itemsize

    def fill(self, data: memoryview) -> None:
        if len(data) != self.size_bytes:
            raise Malformed(f"has a storage of {len(data)} bytes where {self.size_bytes} are declared")
        self.data = data


@dataclass(frozen=True, eq=False)
class Tensor(Inert):
    """A strided view into a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return self.storage.kind in ("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage")

    def array(self) -> npt.NDArray[np.generic]:
        """Return the numbers: a read-only view, but a copy for bfloat16 (as float32) and bool."""
        assert self.storage.data is not None
        flat = np.frombuffer(self.storage.data, _STORAGE_TYPES[self.storage.kind])[self.offset :]
        strides = [stride * flat.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        if self.storage.kind == "BFloat16Storage":
            # Arithmetic on an array without dimensions returns a number; `asarray` makes it an array again.
            return np.asarray(np.left_shift(view, 16, dtype=np.uint32)).view(np.float32)
        return np.asarray(view != 0) if self.storage.kind == "BoolStorage" else view


def is_legacy(data: memoryview) -> bool:
    return any(data[start : start + len(_LEGACY_MAGIC)] == _LEGACY_MAGIC for start in _LEGACY_STARTS)


def read_zip(data: memoryview, budget: Budget) -> object:
    """Return the value of the zip-format file in `data`."""
    directory = _Directory(data)
    root = directory.root()
    if root + "byteorder" in directory.entries and bytes(directory.read(root + "byteorder")) != b"little":
        raise Malformed("was written on a big-endian machine; save it again on a little-endian one")
    storages: dict[str, Storage] = {}

    def persistent(key: str, storage: Storage) -> Storage:
        if key not in storages:
            storage.fill(directory.read(f"{root}data/{key}"))
            storages[key] = storage
        return storages[key]

    pickle = directory.read(root + "data.pkl")
    reader = PickleReader(pickle, TORCH, budget, _storages_by(persistent))
    value = reader.read()
    if reader.position != len(pickle):
        raise Malformed("has bytes after its pickle")
    return value


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

    reader = PickleReader(data, TORCH, budget, _storages_by(persistent), reader.position)
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


def _storages_by(found: Callable[[str, Storage], Storage]) -> Callable[[object], object]:
    """A persistent id is ("storage", type, key, location, size); the legacy format adds None if it is not a view."""

    def persistent(identity: object) -> Storage:
        match identity:
            case ("storage", StandIn(name=kind, make=None), str(key), str(), int(size), *view) if (
                kind in _STORAGE_TYPES and not any(view) and size >= 0
            ):
                storage = found(key, Storage(kind, size))
            case _:
                raise Malformed("has a persistent id that is not a storage of a known type")
        if (storage.kind, storage.size) != (kind, size):
            raise Malformed(f"declares the storage {shown(key)} twice, differently")
        return storage

    return persistent


def _tensor(arguments: Arguments) -> Tensor:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)`."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *metadata):
            pass
        case _:
            raise Malformed("has a tensor with unknown arguments")
    if any(metadata) or not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise Malformed("has a tensor whose shape is not a list of sizes, or with metadata")
    count = math.prod(shape)
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if count else offset
    if offset < 0 or count > storage.size or (count and last >= storage.size):
        raise Malformed(f"has a tensor of {count} elements at {offset} in a storage of {storage.size}")
    return Tensor(storage, offset, shape, strides)


def _are_sizes(values: Arguments) -> bool:
    return len(values) <= MAX_DIMENSIONS and all(type(value) is int and 0 <= value < 2**40 for value in values)


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
        "torch._utils._rebuild_tensor_v2": StandIn("torch._utils._rebuild_tensor_v2", _tensor),
        "torch._utils._rebuild_parameter": StandIn("torch._utils._rebuild_parameter", _parameter),
        "torch.Size": StandIn("torch.Size", _size),
        **{f"torch.{kind}": StandIn(kind) for kind in _STORAGE_TYPES},
    }
)


@dataclass(frozen=True)
class _Entry:
    header: int  # position of the local header
    size: int
    checksum: int


class _Directory:
    """The entries of a zip file, by name."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        count, size, offset = self._end()
        if size > MAX_DIRECTORY_BYTES:
            raise Malformed(f"has a zip directory of {size} bytes; torch files have at most {MAX_DIRECTORY_BYTES}")
        if offset + size > len(data):
            raise Malformed("is cut off: its zip directory does not lie within it")
        self.entries = self._entries(data[offset : offset + size], count)
        if sum(entry.size for entry in self.entries.values()) > len(data):
            raise Malformed("has zip entries that overlap")

    def root(self) -> str:
        """The top folder of the archive, with a trailing slash."""
        roots = [name.removesuffix("data.pkl") for name in self.entries if name.count("/") == 1]
        roots = [root for root in roots if root + "data.pkl" in self.entries]
        if len(set(roots)) != 1:
            raise Malformed("is a zip file, but not one of torch.save: it has no data.pkl")
        return roots[0]

    def read(self, name: str) -> memoryview:
        """Return an entry's bytes after checking its checksum."""
        if name not in self.entries:
            raise Malformed(f"lacks the zip entry {shown(name)}")
        entry = self.entries[name]
        header = self._unpack("<4s22x2H", entry.header)
        if header[0] != ZIP_MAGIC:
            raise Malformed(f"has a damaged zip entry {shown(name)}")
        start = entry.header + 30 + header[1] + header[2]
        content = self._data[start : start + entry.size]
        if len(content) != entry.size or zlib.crc32(content) != entry.checksum:
            raise Malformed(f"has a damaged zip entry {shown(name)}: its checksum does not match")
        return content

    def _unpack(self, format_: str, position: int) -> tuple[Any, ...]:
        size = struct.calcsize(format_)
        if position < 0 or position + size > len(self._data):
            raise Malformed("is cut off within its zip structure")
        return struct.unpack_from(format_, self._data, position)

    def _end(self) -> tuple[int, int, int]:
        """Return the number of entries, size and offset of the directory. torch writes no comment after it."""
        end = len(self._data) - 22
        signature, count, size, offset, comment = self._unpack("<4s6xH2LH", end)
        if signature != b"PK\x05\x06" or comment:
            raise Malformed("is cut off: it begins as a zip file but does not end with a zip directory")
        if count == 0xFFFF or size == 0xFFFFFFFF or offset == 0xFFFFFFFF:
            signature, locator = self._unpack("<4s4xQ4x", end - 20)
            long_signature, count, size, offset = self._unpack("<4s28x3Q", locator)
            if signature != b"PK\x06\x07" or long_signature != b"PK\x06\x06":
                raise Malformed("has a damaged zip64 directory")
        return count, size, offset

    def _entries(self, directory: memoryview, count: int) -> dict[str, _Entry]:
        found: dict[str, _Entry] = {}
        position = 0
        while position < len(directory):
            if len(directory) - position < 46:
                raise Malformed("has a damaged zip directory")
            fields = struct.unpack_from("<4s4x2H4x3L3H8xL", directory, position)
            signature, flags, method, checksum, packed, size, name_size, extra_size, comment_size, header = fields
            position += 46
            if signature != b"PK\x01\x02":
                raise Malformed("has a damaged zip directory")
            name = self._name(directory[position : position + name_size])
            position += name_size
            extra = directory[position : position + extra_size]
            position += extra_size + comment_size
            size, packed, header = _long_fields(extra, [size, packed, header])
            if method != 0 or flags & 1 or size != packed:
                raise Malformed(f"has the zip entry {shown(name)} compressed or encrypted; torch.save does neither")
            if name in found:
                raise Malformed(f"has the zip entry {shown(name)} twice")
            found[name] = _Entry(header, size, checksum)
        if position != len(directory) or len(found) != count:
            raise Malformed("has a damaged zip directory")
        return found

    def _name(self, raw: memoryview) -> str:
        try:
            name = bytes(raw).decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed("has a zip entry whose name is not UTF-8") from None
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise Malformed(f"has a zip entry with the path {shown(name)}")
        return name


def _long_fields(extra: memoryview, fields: list[int]) -> list[int]:
    """Replace the fields that do not fit in 32 bits by those of the zip64 extra field, in this order."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        content = extra[position + 4 : position + 4 + size]
        if kind == 1:
            long = iter(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8]))
            return [next(long, field) if field == 0xFFFFFFFF else field for field in fields]
        position += 4 + size
    return fields
