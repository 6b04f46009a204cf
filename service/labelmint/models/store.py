"""Weights on disk: one safetensors file whose header has a JSON description of the tensors.

Rules of this file:
- The dimensions are stored with the weights; nothing about a file is guessed from its name.
- A missing, extra or misshapen tensor is an error that names the tensor. The network that a file declares is built only
  after the file's tensors have been compared with the declaration (`build_module`, which the importers also use).
- Files are written under a temporary name and renamed. The same tensors give the same bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn

from labelmint.core.errors import UnusableFile
from labelmint.files import replacing
from labelmint.models.generator import Generator, GeneratorSpec
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.stylegan1 import StyleGAN1Spec
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.models.tasks import build_interpreter

FORMAT_VERSION = 1

GENERATOR_KINDS: Mapping[str, type[GeneratorSpec]] = {"stylegan2": StyleGAN2Spec, "stylegan1": StyleGAN1Spec}

M = TypeVar("M", bound=nn.Module)
S = TypeVar("S")


def save_generator(path: Path, generator: Generator, notes: Mapping[str, Any]) -> None:
    """Write a generator. `notes` (source, measured figures) is stored in the header for readers of the file."""
    (kind,) = (name for name, spec in GENERATOR_KINDS.items() if isinstance(generator.spec, spec))
    _save(path, kind, generator, spec=generator.spec.to_json(), notes=notes)


def load_generator(path: Path) -> Generator:
    spec = _spec(path, {kind: spec.from_json for kind, spec in GENERATOR_KINDS.items()})
    return build_module(path, lambda: Generator(spec), safetensors.torch.load_file(path)).eval()


def load_unconditional(path: Path) -> Generator:
    """Load a generator that draws one class. Raises UnusableFile for a conditional one."""
    generator = load_generator(path)
    if generator.spec.generator_classes:
        raise UnusableFile(path, "draws several classes; import one of them with `labelmint import --class-index N`")
    return generator


def save_interpreter(path: Path, interpreter: StyleInterpreter, notes: Mapping[str, Any]) -> None:
    _save(path, "style_interpreter", interpreter, spec=asdict(interpreter.spec), notes=notes)


def load_interpreter(path: Path, score_kind: str = "sum", strip_rows: int | None = None) -> StyleInterpreter:
    spec = _spec(path, {"style_interpreter": _interpreter_spec})
    tensors = safetensors.torch.load_file(path)
    return build_module(path, lambda: build_interpreter(spec, score_kind, strip_rows), tensors).eval()


def _interpreter_spec(data: Mapping[str, Any]) -> InterpreterSpec:
    return InterpreterSpec(
        layout=data["layout"],
        resolution=data["resolution"],
        channels={int(r): c for r, c in data["channels"].items()},
        num_heads=data["num_heads"],
        hidden=tuple(data["hidden"]),
        class_names=tuple(data["class_names"]),
        palette=tuple(tuple(colour) for colour in data["palette"]),
        task=data.get("task", "segmentation"),
    )


def read_notes(path: Path) -> dict[str, Any]:
    """Return the notes that were passed to `save_*`."""
    return dict(json.loads(_metadata(path)["notes"]))


def _save(path: Path, kind: str, module: nn.Module, *, spec: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    header = {"format_version": FORMAT_VERSION, "kind": kind, "spec": spec}
    tensors = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    data = safetensors.torch.save(tensors, {"labelmint": json.dumps(header), "notes": json.dumps(dict(notes))})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_bytes(_sorted_header(data))


def _sorted_header(data: bytes) -> bytes:
    """Sort the keys of the header. safetensors writes them in hash order, so equal content could give unequal bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UnusableFile(path, "does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UnusableFile(path, f"is not a whole safetensors file ({error})") from error
    if "labelmint" not in metadata:
        raise UnusableFile(path, "was not written by labelmint: its header has no 'labelmint' entry")
    return dict(metadata)


def _spec(path: Path, readers: Mapping[str, Callable[[Mapping[str, Any]], S]]) -> S:
    try:
        header = json.loads(_metadata(path)["labelmint"])
        version, held, data = header["format_version"], header["kind"], header["spec"]
        if version != FORMAT_VERSION:
            raise UnusableFile(path, f"has format version {version}; this labelmint reads {FORMAT_VERSION}")
        if held not in readers:
            raise UnusableFile(path, f"holds a {held}, not a {' or '.join(readers)}")
        return readers[held](data)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UnusableFile(path, f"has a header that cannot be read: {error!r}") from error


def build_module(path: Path, build: Callable[[], M], tensors: Mapping[str, torch.Tensor]) -> M:
    """Build a module and load the tensors of the file `path` into it.

    Memory is allocated only after the declared sizes have been checked. Raises UnusableFile that names the tensor that
    is missing, extra, misshapen or not finite.
    """
    try:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    except (RuntimeError, TypeError, ValueError, OverflowError, KeyError) as error:
        problem = str(error).partition("\n")[0]
        raise UnusableFile(path, f"declares dimensions from which no network can be built: {problem}") from error
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UnusableFile(path, f"lacks the tensor {name!r}")
        if name not in expected:
            raise UnusableFile(path, f"has an unexpected tensor {name!r}")
        if tuple(tensors[name].shape) != expected[name]:
            raise UnusableFile(path, f"has {name!r} of shape {tuple(tensors[name].shape)}, expected {expected[name]}")
        if not torch.isfinite(tensors[name]).all():
            raise UnusableFile(path, f"has NaN or infinity in {name!r}")
    module = build()
    module.load_state_dict(tensors)
    return module
