"""Maps the global names in foreign pickles to stand-ins, which make inert values instead of running code.

Rules of this file:
- A stand-in checks its arguments and keeps them. It never imports, calls or compares objects from the file.
- NVlabs files contain the source text of their networks. It is dropped unread.
- `torch_file.py` adds the names that need storages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from labelmint.untrusted.content import Malformed, escaped
from labelmint.untrusted.pickle_machine import Inert, StandIn, nothing_to_dict

Arguments = tuple[object, ...]

# Each call copies its argument, and a file can repeat a call on one argument as often as it has opcodes. So arguments
# are limited. Real files only make sets of a module's few buffer names, and the bytes of single numbers.
MAX_SET = 16
MAX_ENCODED = 1024

# legacy.py of stylegan2-ada-pytorch refuses lower versions of networks. StyleGAN1 networks have versions 2 and 3.
_FIRST_CONVERTED = 4

_NUMPY_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class PersistentObject(Inert):
    """A module of an NVlabs network: its class name and its attributes, without its code."""

    def __init__(self, class_name: str, state: Mapping[str, object]) -> None:
        self.class_name = class_name
        self.state = state

    def parts(self) -> list[object]:
        return [self.state]


class Namespace(Inert):
    """The command line that a training script saved (`argparse.Namespace`)."""

    def __init__(self) -> None:
        self.options: object = {}

    def parts(self) -> list[object]:
        return [self.options]

    def build(self, state: object) -> None:
        self.options = state


class NumpyDtype(Inert):
    def __init__(self, code: str) -> None:
        self.value = np.dtype(f"<{code}")

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise Malformed("has a NumPy type that is not little-endian")


class NumpyArray(Inert):
    """A NumPy array: `value` is a read-only view into the file, or None until the pickle sets its state."""

    def __init__(self) -> None:
        self.value: npt.NDArray[np.generic] | None = None

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Malformed("has a NumPy array with an unknown state")
        _, shape, dtype, column_major, data = state
        sides = _shape(shape)
        if not isinstance(dtype, NumpyDtype) or not isinstance(data, (bytes, memoryview)):
            raise Malformed("has a NumPy array that does not consist of plain numbers")
        if math.prod(sides) * dtype.value.itemsize != len(data):
            raise Malformed(f"has a NumPy array whose shape does not fit its {len(data)} bytes")
        flat = np.frombuffer(data, dtype.value)
        self.value = flat.reshape(sides, order="F" if column_major is True else "C")


def _shape(value: object) -> tuple[int, ...]:
    if isinstance(value, tuple) and len(value) <= 8 and all(type(side) is int and 0 <= side < 2**40 for side in value):
        return value
    raise Malformed("has a NumPy array whose shape is not a list of sizes")


def _persistent_object(arguments: Arguments) -> PersistentObject:
    meta = arguments[0] if len(arguments) == 1 else None
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise Malformed("has a persistent object that is not a class instance")
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(name, str) or not isinstance(state, dict):
        raise Malformed("has a persistent object without class name or state")
    return PersistentObject(name, state)


def _set(arguments: Arguments) -> set[str]:
    items = arguments[0] if len(arguments) == 1 else None
    if not isinstance(items, list) or len(items) > MAX_SET or not all(isinstance(item, str) for item in items):
        raise Malformed(f"has a set that is not made of at most {MAX_SET} names")
    return set(items)


def _namespace(arguments: Arguments) -> Namespace:
    if arguments:
        raise Malformed("has an argparse.Namespace made from arguments")
    return Namespace()


def _latin1(arguments: Arguments) -> bytes:
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        raise Malformed("has bytes in an encoding that is not latin1")
    if len(arguments[0]) > MAX_ENCODED:
        raise Malformed(f"has more than {MAX_ENCODED} bytes written as text; save it with pickle protocol 3 or later")
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        raise Malformed("has bytes that are not latin1") from None


def _dtype(arguments: Arguments) -> NumpyDtype:
    code = arguments[0] if arguments else None
    if not isinstance(code, str) or code not in _NUMPY_CODES:
        shown_code = escaped(code) if isinstance(code, str) else type(code).__name__
        raise Malformed(f"has the NumPy type {shown_code}, which is not a plain number")
    return NumpyDtype(code)


def _array(arguments: Arguments) -> NumpyArray:
    if not arguments or arguments[0] is not NDARRAY:
        raise Malformed("has a NumPy array of an unknown class")
    return NumpyArray()


def _scalar(arguments: Arguments) -> bool | int | float:
    if len(arguments) != 2 or not isinstance(arguments[0], NumpyDtype):
        raise Malformed("has a NumPy number without a type")
    dtype, data = arguments[0].value, arguments[1]
    if not isinstance(data, (bytes, memoryview)) or len(data) != dtype.itemsize:
        raise Malformed("has a NumPy number of the wrong size")
    value = np.frombuffer(data, dtype)[0].item()
    assert isinstance(value, (bool, int, float))
    return value


class TensorFlowNetwork(Inert):
    """A network of NVlabs' TensorFlow code. It is refused when its state is set, because the state has its version."""

    def build(self, state: object) -> None:
        version = state.get("version") if isinstance(state, dict) else None
        if isinstance(version, int) and version < _FIRST_CONVERTED:
            raise Malformed(
                "is a StyleGAN1 of NVlabs' TensorFlow code, which NVlabs' own converter refuses; convert it to the "
                "PyTorch port that DatasetGAN uses (a state dict of g_mapping.* and g_synthesis.*, as in "
                "karras2019stylegan-*.for_g_all.pt) and import that with its average latent"
            )
        raise Malformed(
            "is a StyleGAN2 of NVlabs' TensorFlow code; convert it with legacy.py of stylegan2-ada-pytorch, "
            "then import that"
        )


