"""`labelmint import`: converts weights of other projects to labelmint's safetensors files.

Rules of this file:
- A positive test of its content determines the format of a file; a format that the user names must agree. Unknown files
  are refused with the list of known formats, ambiguous files with the list of formats that match.
- An option that does not apply to the given file is refused, not ignored, so the user learns that it had no effect.
- Everything is read, checked and built before the first byte is written. So a failed import writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from labelmint.checkpoints.classifiers import import_classifiers, is_classifier
from labelmint.checkpoints.container import Checkpoint, open_checkpoint
from labelmint.checkpoints.generators import Imported
from labelmint.checkpoints.name_table import holds
from labelmint.checkpoints.nvlabs import Classes, import_nvlabs, is_nvlabs
from labelmint.checkpoints.rosinality import import_rosinality, is_rosinality
from labelmint.checkpoints.stylegan1 import import_stylegan1, is_stylegan1
from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.core.generator_classes import check_class_names
from labelmint.models.annotations import LabelClasses, sha256_of
from labelmint.models.annotations.directory import read_names
from labelmint.models.annotations.files import read_json
from labelmint.models.store import load_generator, save_generator, save_interpreter

FormatName = Literal["nvlabs-stylegan2", "rosinality-stylegan2", "stylegan1", "datasetgan-classifiers"]

_TESTS: Mapping[FormatName, Callable[[object], bool]] = {
    "nvlabs-stylegan2": is_nvlabs,
    "rosinality-stylegan2": is_rosinality,
    "stylegan1": is_stylegan1,
    "datasetgan-classifiers": is_classifier,
}
FORMATS = tuple(_TESTS)
_CLASS_NAMES: TypeAdapter[list[str] | dict[str, str]] = TypeAdapter(list[str] | dict[str, str])
_KNOWN = f"known formats: {', '.join(FORMATS)}"


@dataclass(frozen=True)
class ImportOptions:
    """Options that only some formats need; None means not given."""

    class_index: int | None = None  # conditional NVlabs generators: only this class
    class_names: Path | None = None  # conditional NVlabs generators: a JSON file with the names of all classes
    average_latent: Path | None = None  # StyleGAN1
    generator: Path | None = None  # classifiers: the imported generator that they read
    layout: str | None = None  # classifiers
    classes: Path | None = None  # classifiers: a classes.json as for annotations; optional

    def allow_only(self, kind: str, *names: str) -> None:
        for name, value in asdict(self).items():
            if value is not None and name not in names:
                raise InvalidRequest(name, f"does not apply to {kind} files; omit it")


def import_file(source: Path, out: Path, format_name: FormatName | None, *, options: ImportOptions) -> str:
    """Convert `source` to `out` and return a description. With `format_name` None, the format is detected."""
    if source.exists() and out.exists() and out.samefile(source):
        raise InvalidRequest("out", "would overwrite the file that is imported; name another one")
    if source.is_dir():
        if format_name not in (None, "datasetgan-classifiers"):
            raise UnusableFile(source, f"is a directory; {format_name} is one file")
        return _import_classifiers(source, out, options)
    checkpoint = open_checkpoint(source)
    told = format_of(checkpoint)
    if format_name not in (None, told):
        raise UnusableFile(source, f"is {told}, not {format_name}")
    if told == "datasetgan-classifiers":
        raise UnusableFile(source, "is one classifier of an ensemble; name the directory that holds model_0.pth ...")
    return _import_generator(checkpoint, told, out, options=options)


def format_of(checkpoint: Checkpoint) -> FormatName:
    """Return the one format whose test the file's content passes."""
    found = [name for name, test in _TESTS.items() if test(checkpoint.value)]
    if not found and _is_nvlabs_state(checkpoint.value):
        raise UnusableFile(
            checkpoint.path,
            "is a bare state dict of an NVlabs generator, without the gains and clamps that its modules record; "
            "import the network-snapshot .pkl itself",
        )
    if not found:
        raise UnusableFile(checkpoint.path, f"holds no network of a known format; {_KNOWN}")
    if len(found) > 1:
        raise UnusableFile(checkpoint.path, f"could be any of {', '.join(found)}; a file must be of exactly one format")
    return found[0]


def _is_nvlabs_state(value: object) -> bool:
    candidates = [value, *value.values()] if isinstance(value, dict) else []
    return any(isinstance(item, dict) and holds(item, "mapping.fc0.weight") for item in candidates)


def _import_generator(checkpoint: Checkpoint, told: FormatName, out: Path, *, options: ImportOptions) -> str:
    if told == "nvlabs-stylegan2":
        options.allow_only(told, "class_index", "class_names")
        imported: Imported = import_nvlabs(checkpoint, _classes(options))
    elif told == "rosinality-stylegan2":
        options.allow_only(told)
        imported = import_rosinality(checkpoint)
    else:
        options.allow_only(told, "average_latent")
        imported = import_stylegan1(checkpoint, options.average_latent)
    notes: dict[str, Any] = {
        "source": checkpoint.path.name,
        "source_sha256": checkpoint.sha256,
        "format": told,
        **imported.remarks,
    }
    save_generator(out, imported.generator, notes)
    spec = imported.generator.spec
    classes = f"{len(spec.generator_classes)} classes, " if spec.generator_classes else ""
    size = f"{spec.resolution}x{spec.resolution}"
    return f"{out}: generator of {told}, {size}, z_dim {spec.z_dim}, {classes}sha256 {sha256_of(out)}"


def _classes(options: ImportOptions) -> Classes:
    if options.class_names is None:
        return Classes(options.class_index)
    if options.class_index is not None:
        raise InvalidRequest("class_names", "does not apply with --class-index, which imports one class without a name")
    return Classes(names=_read_class_names(options.class_names))


def _read_class_names(path: Path) -> tuple[str, ...]:
    """Read a JSON list of names, or an object from the index of each class, as text, to its name."""
    mend = 'name all classes in order, as ["cat", "dog", ...] or {"0": "cat", "1": "dog", ...}'
    given = read_json(path, _CLASS_NAMES, mend)
    if isinstance(given, dict):
        indices = [str(index) for index in range(len(given))]
        if missing := next((index for index in indices if index not in given), None):
            raise UnusableFile(path, f"has {len(given)} names, but none for class {missing}; {mend}")
        given = [given[index] for index in indices]
    try:
        return check_class_names(given)
    except ValueError as error:
        raise UnusableFile(path, f"cannot be used: {error}") from error


def _import_classifiers(directory: Path, out: Path, options: ImportOptions) -> str:
    options.allow_only("datasetgan-classifiers", "generator", "layout", "classes")
    if options.generator is None or options.layout is None:
        missing = "generator" if options.generator is None else "layout"
        raise InvalidRequest(missing, "classifiers need the generator that they read and the layout of its features")
    classes = None
    if options.classes is not None:
        mend = 'list the classes as [{"name": "background", "rgb": [0, 0, 0]}, ...]'
        classes = LabelClasses(*read_names(options.classes, mend))
    generator = load_generator(options.generator)
    interpreter, digests = import_classifiers(directory, generator.spec, options.layout, classes=classes)
    notes: dict[str, Any] = {
        "source": directory.resolve().name,
        "source_sha256": digests,
        "format": "datasetgan-classifiers",
        "generator_sha256": sha256_of(options.generator),
    }
    save_interpreter(out, interpreter, notes)
    spec = interpreter.spec
    return (
        f"{out}: interpreter of {spec.num_heads} heads and {spec.num_classes} classes, "
        f"{spec.resolution}x{spec.resolution}, layout {spec.layout}, D {spec.feature_dim}, sha256 {sha256_of(out)}"
    )
