"""The Style Interpreter's kernel in C: it is shipped compiled for x86-64 processors and called through ctypes.

Rules of this file:
- It needs only numpy, because the serving environment has neither torch nor onnx.
- `make kernel` compiles the shipped libraries, and a test compiles them again and compares the bytes. Their results are
  the same on every processor.
- For any other processor, the machine's own C compiler compiles the kernel on first use. Such a kernel runs on this
  machine only, so the cache key covers the source, the flags and the processor. A cache directory that other users can
  write to is not used. Without a cache, each process compiles its own kernel.
- The kernel itself checks nothing. This file checks every size: the weights once, the features at every call.
- Triton's `labelmint` backend loads a copy of this directory, so this file imports nothing from this package.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).parent / "interpreter.c"
# The shipped libraries, the best first, with the flags of /proc/cpuinfo that a processor needs for each. The names are
# those of the levels of the x86-64 psABI; Linux calls lzcnt `abm`.
_X86_64_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
SHIPPED = {
    "x86-64-v4": (*_X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": _X86_64_V3,
}
# Every compiler rounds `a * b + c` once if the processor has fused multiply-add.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
TASKS = ("segmentation", "keypoints")
SCORE_KINDS = ("sum", "top10_mean", "mixture_entropy", "mean_entropy")
MAX_LEVELS = 12  # as in interpreter.c: resolutions 4 to 8192

Array = npt.NDArray[Any]
_Floats = ctypes.POINTER(ctypes.c_float)
# The fields of /proc/cpuinfo that identify a processor's instruction set.
_PROCESSOR = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


class KernelUnavailable(OSError):
    """This machine has no kernel; the message says what to do."""


class UnusableWeights(ValueError):
    """The file has no weights that the kernel can run; the message says why, without the file's name."""


class Interpreter:
    """A Style Interpreter that labels one sample at a time.

    `channels` maps each level to the number of channels that it reads there. `outputs` names the arrays that `run`
    returns.
    """

    def __init__(self, weights: Any, threads: int = 0, library: ctypes.CDLL | None = None) -> None:
        """Load weights (see `check_weights`): arrays by name, or the path or binary stream of an .npz.

        With `threads` 0, the kernel uses one thread for each core that the process may use.

        Raises UnusableWeights, KernelUnavailable, or MemoryError.
        """
        arrays: Mapping[str, Array] = weights if isinstance(weights, Mapping) else read_weights(weights)
        self.channels = check_weights(arrays)
        self.task, self.score_kind = str(arrays["task"]), str(arrays["score_kind"])
        self.outputs: tuple[str, ...] = ("label", "js_map", "js_score")
        if self.task == "keypoints":
            self.outputs = ("keypoints", "confidence", "js_map", "js_score")
        (self._heads, self._hidden2, self._hidden1), self._classes = arrays["weight2"].shape, arrays["bias3"].shape[1]
        self.resolution = max(self.channels)
        self._library = library or library_here()
        self._pointer = self._library.interpreter_new(
            int(self.task == "keypoints"),
            len(self.channels),
            (ctypes.c_int * len(self.channels))(*self.channels.values()),
            *(self._heads, self._hidden1, self._hidden2, self._classes),
            _pointers([arrays[f"projection_{r}"] for r in self.channels]),
            *(arrays[name].ctypes.data_as(_Floats) for name in ("bias1", "weight2", "bias2", "weight3", "bias3")),
            threads if threads > 0 else len(os.sched_getaffinity(0)),
        )
        if not self._pointer:
            raise MemoryError("the kernel could not allocate its memory")

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self._library.interpreter_free(self._pointer)

    @property
    def bytes(self) -> int:
        """The memory in use: the weights and the working memory of a call."""
        return int(self._library.interpreter_bytes(self._pointer))

    def run(self, features: Sequence[Array]) -> dict[str, Array]:
        """Label one sample: the features float32 [C_r,r,r] of each level, in order, to {name: array}.

        The arrays are label uint8 [R,R], or keypoints float32 [K,2] and confidence [K]; js_map float32 [R,R]; and
        js_score [1]. Two threads must not call it at the same time. Raises ValueError for features of other shapes.
        """
        shapes = [(c, r, r) for r, c in self.channels.items()]
        if [array.shape for array in features] != shapes or any(array.dtype != np.float32 for array in features):
            raise ValueError(f"expected float32 features of the shapes {shapes}")
        contiguous = [np.ascontiguousarray(array) for array in features]
        js_map, mean_entropy = np.empty((2, self.resolution, self.resolution), np.float32)
        label = np.empty((self.resolution, self.resolution), np.uint8)
        keypoints, confidence = np.empty((self._classes, 2), np.float32), np.empty(self._classes, np.float32)
        self._library.interpreter_run(
            self._pointer,
            _pointers(contiguous),
            label.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)),
            *(array.ctypes.data_as(_Floats) for array in (keypoints, confidence, js_map, mean_entropy)),
        )
        outputs: dict[str, Array] = {"label": label, "keypoints": keypoints, "confidence": confidence, "js_map": js_map}
        outputs["js_score"] = _score(js_map, mean_entropy, self.score_kind)
        return {name: outputs[name] for name in self.outputs}