def _progan(_: Arguments) -> object:
    raise Malformed("is a ProGAN, which has no styles; only StyleGAN1 and StyleGAN2 networks can be imported")


def _embedding(_: Arguments) -> object:
    raise Malformed(
        "holds an embedding of classes, as StyleGAN-XL networks do; only StyleGAN1 and StyleGAN2 can be imported"
    )


def _frombuffer(arguments: Arguments) -> NumpyArray:
    """NumPy writes an array in protocol 5 as `_frombuffer(bytes, dtype, shape, order)`."""
    if len(arguments) != 4:
        raise Malformed("has a NumPy array with an unknown state")
    data, dtype, shape, order = arguments
    array = NumpyArray()
    array.build((1, shape, dtype, order == "F", data))
    return array


NDARRAY = StandIn("numpy.ndarray")

# Pickles of protocol 2 use the old name of `builtins`, and NumPy 2 uses a new name for `numpy.core`.
PLAIN = {
    "collections.OrderedDict": StandIn("collections.OrderedDict", nothing_to_dict),
    "builtins.set": StandIn("builtins.set", _set),
    "__builtin__.set": StandIn("builtins.set", _set),
    "argparse.Namespace": StandIn("argparse.Namespace", _namespace),
    "_codecs.encode": StandIn("_codecs.encode", _latin1),
    "numpy.ndarray": NDARRAY,
    "numpy.dtype": StandIn("numpy.dtype", _dtype),
    "numpy.core.multiarray._reconstruct": StandIn("numpy array", _array),
    "numpy._core.multiarray._reconstruct": StandIn("numpy array", _array),
    "numpy.core.numeric._frombuffer": StandIn("numpy array", _frombuffer),
    "numpy._core.numeric._frombuffer": StandIn("numpy array", _frombuffer),
    "numpy.core.multiarray.scalar": StandIn("numpy number", _scalar),
    "numpy._core.multiarray.scalar": StandIn("numpy number", _scalar),
}

NVLABS = {
    "torch_utils.persistence._reconstruct_persistent_obj": StandIn("persistent object", _persistent_object),
    "dnnlib.util.EasyDict": StandIn("dnnlib.util.EasyDict", nothing_to_dict),
    "dnnlib.tflib.network.Network": StandIn("dnnlib.tflib.network.Network", lambda _: TensorFlowNetwork()),
    "tfutil.Network": StandIn("tfutil.Network", _progan),
    "torch.nn.modules.sparse.Embedding": StandIn("torch.nn.modules.sparse.Embedding", _embedding),
}
