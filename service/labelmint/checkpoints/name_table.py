"""A checkpoint's tensors by name: each is taken once, with the shape it must have, and none may be left over.

Rules of this file:
- A missing, extra or misshapen tensor is an error that names it; buffers are taken and checked like weights.
- Everything taken is float32, finite and a copy. Tensors may not overlap: what is taken is never more than the file
  holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from labelmint.checkpoints.pickle_reader import shown
from labelmint.checkpoints.torch_file import Storage, Tensor
from labelmint.core.errors import UnusableFile
from labelmint.models.layout import MAX_RESOLUTION

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

# Layers of one kind; each is searched for among all names.
MAX_PARTS = 64
# What parallel training and `torch.compile` put before all names, one before the other at most so many times.
_WRAPPERS = ("module.", "_orig_mod.")
_MAX_WRAPPERS = 4


def to_float32(array: npt.NDArray[Any]) -> Floats:
    """`array` as float32 of its shape. What is too large becomes infinity without a warning; callers look for it."""
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float32)


class TensorTaker:
    """Takes tensors out of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storages: dict[int, Storage] = {}
        self._elements_left = 0

    def take(self, name: str, value: object, shape: Sequence[int]) -> Floats:
        """`value` as float32 of `shape`; raises UnusableFile naming it."""
        if not isinstance(value, Tensor):
            raise UnusableFile(self.path, f"has {shown(name)} that is no tensor")
        if value.shape != tuple(shape):
            raise UnusableFile(self.path, f"has {shown(name)} of shape {value.shape}, expected {tuple(shape)}")
        if not value.is_floating:
            raise UnusableFile(self.path, f"has {shown(name)} of whole numbers ({value.storage.kind})")
        if id(value.storage) not in self._storages:
            self._storages[id(value.storage)] = value.storage
            self._elements_left += value.storage.size
        array = value.array()
        self._elements_left -= array.size
        if self._elements_left < 0:
            raise UnusableFile(self.path, f"has {shown(name)} in memory that another tensor uses too")
        floats = to_float32(array)
        if not np.isfinite(floats).all():
            raise UnusableFile(self.path, f"has NaN or infinity in {shown(name)}")
        return floats


def holds(state: Mapping[str, object], name: str) -> bool:
    """Whether a state dict has the tensor `name`, behind a wrapper or not. Nothing is copied."""
    return _wrapper(state) + name in state


def _wrapper(state: Mapping[str, object]) -> str:
    """What stands before all names of a state dict; "" where nothing does."""
    found = ""
    for _ in range(_MAX_WRAPPERS if state else 0):
        longer = (found + wrapper for wrapper in _WRAPPERS)
        found = next((prefix for prefix in longer if all(_begins(name, prefix) for name in state)), found)
    return found


def _begins(name: object, prefix: str) -> bool:
    return isinstance(name, str) and name.startswith(prefix)


class NameTable:
    """The flat kind of checkpoint: a dictionary from dotted names to tensors (a `state_dict`)."""

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
        """How many numbers from `first` on have a name that begins with `pattern`, which has one {} for the number.

        A numbered part counts when it has any tensor: one that it lacks is missed by its name. More than MAX_PARTS are
        not counted, and left over.
        """
        prefixes = (pattern.format(number) for number in range(first, first + MAX_PARTS))
        return sum(1 for _ in itertools.takewhile(self.has, prefixes))

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._tensors)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that tells the network's dimensions."""
        value = self._value(name)
        if not isinstance(value, Tensor) or len(value.shape) != dimensions or 0 in value.shape:
            raise UnusableFile(self.path, f"has {shown(name)} that is no tensor of {dimensions} dimensions")
        return value.shape

    def take(self, name: str, shape: Sequence[int]) -> Floats:
        self._left.discard(name)
        return self._taker.take(name, self._value(name), shape)

    def drop(self, name: str) -> None:
        """Take a tensor that means nothing to us, if it is there."""
        self._left.discard(name)

    def finish(self) -> None:
        for name in sorted(self._left):
            raise UnusableFile(self.path, f"has an unexpected tensor {shown(name)}")

    def _value(self, name: str) -> object:
        if name not in self._tensors:
            raise UnusableFile(self.path, f"lacks the tensor {name}")
        return self._tensors[name]


def one_value(path: Path, found: Mapping[T, str], what: str) -> T:
    """What all layers share, of the values that were found: each with the name of a layer that has it."""
    (first, name), *others = found.items()
    for _, other in others:
        raise UnusableFile(path, f"has another {what} in {other} than in {name}; they must be equal")
    return first


def check_resolution(path: Path, resolution: int) -> int:
    if not 8 <= resolution <= MAX_RESOLUTION or resolution & (resolution - 1):
        raise UnusableFile(
            path, f"is a network for {resolution} pixels; powers of two from 8 to {MAX_RESOLUTION} can be imported"
        )
    return resolution