def _pointers(arrays: Sequence[Array]) -> Any:
    return (_Floats * len(arrays))(*(array.ctypes.data_as(_Floats) for array in arrays))


def _score(js_map: Array, mean_entropy: Array, kind: str) -> Array:
    """The image score, [R,R] to [1], summed in float64.

    The top tenth is summed in ascending order, so that the order is the same on every machine.
    """
    scored = js_map
    if kind == "mixture_entropy":
        scored = mean_entropy + js_map  # as in torch: JS divergence and mean entropy add up to it
    elif kind == "mean_entropy":
        scored = mean_entropy
    pixels = scored.ravel()
    if kind != "top10_mean":
        return np.array([pixels.sum(dtype=np.float64)], np.float32)
    count = pixels.size // 10
    return np.array([np.sort(np.partition(pixels, -count)[-count:]).mean(dtype=np.float64)], np.float32)


def read_weights(file: Any) -> dict[str, Array]:
    """Return the arrays of an .npz. Raises UnusableWeights."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, MemoryError) as error:
        raise UnusableWeights(f"cannot be read as .npz: {error}") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise UnusableWeights(f"cannot be read as .npz: {error}") from error


def read_slices(file: Path, described: Mapping[str, Any]) -> tuple[dict[str, Array], str]:
    """Return the weights that lie as slices in another file, and the SHA-256 of the slices. Raises UnusableWeights.

    `described` has `task`, `score_kind`, `classes` and `slices`: for each array its `offset` in bytes and its `shape`.
    weight3 [N,K',h2] and bias3 [N,K'] may have more rows than the K classes, which are left out.
    """
    arrays: dict[str, Array] = {"task": np.array(described["task"]), "score_kind": np.array(described["score_kind"])}
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            for name, each in described["slices"].items():
                stream.seek(each["offset"])
                array = np.fromfile(stream, "<f4", math.prod(each["shape"])).reshape(each["shape"])
                digest.update(array.data)
                arrays[name] = array[:, : described["classes"]].copy() if name in ("weight3", "bias3") else array
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"cannot be read: {error}") from error
    return arrays, digest.hexdigest()


def check_weights(arrays: Mapping[str, Array]) -> dict[int, int]:
    """Return the channels of each level, {r: C_r}. Raises UnusableWeights if the kernel cannot run these weights.

    The arrays are float32 projection_4, projection_8, ..., projection_R [N*h1,C_r], bias1 [N,h1], weight2 [N,h2,h1],
    bias2 [N,h2], weight3 [N,K,h2], bias3 [N,K]; and the names `task` and `score_kind`.
    """
    levels = [4 << i for i in range(sum(name.startswith("projection_") for name in arrays))]
    if not 2 <= len(levels) <= MAX_LEVELS:
        raise UnusableWeights(f"has {len(levels)} levels of features; the kernel reads 2 to {MAX_LEVELS}")
    shapes: dict[str, tuple[int | str, ...]] = {f"projection_{r}": ("N*h1", f"C_{r}") for r in levels}
    shapes |= {"bias1": ("N", "h1"), "weight2": ("N", "h2", "h1"), "bias2": ("N", "h2")}
    shapes |= {"weight3": ("N", "K", "h2"), "bias3": ("N", "K")}
    if set(arrays) != {*shapes, "task", "score_kind"}:
        raise UnusableWeights(f"has the arrays {sorted(arrays)}, not those of an interpreter with levels {levels}")
    for name, known in (("task", TASKS), ("score_kind", SCORE_KINDS)):
        if arrays[name].shape != () or str(arrays[name]) not in known:
            raise UnusableWeights(f"names the {name} {str(arrays[name])[:40]!r}; known: {', '.join(known)}")
    sizes: dict[int | str, int] = {}
    for name in ("weight2", "bias3", "bias1", "bias2", "weight3", *shapes):
        array, wanted = arrays[name], shapes[name]
        if array.dtype != np.float32 or array.ndim != len(wanted):
            raise UnusableWeights(
                f"has {name} as {array.dtype} {list(array.shape)}, not float32 [{', '.join(map(str, wanted))}]"
            )
        for axis, size in zip(wanted, array.shape, strict=True):
            if not 1 <= size < 1 << 20 or sizes.setdefault(axis, size) != size:
                raise UnusableWeights(f"has {name} {list(array.shape)}, which does not fit the other arrays")
        sizes["N*h1"] = sizes.get("N", 0) * sizes.get("h1", 0)
    if str(arrays["task"]) == "segmentation" and not 2 <= sizes["K"] <= 255:
        raise UnusableWeights(f"has {sizes['K']} classes; a label is one of 2 to 255")
    return {r: sizes[f"C_{r}"] for r in levels}


@functools.cache
def library_here() -> ctypes.CDLL:
    """Return the best kernel for this machine: a shipped one, or else a compiled one. Raises KernelUnavailable."""
    level = next(iter(levels_here()), None)
    return compiled() if level is None else shipped(level)


def levels_here() -> tuple[str, ...]:
    """The names of the shipped libraries that this processor can run, the best first."""
    if platform.machine() != "x86_64":
        return ()
    line = next((line for line in _processor() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return tuple(level for level, needed in SHIPPED.items() if flags.issuperset(needed))


@functools.cache
def shipped(level: str) -> ctypes.CDLL:
    """Return the shipped kernel of a level in `SHIPPED`. Raises KernelUnavailable."""
    return _load(shipped_file(level))


def shipped_file(level: str) -> Path:
    return SOURCE.with_name(f"interpreter.{level}.so")


@functools.cache
def compiled(*defines: str) -> ctypes.CDLL:
    """Return the kernel for this machine, from the cache or the compiler ($CC or cc). Raises KernelUnavailable.

    `defines` are additional flags; tests use them to compile for narrower or wider vectors.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, *FLAGS, *defines]
    key = hashlib.sha256()
    for part in (SOURCE.read_text(), shlex.join(command), platform.machine(), *_processor()):
        key.update(f"{part}\0".encode())
    cache = _cache()
    with tempfile.TemporaryDirectory(prefix="labelmint-kernel-", dir=cache) as directory:
        made = Path(directory) / "interpreter.so"
        kept = cache / f"{key.hexdigest()[:32]}.so" if cache is not None else made
        if not kept.exists():
            _compile(command, made)
            os.replace(made, kept)
        return _load(kept)  # a loaded library stays when its file is removed


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(f"the compiled kernel cannot be loaded: {error}") from error
    integer, pointer, arrays = ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Floats)
    library.interpreter_new.argtypes = [integer, integer, ctypes.POINTER(integer), *[integer] * 4, arrays]
    library.interpreter_new.argtypes += [*[_Floats] * 5, integer]
    library.interpreter_new.restype = pointer
    library.interpreter_run.argtypes = [pointer, arrays, ctypes.POINTER(ctypes.c_uint8), *[_Floats] * 4]
    library.interpreter_run.restype = None
    library.interpreter_free.argtypes, library.interpreter_free.restype = [pointer], None
    library.interpreter_bytes.argtypes, library.interpreter_bytes.restype = [pointer], ctypes.c_size_t
    return library


def _compile(command: Sequence[str], out: Path) -> None:
    if shutil.which(command[0]) is None:
        raise KernelUnavailable(
            f"no compiled kernel is shipped for this processor, and there is no C compiler {command[0]!r} that could "
            "compile one: run `apt install gcc libc6-dev`"
        )
    done = subprocess.run([*command, str(SOURCE), "-o", str(out)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in said if "error" in line), said[0])
        raise KernelUnavailable(f"{command[0]!r} cannot compile the kernel: {first}")


def _processor() -> list[str]:
    """The properties of the first processor that decide what the compiler's `native` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return []
    return [line for line in lines if line.partition(":")[0].strip() in _PROCESSOR]


def _cache() -> Path | None:
    """Return a cache directory that only this user can write to, or None if there is none."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    directory = Path(home) / "labelmint"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return None
    ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return directory if ours and os.access(directory, os.W_OK) else None
