"""Takes a checkpoint's tensors by name, each with its expected shape, and refuses tensors that are left over.

Rules of this file:
- A missing, unexpected or misshapen tensor is an error that names it. Buffers are checked like weights.
- A tensor that is taken is a finite float32 copy. All of them together have at most as many elements as their storages,
  because a small file could otherwise use one storage for many tensors and fill the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from labelmint.checkpoints.torch_file import Storage, Tensor
from labelmint.core.errors import UnusableFile
from labelmint.models.layout import MAX_RESOLUTION
from labelmint.untrusted.content import escaped

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

# At most so many layers of one kind, because the search for each one goes through all names.
MAX_PARTS = 64
# Prefixes that parallel training and `torch.compile` add to all names, and how many of them may be nested.
_WRAPPERS = ("module.", "_orig_mod.")
_MAX_WRAPPERS = 4


def to_float32(array: npt.NDArray[Any]) -> Floats:
    """`array` as float32 of the same shape. Too large values silently become infinity; callers check for it."""
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float32)


class TensorTaker:
    """Takes tensors from one file and counts their elements."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storages: dict[int, Storage] = {}
        self._elements_left = 0

    def take(self, name: str, value: object, shape: Sequence[int]) -> Floats:
        """Return `value` as float32 of `shape`. Raises UnusableFile that names the tensor."""
        if not isinstance(value, Tensor):
            raise UnusableFile(self.path, f"has {escaped(name)} that is not a tensor")
        if value.shape != tuple(shape):
            raise UnusableFile(self.path, f"has {escaped(name)} of shape {value.shape}, expected {tuple(shape)}")
        if not value.is_floating:
            raise UnusableFile(self.path, f"has {escaped(name)} of whole numbers ({value.storage.kind})")
        if id(value.storage) not in self._storages:
            self._storages[id(value.storage)] = value.storage
            self._elements_left += value.storage.size
        array = value.array()
        self._elements_left -= array.size
        if self._elements_left < 0:
            raise UnusableFile(self.path, f"has {escaped(name)} in memory that another tensor uses too")
        floats = to_float32(array)
        if not np.isfinite(floats).all():
            raise UnusableFile(self.path, f"has NaN or infinity in {escaped(name)}")
        return floats


def holds(state: Mapping[str, object], name: str) -> bool:
    """Whether a state dict has the tensor `name`, with or without wrapper prefixes. Nothing is copied."""
    return _wrapper(state) + name in state


def _wrapper(state: Mapping[str, object]) -> str:
    """The wrapper prefix that all names of a state dict share, or ""."""
    found = ""
    for _ in range(_MAX_WRAPPERS if state else 0):
        longer = (found + wrapper for wrapper in _WRAPPERS)
        found = next((prefix for prefix in longer if all(str(name).startswith(prefix) for name in state)), found)
    return found


class NameTable:
    """The tensors of a flat checkpoint: a dictionary from dotted names to tensors (a `state_dict`)."""

    def __init__(self, path: Path, tensors: object) -> None:
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise UnusableFile(path, "has no dictionary of named tensors where one is expected")
        wrapper = _wrapper(tensors)
        self.path = path
        self._tensors: Mapping[str, object] = {name.removeprefix(wrapper): value for name, value in tensors.items()}
        self._left = set(self._tensors)
        self._taker = TensorTaker(path)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def count(self, pattern: str, first: int) -> int:
        """Count the consecutive numbers from `first` for which a name begins with `pattern`, whose {} is the number.

        A numbered part counts if it has at least one tensor. If another of its tensors is missing, a later `take` names
        that one. Parts beyond MAX_PARTS are not counted, so `finish` reports their tensors as unexpected.
        """
        prefixes = (pattern.format(number) for number in range(first, first + MAX_PARTS))
        return sum(1 for _ in itertools.takewhile(self.has, prefixes))

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._tensors)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor from which the network's dimensions are read."""
        value = self._value(name)
        if not isinstance(value, Tensor) or len(value.shape) != dimensions or 0 in value.shape:
            raise UnusableFile(self.path, f"has {escaped(name)} that is not a tensor of {dimensions} dimensions")
        return value.shape

    def take(self, name: str, shape: Sequence[int]) -> Floats:
        self._left.discard(name)
        return self._taker.take(name, self._value(name), shape)

    def drop(self, name: str) -> None:
        """Ignore a tensor that the import does not use; it may be absent."""
        self._left.discard(name)

    def finish(self) -> None:
        for name in sorted(self._left):
            raise UnusableFile(self.path, f"has an unexpected tensor {escaped(name)}")

    def _value(self, name: str) -> object:
        if name not in self._tensors:
            raise UnusableFile(self.path, f"lacks the tensor {name}")
        return self._tensors[name]


def one_value(path: Path, found: Mapping[T, str], what: str) -> T:
    """Return the value that all layers must share. `found` maps each value to the name of a layer that has it."""
    (first, name), *others = found.items()
    for _, other in others:
        raise UnusableFile(path, f"has a different {what} in {other} than in {name}; they must be equal")
    return first


def check_resolution(path: Path, resolution: int) -> int:
    if not 8 <= resolution <= MAX_RESOLUTION or resolution & (resolution - 1):
        raise UnusableFile(
            path, f"is a network for {resolution} pixels; only powers of two from 8 to {MAX_RESOLUTION} can be imported"
        )
    return resolution
