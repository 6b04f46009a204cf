"""Tensors and storages as they stand in the pickles of torch: inert values, and the stand-ins that make them.

Rules of this file:
- A tensor is a view, and nothing is copied before `array` is called. A tensor never has more elements than its storage,
  and a storage must have exactly the bytes that the file has for it.

Source: PyTorch's documentation of its serialization format, and what `torch.save` of 1.6 to 2.x writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labelmint.untrusted.content import Malformed, escaped
from labelmint.untrusted.pickle_machine import Inert, StandIn

# rosinality's convolution weights have five.
MAX_DIMENSIONS = 8

# The NumPy type of each storage type; bfloat16 is read as raw bits.
STORAGE_TYPES = {
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
        return self.size * np.dtype(STORAGE_TYPES[self.kind]).itemsize

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
        flat = np.frombuffer(self.storage.data, STORAGE_TYPES[self.storage.kind])[self.offset :]
        strides = [stride * flat.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        if self.storage.kind == "BFloat16Storage":
            # Arithmetic on an array without dimensions returns a number; `asarray` makes it an array again.
            return np.asarray(np.left_shift(view, 16, dtype=np.uint32)).view(np.float32)
        return np.asarray(view != 0) if self.storage.kind == "BoolStorage" else view


def storages_by(found: Callable[[str, Storage], Storage]) -> Callable[[object], object]:
    """A persistent id is ("storage", type, key, location, size); the legacy format adds None if it is not a view."""

    def persistent(identity: object) -> Storage:
        match identity:
            case ("storage", StandIn(name=kind, make=None), str(key), str(), int(size), *view) if (
                kind in STORAGE_TYPES and not any(view) and size >= 0
            ):
                storage = found(key, Storage(kind, size))
            case _:
                raise Malformed("has a persistent id that is not a storage of a known type")
        if (storage.kind, storage.size) != (kind, size):
            raise Malformed(f"declares the storage {escaped(key)} twice, differently")
        return storage

    return persistent


def rebuild_tensor(arguments: tuple[object, ...]) -> Tensor:
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


def _are_sizes(values: tuple[object, ...]) -> bool:
    return len(values) <= MAX_DIMENSIONS and all(type(value) is int and 0 <= value < 2**40 for value in values)


REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGES = {f"torch.{kind}": StandIn(kind) for kind in STORAGE_TYPES}
